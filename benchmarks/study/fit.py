"""Fitting one method with the training loop of the package, on rows in memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path

import torch
import yaml
from torch import Tensor

from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import METHODS as CLOSED_FORMS
from csdiff.adapters.linear import LinearAdapter
from csdiff.adapters.registry import build_adapter
from csdiff.losses import build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.denoising import DIFFUSION, DenoisingObjective
from csdiff.training.loop import Loop, make_optimizer
from csdiff.training.recipe import objective_options
from csdiff.training.task import AlignmentTask, Embedder

from .data import ROOT, Rows
from .methods import Method

CALIBRATION_ROWS = 1024


def recipe(file: str) -> TrainConfig:
    """The run that a file in `configs/` describes."""
    return _filled(TrainConfig(), yaml.safe_load((ROOT / "configs" / file).read_text()))


def _filled(config, values: dict):
    known = {f.name for f in fields(config)}
    if unknown := set(values) - known:
        raise ValueError(f"unknown options {sorted(unknown)}")
    return replace(
        config,
        **{
            name: _filled(getattr(config, name), value) if is_dataclass(getattr(config, name)) else value
            for name, value in values.items()
        },
    )


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


def fit(method: Method, rows: Rows, config: TrainConfig, seed: int) -> Fitted:
    """Fit a method to rows with the budget of a recipe.

    Args:
        method: What is fitted.
        rows: Captions and pictures to fit to.
        config: Recipe and budget that all methods share.
        seed: Of weights, order, captions and noise, and of the choice of pairs.
    """
    start = time.process_time()
    if method.adapter == "raw_text":
        return Fitted(None, 0.0, 0)
    paired, rest = _parts(rows, method.pairs, seed)
    if method.adapter in CLOSED_FORMS:
        adapter = LinearAdapter.fit([(paired.text, paired.image)], method.adapter)
        count = sum(p.numel() for p in adapter.parameters())
        return Fitted(adapter.eval(), time.process_time() - start, count)
    config = _run_config(method, config, seed, len(paired.ids.unique()))
    torch.manual_seed(seed)
    adapter = _adapter(config, paired)
    objective = DenoisingObjective() if config.objective == DIFFUSION else _objective(config, paired)
    task = AlignmentTask(Embedder(adapter.train()), objective.train(), config.ema.decay)
    if method.tokens:
        task.embedder.project_text_with(text_encoder().project)
    loop = Loop(config, task, make_optimizer(task, config), torch.amp.GradScaler("cpu", enabled=False))
    batches = _batches(paired, _unpaired(rest, method.unpaired), config, method, seed)
    for _ in range(config.max_steps):
        loop.step(next(batches))
    seconds = time.process_time() - start
    adapter.eval()
    with torch.no_grad():
        for name, parameter in task.parameters.items():
            parameter.copy_(task.ema.average[name])
        sample = paired[torch.randperm(len(paired), generator=torch.Generator().manual_seed(seed))[:CALIBRATION_ROWS]]
        if method.adapter != "diffusion":
            adapter.calibrate_norm(predict(adapter, sample).norm(dim=1), sample.image.norm(dim=1))
    return Fitted(adapter, seconds, sum(p.numel() for p in adapter.parameters() if p.requires_grad))


@torch.no_grad()
def predict(adapter: Adapter | None, rows: Rows) -> Tensor:
    """Predicted image embeddings `(N, D)`."""
    torch.manual_seed(0)
    if adapter is None:
        return rows.text
    if adapter.uses_input_ids:
        parts = [tokenize()(rows.captions[i : i + 256])[0] for i in range(0, len(rows), 256)]
        return torch.cat([adapter.embed_input_ids(part) for part in parts])
    return adapter.embed(rows.text)


def _run_config(method: Method, config: TrainConfig, seed: int, pictures: int) -> TrainConfig:
    options = dict(config.objective_options) if method.objective == "cs_aligner" == config.objective else {}
    options |= method.options
    if method.adapter_options is not None:
        config = replace(config, adapter_options=method.adapter_options)
    if method.adapter != "recipe":
        config = replace(config, adapter=method.adapter)
    config = replace(config, objective=method.objective, objective_options=options, seed=seed, **method.changes)
    return replace(config, batch_size=min(config.batch_size or pictures, pictures))


def _adapter(config: TrainConfig, rows: Rows) -> Adapter:
    dims = {"embedding_dim": rows.image.shape[1], "text_dim": rows.text.shape[1]}
    adapter = build_adapter(config.adapter, **dims, **config.adapter_options)
    statistics = (rows.image.mean(0), rows.image.std(0), rows.text.mean(0), rows.text.std(0))
    adapter.set_statistics(*statistics)
    if config.init_from in CLOSED_FORMS and hasattr(adapter, "skip"):
        adapter.init_from(LinearAdapter.fit([(rows.text, rows.image)], config.init_from, calibrate=False))
    return adapter


def _objective(config: TrainConfig, rows: Rows):
    options = objective_options(
        config,
        pictures=len(rows.ids.unique()),
        text_dim=rows.text.shape[1],
        image_dim=rows.image.shape[1],
        normalized=bool((rows.image.norm(dim=1) - 1).abs().max() < 1e-3),
    )
    return build_objective(config.objective, **options)


def _parts(rows: Rows, share: float, seed: int) -> tuple[Rows, Rows | None]:
    """A random share of the pictures with their captions, and the rest."""
    if share == 1:
        return rows, None
    pictures = rows.ids.unique()
    pictures = pictures[torch.randperm(len(pictures), generator=torch.Generator().manual_seed(seed))]
    count = round(share * len(pictures))
    return rows.pictures(pictures[:count]), rows.pictures(pictures[count:])


def _unpaired(rest: Rows | None, share: float) -> Rows | None:
    if rest is None or share == 0:
        return None
    return rest if share == 1 else rest.pictures(rest.ids.unique()[: round(share * len(rest.ids.unique()))])


def _batches(paired: Rows, rest: Rows | None, config: TrainConfig, method: Method, seed: int) -> Iterator[dict]:
    """Endless batches: a random caption of each picture, pictures in random order."""
    generator = torch.Generator().manual_seed(seed)
    choose = _chooser(paired, config.batch_size, generator)
    others = None
    if rest is not None:
        size = min(config.batch_size, len(rest.ids.unique()))
        others = _chooser(rest, size, generator), _chooser(rest, size, generator)
    states = _token_states(paired) if method.tokens else None
    while True:
        rows = choose()
        pairs = {"text_embeds": paired.text[rows], "image_embeds": paired.image[rows]}
        if method.encoder:
            ids, mask = tokenize()([paired.captions[i] for i in rows.tolist()])
            pairs |= {"input_ids": ids, "text_mask": mask}
        if states is not None:
            pairs |= states(rows)
        batch = {"pairs": pairs}
        if others is not None:
            # Drawn apart, so that nothing tells which caption belongs to which picture.
            batch["unpaired_text"] = {"text_embeds": rest.text[others[0]()]}
            batch["unpaired_image"] = {"image_embeds": rest.image[others[1]()]}
        yield batch


def _chooser(rows: Rows, size: int, generator: torch.Generator):
    _, group, counts = rows.ids.unique(return_inverse=True, return_counts=True)
    by_picture = torch.argsort(group, stable=True)
    starts = counts.cumsum(0) - counts
    order: list[Tensor] = []

    def choose() -> Tensor:
        if not order:
            permutation = torch.randperm(len(counts), generator=generator)
            order.extend(permutation[: len(counts) // size * size].split(size))
        pictures = order.pop()
        caption = (torch.rand(size, generator=generator) * counts[pictures]).long()
        return by_picture[starts[pictures] + caption]

    return choose


@cache
def text_encoder():
    """The tiny CLIP's text encoder."""
    from csdiff.embeddings import load_text_encoder

    return load_text_encoder("tiny-clip")


@cache
def image_encoder():
    """The tiny CLIP's image encoder."""
    from csdiff.embeddings import load_image_encoder

    return load_image_encoder("tiny-clip")


@cache
def tokenize():
    """Captions to token ids."""
    from csdiff.embeddings import load_caption_tokenizer

    return load_caption_tokenizer("tiny-clip")


def _token_states(rows: Rows):
    """Token states of a batch of the shipped train pictures, encoded when they are asked for."""
    from .data import shipped_pictures

    @torch.no_grad()
    def states(chosen: Tensor) -> dict:
        text = text_encoder().encode([rows.captions[i] for i in chosen.tolist()])
        pictures = shipped_pictures("train", rows.ids[chosen].tolist())
        tokens = image_encoder().project(image_encoder().encode(pictures).tokens)
        return {"text_states": text.states.float(), "text_mask": text.mask, "image_tokens": tokens.float()}

    return states


def output_folder(path: Path) -> Path:
    """The folder, made."""
    path.mkdir(parents=True, exist_ok=True)
    return path
