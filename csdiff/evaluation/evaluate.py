"""`csdiff evaluate`: adapters, held-out pairs and pictures in; numbers, a manifest and a report out."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from torch import Tensor

from csdiff.embeddings.atomic import write_json
from csdiff.errors import CSDiffError
from csdiff.evaluation.comparison import compare
from csdiff.evaluation.config import PICTURE_BASELINES, EvaluateConfig
from csdiff.evaluation.data import HeldOutPairs, check_fits, check_source, open_store, read_pairs, trained_on
from csdiff.evaluation.embedding_metrics import baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.held_out import held_out_metrics, real_metrics, require_classifier
from csdiff.evaluation.metrics import BASELINES
from csdiff.evaluation.predictions import check_encoder_is_known, predict
from csdiff.pipelines.generate import open_device
from csdiff.pipelines.pairing import AdapterCard, read_adapter_card
from csdiff.plain import plain
from csdiff.resources import assets_dir

logger = logging.getLogger(__name__)

PACKAGES = ("csdiff", "torch", "transformers", "diffusers", "torchmetrics", "scikit-learn", "numpy", "pillow")
RESERVED = {*PICTURE_BASELINES, *BASELINES, *BASELINES.values(), "reference"}
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
    cards = read_cards(config)
    for path, option in ((config.json, "json"), (config.report, "report")):
        _check_writable(path, option)
    drawing = None
    if config.decoder is not None:
        from csdiff.evaluation.picture_run import PictureRun

        drawing = PictureRun(config, cards)
    device = str(open_device(config.device or "auto"))
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
        result |= _embedding_result(config, pairs, predictions, baselines, fitted)
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
    return {names[path]: read_adapter_card(path) for path in paths}


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
    require_classifier()
    for path, option in ((config.data, "data"), (config.train, "train")):
        if path is not None:
            check_source(path, option, first)
    with ExitStack() as stack:
        store = stack.enter_context(open_store(config.data, "data", first, device, config.progress, config.split))
        for card in cards.values():
            check_fits(card, store, config.data, "data")
            check_encoder_is_known(card, store)
        pairs = read_pairs(config.data, store, "data", config.max_rows)
        train = None
        if config.train is not None:
            fitting = stack.enter_context(open_store(config.train, "train", first, device, config.progress, "train"))
            check_fits(first, fitting, config.train, "train")
            train = read_pairs(config.train, fitting, "train", 200_000)
        for name, card in cards.items():
            if trained_on(card, store):
                logger.warning("%s was trained on %s: these numbers are not held out.", name, config.data)
        predictions = {name: predict(card, pairs, device, seed=config.seed) for name, card in cards.items()}
    if train is None:
        baselines = cross_fitted_predictions(pairs.text, pairs.image, pairs.image_ids, seed=config.seed)
        fitted = {"source": config.data, "folds": 5}
    else:
        baselines = baseline_predictions(train.text, train.image, pairs.text)
        fitted = train.describe()
    return pairs, predictions, baselines, fitted


def _embedding_result(
    config: EvaluateConfig,
    pairs: HeldOutPairs,
    predictions: dict[str, Tensor],
    baselines: dict[str, Tensor],
    fitted: dict,
) -> dict:
    def measure(prediction: Tensor) -> dict:
        return held_out_metrics(
            prediction, pairs.image, pairs.text, pairs.image_ids, config.bandwidths, seed=config.seed
        )

    adapters = {name: measure(prediction) for name, prediction in predictions.items()}
    result = dict(next(iter(adapters.values())))
    result["baselines"] = {name: measure(prediction) for name, prediction in baselines.items()}
    result["baselines"]["real"] = real_metrics(pairs.image, pairs.image_ids, config.bandwidths, seed=config.seed)
    if len(adapters) > 1:
        result["adapters"] = adapters
        result["comparison"] = compare(
            predictions, pairs.image, pairs.text, pairs.image_ids, config.bootstrap, config.seed
        )
    return result


def _check_writable(path: str | None, option: str) -> None:
    if path is None:
        return
    if not path or Path(path).is_dir():
        raise CSDiffError(f"--{option}: expected the name of a file, found {path!r}.")
    if not Path(path).absolute().parent.is_dir():
        raise CSDiffError(f"--{option} {path}: expected an existing folder for it, found none; make it first.")


def _write_json(path: Path, result: dict) -> None:
    try:
        write_json(path, _rounded(result), indent=2)
    except OSError as error:
        raise CSDiffError(f"--json {path} cannot be written ({error.strerror}).") from error


def _rounded(value):
    """Numbers to twelve digits: the last bits of linear algebra can differ between two runs, a score must not."""
    if isinstance(value, Mapping):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.12g}") if isinstance(value, float) else value
