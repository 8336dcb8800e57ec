"""`csdiff evaluate`: adapters, held-out pairs and pictures in; numbers, a manifest and a report out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from csdiff.devices import choose_device
from csdiff.embeddings.encoders import find_encoder
from csdiff.embeddings.layout import is_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.comparison import IMAGES, compare
from csdiff.evaluation.config import EvaluateConfig, check
from csdiff.evaluation.data import (
    HeldOutPairs,
    check_fits,
    check_source,
    open_store,
    read_pairs,
    trained_on,
    training_store,
)
from csdiff.evaluation.embedding_metrics import LIMIT
from csdiff.evaluation.extras import require
from csdiff.evaluation.held_out import held_out_metrics, real_metrics
from csdiff.evaluation.metrics import BASELINES
from csdiff.evaluation.predictions import check_encoder_is_known, predict
from csdiff.files import write_json
from csdiff.pipelines.decoders import AdapterCard, read_adapter_card
from csdiff.plain import plain
from csdiff.resources import assets_dir

logger = logging.getLogger(__name__)

PACKAGES = ("csdiff", "torch", "transformers", "diffusers", "torchmetrics", "scikit-learn", "numpy", "pillow")
TRAIN_ROWS = 50_000
"""Rows that baselines are fitted to at most, unless --full."""
RESERVED = {"image", *BASELINES, *BASELINES.values(), "reference"}
"""Names of columns that no adapter may take."""


def evaluate(config: EvaluateConfig) -> dict:
    """Measures one adapter, or several side by side.

    Options, adapters, data and decoder are checked before anything is measured, and files are written at the end.

    Args:
        config: Every option.

    Returns:
        The metrics of the (first) adapter, `baselines` (`raw_text`, `mean_shift`, `ridge`, and `real`: real against
        real), with `--compare` also `adapters` and `comparison`, with `--decoder` also `pictures`, and `manifest`.

    Raises:
        CSDiffError: Bad input, in one sentence.
    """
    check(config)
    cards = read_cards(config)
    for path, option in ((config.json, "json"), (config.report, "report")):
        _check_writable(path, option)
    drawing = None
    if config.decoder is not None:
        from csdiff.evaluation.picture_run import PictureRun

        drawing = PictureRun(config, cards)
    device = str(choose_device(config.device))
    if drawing is not None:
        drawing.prepare(device)
    result: dict = {}
    manifest = {
        "adapters": {name: describe_adapter(card) for name, card in cards.items()},
        "seed": config.seed,
        "versions": versions(),
    }
    plots: dict = {}
    if config.data is not None and not (drawing and drawing.only):
        pairs, predictions, baselines, fitted = _predictions(config, cards, device)
        result |= _embedding_result(config, cards, pairs, predictions, baselines, fitted)
        manifest |= {"data": pairs.describe(), "baselines_fitted_to": fitted, "bandwidths": config.bandwidths}
        plots = {"pairs": pairs, "predictions": predictions, "baselines": baselines}
    if drawing is not None:
        result["pictures"], manifest["pictures"] = drawing.measure(device)
    result["manifest"] = manifest
    result = plain(result)
    if config.json is not None:
        _write_json(Path(config.json), result)
    if config.report is not None:
        from csdiff.evaluation.report import write_report

        write_report(Path(config.report), result, drawing=drawing, **plots)
    return result


def read_cards(config: EvaluateConfig) -> dict[str, AdapterCard]:
    """The adapters by a short name each; see :func:`short_names`."""
    paths = list(dict.fromkeys([*([config.adapter] if config.adapter else []), *config.compare]))
    paths = paths or [str(assets_dir() / "adapter")]
    names = short_names(paths)
    return {names[path]: _with_encoders(read_adapter_card(path), config) for path in paths}


def _with_encoders(card: AdapterCard, config: EvaluateConfig) -> AdapterCard:
    """The card with its encoders where the options say they are."""
    given = {"text_encoder": config.text_encoder, "image_encoder": config.image_encoder}
    moved = {
        name: find_encoder(card.metadata.get(name), name.removesuffix("_encoder"), place, f"the adapter {card.path}")
        for name, place in given.items()
        if place is not None
    }
    return replace(card, metadata={**card.metadata, **moved})


def short_names(paths: list[str]) -> dict[str, str]:
    """The last part of each path, or as many parts as tell it from the others and from the baselines."""
    parts = {path: (Path(path).resolve() if ".." in path else Path(path).absolute()).parts[1:] for path in paths}
    names = {path: parts[path][-1] if parts[path] else path for path in paths}
    for depth in range(2, 2 + max(map(len, parts.values()))):
        taken = Counter(names.values())
        alike = [path for path in paths if names[path] in RESERVED or taken[names[path]] > 1]
        names |= {path: "/".join(parts[path][-depth:]) for path in alike}
    # Two ways to write the path of one folder.
    return names if len(set(names.values())) == len(names) else {path: path for path in paths}


def describe_adapter(card: AdapterCard) -> dict:
    """What the manifest says of an adapter."""
    return {"path": str(card.path), "class": card.kind, "sha256": card.sha256}


def versions() -> dict[str, str | None]:
    """Versions of the packages that a score depends on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _predictions(config: EvaluateConfig, cards: dict[str, AdapterCard], device: str):
    first = next(iter(cards.values()))
    require("sklearn", "linear separability")
    own = None if config.train is not None else training_store(first)
    fit_on = config.train or own
    for path, option in ((config.data, "data"), (fit_on, "train")):
        if path is not None:
            check_source(path, option, first)
    if fit_on is None and isinstance(named := (first.metadata.get("data") or {}).get("train"), str):
        logger.warning(
            "The store that %s was trained on (%s) is not at hand: mean shift and ridge are fitted to the held-out "
            "pairs themselves, across folds; --train fits them to training pairs.",
            first.path,
            named,
        )
    with ExitStack() as stack:

        def opened(path: str, option: str, split: str) -> EmbeddingStore:
            store = open_store(path, option, first, device, config.progress, split, config.concepts)
            return stack.enter_context(store)

        store = opened(config.data, "data", config.split)
        for card in cards.values():
            check_fits(card, store, config.data, "data")
            check_encoder_is_known(card, store)
        split = None if is_store(config.data) else config.split
        pairs = read_pairs(
            config.data, store, "data", None if config.full else config.max_rows, config.concepts, split
        )
        train = None
        if fit_on is not None:
            fitting = opened(fit_on, "train", "train")
            check_fits(first, fitting, fit_on, "train")
            train = read_pairs(fit_on, fitting, "train", None if config.full else TRAIN_ROWS)
        for name, card in cards.items():
            if trained_on(card, store):
                logger.warning("%s was trained on %s: these numbers are not held out.", name, config.data)
        predictions = {name: predict(card, pairs, device, seed=config.seed) for name, card in cards.items()}
    if train is None:
        baselines = cross_fitted_predictions(pairs.text, pairs.image, pairs.image_ids, seed=config.seed)
        fitted = {"source": config.data, "folds": 5, "words": "these rows, cross-fitted"}
    else:
        baselines = baseline_predictions(train.text, train.image, pairs.text)
        words = f"{Path(fit_on).name}, {len(train.rows):,} rows"
        fitted = {**train.describe(), "own_training_store": own is not None, "words": words}
    return pairs, predictions, baselines, fitted


