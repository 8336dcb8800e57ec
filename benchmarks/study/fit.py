"""Fitting one method: the closed forms of the package, or a training run as `csdiff train` makes it."""

import shutil
import time
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import Tensor

from csdiff.adapters import AutoAdapter
from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import METHODS as CLOSED_FORMS
from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings import load_caption_tokenizer
from csdiff.training import TrainConfig, train

from .data import ASSETS, ROOT, Rows
from .methods import Method


def recipe(file: str) -> TrainConfig:
    """The run that a file in `configs/` describes."""
    return _filled(TrainConfig(), yaml.safe_load((ROOT / "configs" / file).read_text()))


def _filled(config, values: dict):
    known = {f.name for f in fields(config)}
    if unknown := set(values) - known:
        raise ValueError(f"unknown options {sorted(unknown)}")
    nested = {name: is_dataclass(getattr(config, name)) for name in values}
    return replace(config, **{n: _filled(getattr(config, n), v) if nested[n] else v for n, v in values.items()})


@dataclass
class Fitted:
    """A method after fitting.

    Attributes:
        adapter: What came out; None for raw text.
        seconds: Processor time of fitting.
        parameters: Trained or fitted numbers.
    """

    adapter: Adapter | None
    seconds: float
    parameters: int


def fit(method: Method, rows: Rows, config: TrainConfig, seed: int, folder: Path) -> Fitted:
    """Fit a method to rows with the budget of a recipe.

    Args:
        method: What is fitted.
        rows: Captions and images to fit to.
        config: Recipe and budget that all methods share.
        seed: Of weights, order, captions and noise, and of the choice of pairs.
        folder: Of this job: stores and the run; the caller removes it.
    """
    start = time.process_time()
    if method.adapter == "raw_text":
        return Fitted(None, 0.0, 0)
    paired, rest = _parts(rows, method.pairs, seed)
    if method.adapter in CLOSED_FORMS:
        adapter = LinearAdapter.fit([(paired.text, paired.image)], method.adapter)
        count = sum(p.numel() for p in adapter.parameters())
        return Fitted(adapter.eval(), time.process_time() - start, count)
    config = _run(method, config, seed, paired, folder)
    if rest is not None and method.unpaired:
        if method.unpaired < 1:
            known = rest.ids.unique()
            rest = rest.images(known[: round(method.unpaired * len(known))])
        others = str(rest.written(folder / "rest"))
        # Each side is drawn apart, so that nothing tells which caption belongs to which image.
        config.data = replace(
            config.data,
            unpaired_text=others,
            unpaired_image=others,
            unpaired_batch_size=min(config.batch_size, len(rest.ids.unique())),
        )
    train(config)
    seconds = time.process_time() - start
    adapter = AutoAdapter.from_pretrained(config.output_dir).eval()
    return Fitted(adapter, seconds, sum(p.numel() for p in adapter.parameters() if p.requires_grad))


@torch.no_grad()
def predict(adapter: Adapter | None, rows: Rows) -> Tensor:
    """Predicted image embeddings `(N, D)`."""
    torch.manual_seed(0)
    if adapter is None:
        return rows.text
    if adapter.uses_input_ids:
        captions = rows.captions
        parts = [tokenizer()(captions[i : i + 256]) for i in range(0, len(captions), 256)]
        return torch.cat([adapter.embed_input_ids(ids, mask) for ids, mask in parts])
    return adapter.embed(rows.text)


@cache
def tokenizer():
    """Captions to token ids of the tiny CLIP."""
    return load_caption_tokenizer("tiny-clip")


def _run(method: Method, config: TrainConfig, seed: int, paired: Rows, folder: Path) -> TrainConfig:
    """The training run of a method: the recipe with its changes, nothing held out, drawn or tracked."""
    options = dict(config.objective_options) if method.objective == "cs_aligner" == config.objective else {}
    config = replace(
        config,
        output_dir=str(folder / "run"),
        adapter=config.adapter if method.adapter == "recipe" else method.adapter,
        adapter_options=config.adapter_options if method.adapter_options is None else method.adapter_options,
        objective=method.objective,
        objective_options={**options, **method.options},
        seed=seed,
        threads=1,
        data=replace(
            config.data,
            train=str(paired.written(folder / "pairs")),
            validation_fraction=0.0,
            images=str(ASSETS / "data/train.parquet") if method.tokens else None,
        ),
        validation=replace(config.validation, every=0),
        checkpoint=replace(config.checkpoint, every=0),
        logging=replace(config.logging, trackers=[], progress=False, every=config.max_steps),
        **method.changes,
    )
    config.batch_size = min(config.batch_size, len(paired.ids.unique()))
    shutil.rmtree(config.output_dir, ignore_errors=True)
    return config


def _parts(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """A random share of the images with their captions, and the rest."""
    if share == 1:
        return rows, None
    known = rows.ids.unique()
    known = known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]
    count = round(share * len(known))
    return rows.images(known[:count]), rows.images(known[count:])
