"""`csdiff evaluate`: adapters, held-out pairs and pictures in; numbers, a manifest and a report out."""

from __future__ import annotations

import json
import logging
from contextlib import ExitStack, suppress
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from tqdm import tqdm

from csdiff.devices import choose_device
from csdiff.embeddings.encoders import find_encoder
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import require
from csdiff.evaluation.baselines import baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.comparison import IMAGES, compare
from csdiff.evaluation.config import EvaluateConfig, check
from csdiff.evaluation.data import check_fits, check_source, open_store, predict, read_pairs, training_store
from csdiff.evaluation.embedding_metrics import LIMIT, held_out_metrics, real_metrics
from csdiff.evaluation.metrics import BASELINES
from csdiff.files import absolute, plain, write_json, write_text
from csdiff.pipelines.decoders import AdapterCard, read_adapter_card
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

    Returns:
        The metrics of the (first) adapter, `baselines` (`raw_text`, `mean_shift`, `ridge`, and `real`: real against
        real), with `--compare` also `adapters` and `comparison`, with `--decoder` also `pictures`, and `manifest`.

    Raises:
        CSDiffError: Bad input, in one sentence.
        OSError: A file cannot be written.
    """
    check(config)
    cards = read_cards(config)
    device = str(choose_device(config.device))
    drawing = measured = None
    if config.decoder is not None:
        from csdiff.evaluation.picture_run import PictureRun

        drawing = PictureRun(config, cards, device)
        drawing.load()
    result: dict = {}
    described = {n: {"path": str(card.path), "class": card.kind, "sha256": card.sha256} for n, card in cards.items()}
    manifest = {"adapters": described, "seed": config.seed, "versions": versions()}
    if config.data is not None:
        *measured, fitted, seen_by = _predictions(config, cards, device)
        fitted_on = {**dict.fromkeys(BASELINES, fitted["words"]), "raw_text": "nothing"}
        fitted_on |= {name: _trained_on(card) for name, card in cards.items()}
        result = _metrics(config, *measured, fitted_on)
        data = {**measured[0].describe(), "seen_by": seen_by}
        manifest |= {"data": data, "baselines_fitted_to": fitted, "bandwidths": config.bandwidths}
    if drawing is not None:
        result["pictures"], manifest["pictures"] = drawing.measure()
    result = plain({**result, "manifest": manifest})
    if config.json is not None:
        # Twelve digits: the last bits of linear algebra can differ between two runs, a score must not.
        rounded = json.loads(json.dumps(result), parse_float=lambda digits: float(f"{float(digits):.12g}"))
        write_json(Path(config.json), rounded)
    if config.report is not None:
        from csdiff.evaluation.report import html_page

        write_text(Path(config.report), html_page(result, measured, drawing))
    return result


def read_cards(config: EvaluateConfig) -> dict[str, AdapterCard]:
    """The adapters by a short name each, with their encoders where the options say they are."""
    paths = [*([config.adapter] if config.adapter else []), *config.compare]
    paths = list({absolute(path): path for path in paths}.values()) or [str(assets_dir() / "adapter")]
    names, cards = short_names(paths), {}
    for path in paths:
        card = read_adapter_card(path)
        for tower in ("text", "image"):
            key = f"{tower}_encoder"
            if (place := getattr(config, key)) is not None:
                found = find_encoder(card.metadata.get(key), tower, place, f"the adapter {card.path}")
                card = replace(card, metadata={**card.metadata, key: found})
        cards[names[path]] = card
    return cards


def short_names(paths: list[str]) -> dict[str, str]:
    """The last part of each path, or as many parts as tell it from the others and from the baselines."""
    parts = {path: (Path(path).resolve() if ".." in path else Path(path).absolute()).parts[1:] for path in paths}
    names = {}
    for path, mine in parts.items():
        ends = [mine[-depth:] for depth in range(1, len(mine) + 1)]
        alone = (end for end in ends if sum(other[-len(end) :] == end for other in parts.values()) == 1)
        names[path] = next((name for name in map("/".join, alone) if name not in RESERVED), path)
    return names


def versions() -> dict[str, str | None]:
    """Versions of the packages that a score depends on."""
    found: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _predictions(config: EvaluateConfig, cards: dict[str, AdapterCard], device: str):
    """Pairs, predictions of adapters and of baselines, what these were fitted to, and who was trained on the pairs."""
    first = next(iter(cards.values()))
    require("sklearn", "linear separability")
    fit_on = config.train or training_store(first)
    if fit_on is not None:
        check_source(fit_on, first)
    elif isinstance(named := (first.metadata.get("data") or {}).get("train"), str):
        logger.warning(
            "No store of the training pairs of %s is at hand: mean shift and ridge are fitted to the held-out pairs "
            "themselves, across folds; --train %s fits them to training pairs.",
            first.path,
            named if Path(named).is_file() else "DATA",
        )
    with ExitStack() as stack:

        def opened(path: str, split: str) -> tuple[EmbeddingStore, str | None]:
            return stack.enter_context(open_store(path, first, device, split, config.concepts, config.progress))

        store, split = opened(config.data, config.split)
        source = ((store.fingerprint or {}).get("data") or {}).get("source")
        seen_by = []
        for name, card in cards.items():
            check_fits(card, store, config.data)
            trained = ((card.metadata.get("data") or {}).get("source") or {}).get("source")
            if trained is not None and trained == source:
                seen_by.append(name)
                logger.warning("%s was trained on %s: these numbers are not held out.", name, config.data)
        pairs = read_pairs(config.data, store, None if config.full else config.max_rows, config.concepts, split)
        predictions = {name: predict(card, pairs, device, config.seed) for name, card in cards.items()}
        if fit_on is None:
            baselines = cross_fitted_predictions(pairs.text, pairs.image, pairs.image_ids, seed=config.seed)
            fitted = {"source": config.data, "folds": 5, "words": "these rows, cross-fitted"}
            return pairs, predictions, baselines, fitted, seen_by
        fitting, _ = opened(fit_on, "train")
        check_fits(first, fitting, fit_on)
        train = read_pairs(fit_on, fitting, None if config.full else TRAIN_ROWS)
        baselines = baseline_predictions(train.text, train.image, pairs.text)
        words = f"{Path(fit_on).name}, {len(train.rows):,} rows"
        fitted = {**train.describe(), "own_training_store": config.train is None, "words": words}
        return pairs, predictions, baselines, fitted, seen_by


def _metrics(config: EvaluateConfig, pairs, predictions: dict, baselines: dict, fitted_on: dict[str, str]) -> dict:
    """The numbers of adapters and baselines, and what each was fitted on."""
    rows, options = (pairs.image, pairs.text, pairs.image_ids), (config.bandwidths, config.seed)
    limit, most = (None, None) if config.full else (LIMIT, IMAGES)
    columns = {
        name: {**held_out_metrics(prediction, *rows, *options, limit, pairs.concepts), "fitted_on": fitted_on[name]}
        for name, prediction in tqdm({**predictions, **baselines}.items(), "measuring", disable=not config.progress)
    }
    result = dict(columns[next(iter(predictions))])
    result["baselines"] = {name: columns[name] for name in baselines}
    result["baselines"]["real"] = real_metrics(pairs.image, pairs.image_ids, *options, limit)
    if len(predictions) > 1:
        result["adapters"] = {name: columns[name] for name in predictions}
        result["comparison"] = compare(predictions, *rows, config.bootstrap, config.seed, most)
    return result


def _trained_on(card: AdapterCard) -> str:
    """What an adapter says it was trained on, in a few words."""
    data = card.metadata.get("data") or {}
    rows = (card.metadata.get("objective") or {}).get("rows", data.get("rows"))
    name = Path(data["train"]).name if isinstance(data.get("train"), str) else "unknown"
    return f"{name}, {rows:,} rows" if isinstance(rows, int) else name