def _embedding_result(
    config: EvaluateConfig,
    cards: dict[str, AdapterCard],
    pairs: HeldOutPairs,
    predictions: dict[str, Tensor],
    baselines: dict[str, Tensor],
    fitted: dict,
) -> dict:
    limit = None if config.full else LIMIT
    parts = len(predictions) + len(baselines) + 1 + (len(predictions) > 1)
    with tqdm(total=parts, desc="measuring", disable=not config.progress) as bar:

        def measure(prediction: Tensor, fitted_on: str) -> dict:
            result = held_out_metrics(
                prediction,
                pairs.image,
                pairs.text,
                pairs.image_ids,
                config.bandwidths,
                config.seed,
                limit,
                pairs.concepts,
            )
            bar.update()
            return {**result, "fitted_on": fitted_on}

        adapters = {name: measure(prediction, _trained_on(cards[name])) for name, prediction in predictions.items()}
        result = dict(next(iter(adapters.values())))
        result["baselines"] = {
            name: measure(prediction, "nothing" if name == "raw_text" else fitted["words"])
            for name, prediction in baselines.items()
        }
        real = real_metrics(pairs.image, pairs.image_ids, config.bandwidths, config.seed, limit)
        result["baselines"]["real"] = real
        bar.update()
        if len(adapters) > 1:
            result["adapters"] = adapters
            result["comparison"] = compare(
                predictions,
                pairs.image,
                pairs.text,
                pairs.image_ids,
                config.bootstrap,
                config.seed,
                None if config.full else IMAGES,
            )
            bar.update()
    return result


def _trained_on(card: AdapterCard) -> str:
    """What an adapter says it was trained on, in a few words."""
    data = card.metadata.get("data") or {}
    rows = (card.metadata.get("objective") or {}).get("rows", data.get("rows"))
    name = Path(data["train"]).name if isinstance(data.get("train"), str) else "unknown"
    return f"{name}, {rows:,} rows" if isinstance(rows, int) else name


def _check_writable(path: str | None, option: str) -> None:
    if path is None:
        return
    if not path or Path(path).is_dir():
        raise CSDiffError(f"--{option}: expected the name of a file, found {path!r}.")
    if not Path(path).absolute().parent.is_dir():
        raise CSDiffError(f"--{option} {path}: expected an existing folder for it, found none; make it first.")


def _write_json(path: Path, result: dict) -> None:
    try:
        write_json(path, _rounded(result))
    except OSError as error:
        raise CSDiffError(f"--json {path} cannot be written ({error.strerror}).") from error


def _rounded(value):
    """Numbers to twelve digits: the last bits of linear algebra can differ between two runs, a score must not."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value
