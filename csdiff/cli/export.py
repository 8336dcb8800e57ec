"""`csdiff export`: the adapter of a run as a folder of its own, as a complete diffusers pipeline, or on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from csdiff.errors import CSDiffError
from csdiff.files import absolute, read_jsonl, read_safetensors_header, write_json, writing_folder

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
# Where a checkpoint keeps the weights as they are trained, beside their running average.
ONLINE = "online.embedder.adapter."


@dataclass
class ExportConfig:
    """Takes an adapter out of a training run, into a folder of its own or a complete diffusers pipeline."""

    source: str = ""
    """Output folder of a training run, checkpoint, adapter folder, or hub repository."""
    output: str = ""
    """Folder to write; it appears when it is whole. It may be left out with --push_to_hub."""
    checkpoint: str | None = None
    """Of a run: best, latest or a step. Default: the finished adapter, before there is one the latest checkpoint."""
    weights: Literal["average", "online"] = "average"
    """The running average of the weights, or the weights of the last step themselves."""
    dtype: Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | None = None
    """Number format of the weights; statistics stay float32. Default: as they are."""
    format: Literal["adapter", "prior", "pipeline"] = "adapter"
    """adapter: the adapter alone; prior: with its encoders, as KandinskyV22PriorPipeline loads it; pipeline: with the
    decoder too, as AutoPipelineForText2Image loads it."""
    decoder: str = "tiny"
    """Kandinsky decoder of a pipeline: preset, folder or hub repository."""
    merge_lora: bool = False
    """Add the updates of a LoRA adapter into the text encoder, which is saved in OUTPUT/text_encoder. A prior and a
    pipeline are always merged."""
    text_encoder: str | None = None
    """Where the adapter's text encoder is now, if not where its csdiff.json says."""
    image_encoder: str | None = None
    """Where the adapter's image encoder is now, if not where its csdiff.json says."""
    overwrite: bool = False
    """Replace an adapter or pipeline folder that is there; never a training run."""
    push_to_hub: str | None = None
    """Also upload to this hub repository (owner/name), made when there is none."""
    private: bool = False
    """Make a new hub repository private."""


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        output: Folder that was written; None when everything went to the hub.
        source: Adapter folder the weights come from.
        format: adapter, prior or pipeline.
        adapter: Class of the adapter.
        weights: average or online; None when the adapter does not say.
        step: Updates of the training run; None when the adapter does not say.
        dtype: Of the weights.
        url: Of the commit on the hub, if any.
    """

    output: Path | None
    source: str
    format: str
    adapter: str
    weights: str | None
    step: int | None
    dtype: str
    url: str | None = None


def as_text(result: ExportResult) -> str:
    """Where it went: the folder, then the commit on the hub."""
    return "\n".join(str(place) for place in (result.output, result.url) if place)


def export(config: ExportConfig) -> ExportResult:
    """Writes an adapter as a folder of its own, or as a pipeline with its encoders.

    Everything is looked at before anything is written, and the folder appears when it is whole.

    Raises:
        CSDiffError: No adapter there, a folder in the way, weights that do not fit the number format, encoders or a
            decoder that are not there or do not fit, or a hub that refuses.
        OSError: The place cannot be written.
    """
    import torch

    from csdiff.adapters import folder, hub
    from csdiff.options import check_options

    check_options(config)
    source = find_adapter(config)
    output = _check_output(config, source)
    adapter = _load(source, config)
    kind, training = type(adapter).__name__, adapter.metadata.get("training") or {}
    if config.merge_lora and not adapter.uses_input_ids:
        raise CSDiffError(f"merge_lora: expected a LoRA adapter, found a {kind}; leave it out.")
    dtype = getattr(torch, DTYPES.get(config.dtype, config.dtype)) if config.dtype else adapter.dtype
    torch.nn.Module.to(adapter, dtype)
    try:
        folder.check_values(Path(source), adapter.state_dict())
    except CSDiffError as error:
        # they were finite when they were loaded
        raise CSDiffError(f"dtype: weights of {source} are beyond the range of {dtype}; use bfloat16.") from error

    repo, write = config.push_to_hub, adapter.save_pretrained
    if config.format != "adapter":
        write = _pipeline_writer(config, adapter, dtype, Path(output or repo).name)
    elif config.merge_lora:
        if output is None or repo:
            raise CSDiffError(
                "merge_lora: an adapter folder names its merged text encoder by place, which a hub repository cannot; "
                "push it with --format prior."
            )
        write = _merged_writer(adapter, output)
    if output is not None:
        with writing_folder(output, whole=True) as aside:
            write(aside)
    url = None
    if repo and config.format == "adapter":
        url = str(adapter.push_to_hub(repo, private=config.private))
    elif repo:
        url = str(hub.push(repo, write, commit_message=f"Upload {kind}", private=config.private))
    return ExportResult(
        output, str(source), config.format, kind, training.get("weights"), training.get("steps"),
        str(dtype).removeprefix("torch."), url,
    )  # fmt: skip


def find_adapter(config: ExportConfig) -> str | Path:
    """The adapter folder that is meant, or the hub repository as it is.

    Raises:
        CSDiffError: No such checkpoint, or a run that has left nothing yet.
    """
    from csdiff.training.run_folder import CONFIG_NAME, Checkpoints

    if not config.source:
        raise CSDiffError("source: expected a training run, checkpoint or adapter folder, found nothing; name one.")
    run = Path(config.source)
    if not (run / CONFIG_NAME).is_file():
        if config.checkpoint is not None:
            raise CSDiffError(
                f"checkpoint: expected the output folder of a training run (with {CONFIG_NAME}) to look for "
                f"{config.checkpoint} in, found {config.source}."
            )
        return run if run.exists() else config.source
    if config.checkpoint is None and (run / "config.json").is_file():
        return run
    checkpoints, wanted = Checkpoints(run / "checkpoints"), config.checkpoint or "latest"
    number = wanted.removeprefix("step-")
    if wanted != "latest" and wanted != "best" and not number.isdecimal():
        raise CSDiffError(f"checkpoint: expected best, latest or a step, found {wanted!r}.")
    found = checkpoints.path(int(number)) if number.isdecimal() else checkpoints.named(wanted)
    if wanted == "latest":
        found = checkpoints.latest()
    if found is None or not found.is_dir():
        steps = ", ".join(map(str, checkpoints.steps()))
        there = f"there are those of steps {steps}" if steps else "the run has left none yet"
        raise CSDiffError(f"checkpoint: expected {wanted} in {checkpoints.folder}, found none; {there}.")
    return found


def _check_output(config: ExportConfig, source: str | Path) -> Path | None:
    from csdiff.training.run_folder import CONFIG_NAME

    if not config.output:
        if config.push_to_hub:
            return None
        raise CSDiffError("output: expected a folder to write, found none; give --output DIR or --push_to_hub ID.")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise CSDiffError(f"output: expected a folder, found the file {output}; give another --output.")
    if output.is_dir() and any(output.iterdir()):
        if not config.overwrite:
            raise CSDiffError(f"output: {output} is not empty; give another --output, or --overwrite to replace it.")
        ours = any((output / name).is_file() for name in ("csdiff.json", "model_index.json"))
        if not ours or (output / CONFIG_NAME).exists() or (output / "state").exists():
            raise CSDiffError(
                f"output: {output} is not an exported adapter or pipeline, and is not replaced; give another --output."
            )
        if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise CSDiffError(f"output: {output} holds the adapter that is exported; give another --output.")
    return output


def _load(source: str | Path, config: ExportConfig):
    """The adapter with the weights asked for, and metadata that says so.

    A checkpoint holds the averaged weights as an adapter folder and the online ones in its state; statistics and norm
    calibration are those of the average. A finished run holds both as folders.
    """
    from safetensors.torch import load_file

    from csdiff.adapters import AutoAdapter
    from csdiff.training.run_folder import METRICS_NAME

    folder, encoders = absolute(source), {"text_encoder": config.text_encoder, "image_encoder": config.image_encoder}
    if config.weights == "online" and (folder / "online" / "config.json").is_file():
        return AutoAdapter.from_pretrained(folder / "online", **encoders)
    adapter = AutoAdapter.from_pretrained(source, **encoders)
    training = adapter.metadata.get("training") or {}
    if config.weights == training.get("weights", "average"):
        return adapter
    state = folder / "state" / "weights.safetensors"
    if config.weights == "average" or not state.is_file():
        raise CSDiffError(
            f"weights: expected {config.weights} weights in {source}, found {training.get('weights') or 'no word'} of "
            "them; give the training run, or one of its checkpoints."
        )
    parameters = dict(adapter.named_parameters())
    names = {name.removeprefix(ONLINE): name for name in read_safetensors_header(state) if name.startswith(ONLINE)}
    if not names or not names.keys() <= parameters.keys():
        odd = sorted(names.keys() - parameters.keys())[:3]
        raise CSDiffError(f"{state}: expected the weights of a {type(adapter).__name__}, found {odd or 'none'}.")
    tensors = load_file(state)
    for name, stored in names.items():
        parameters[name].data.copy_(tensors[stored])
    lines = read_jsonl(folder.parent.parent / METRICS_NAME)
    measured = [line for line in lines if line.get("kind") == "validation" and line["step"] == training.get("steps")]
    adapter.metadata["training"]["weights"] = "online"
    adapter.metadata["metrics"] = measured[-1].get("online") or {} if measured else {}
    return adapter


def _merged_writer(adapter, output: Path):
    """The adapter's merged text encoder in `text_encoder`, and the map after it as an adapter that names it."""
    from csdiff.embeddings import load_text_encoder
    from csdiff.embeddings.fingerprint import weights_sha256

    def write(folder: Path) -> None:
        merged, prior, place = adapter.merged_text_encoder(), adapter.as_prior(), folder / "text_encoder"
        named = adapter.metadata.get("text_encoder") or {}
        merged.save_pretrained(place)
        load_text_encoder(named.get("id") or adapter.config.text_encoder).tokenizer.save_pretrained(place)
        known = {"id": str(output.absolute() / "text_encoder"), "weights_sha256": weights_sha256(place, "text")}
        prior.metadata["text_encoder"] = {**named, **known, "revision": None}
        prior.save_pretrained(folder)

    return write


def _pipeline_writer(config: ExportConfig, adapter, dtype, name: str):
    """A stock pipeline of the adapter, its encoders and, if it is to be whole, a decoder."""
    from csdiff.pipelines.decoders import AdapterCard, check_pairing, resolve_decoder

    card, decoder = AdapterCard(Path(config.source), dict(adapter.config), adapter.metadata), None
    if config.format == "pipeline":
        decoder = resolve_decoder(config.decoder)
        if decoder.hand_over != "kandinsky":
            raise CSDiffError(
                f"decoder: expected a Kandinsky 2.2 decoder for a pipeline folder, found {decoder.class_name} in "
                f"{decoder.source}; `csdiff generate` and load_adapter drive the other ones."
            )
        check_pairing(card, decoder)
    pipe = _pipeline(adapter, card, decoder, dtype)
    metadata = adapter.metadata
    # Encoders keep their identity in another number format; a merged text encoder is another one.
    towers = ("image_encoder",) if adapter.uses_input_ids else ("text_encoder", "image_encoder")
    known = {"format": 1, "kind": "pipeline", **{key: metadata.get(key) for key in (*towers, "tokenizer")}}

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder, safe_serialization=True)
        write_json(folder / "csdiff.json", known)
        (folder / "README.md").write_text(_card(name, pipe, adapter), encoding="utf-8")

    return write


def _pipeline(adapter, card, decoder, dtype):
    from diffusers import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline

    from csdiff.embeddings import load_image_encoder, load_text_encoder
    from csdiff.embeddings.encoders import find_encoder
    from csdiff.pipelines.embedding import text_encoder_options
    from csdiff.pipelines.loading import load_adapter
    from csdiff.pipelines.scheduler import OneShotScheduler

    named = {
        tower: find_encoder(card.metadata.get(f"{tower}_encoder"), tower, of="format: the adapter's csdiff.json")
        for tower in ("text", "image")
    }
    text = load_text_encoder(named["text"]["id"], dtype=dtype, **text_encoder_options(named["text"], card))
    if text.pooling != "projection":
        raise CSDiffError(
            f"format: expected a CLIP text encoder, whose projection a prior pipeline reads, found "
            f"{named['text']['id']} with {text.pooling} pooling; use --format adapter."
        )
    image = load_image_encoder(named["image"]["id"], dtype=dtype, revision=named["image"].get("revision"))
    # the adapter stands in for itself until `load_adapter` has checked it and chosen the scheduler
    pipe = KandinskyV22PriorPipeline(
        prior=adapter,
        image_encoder=image.model,
        text_encoder=text.model,
        tokenizer=text.tokenizer,
        scheduler=OneShotScheduler(),
        image_processor=image.processor,
    )
    pipe = load_adapter(pipe, adapter)
    if decoder is None:
        return pipe
    parts = KandinskyV22Pipeline.from_pretrained(decoder.source, dtype=dtype, use_safetensors=True)
    prior = {f"prior_{name}": part for name, part in pipe.components.items()}
    return KandinskyV22CombinedPipeline(unet=parts.unet, scheduler=parts.scheduler, movq=parts.movq, **prior)


_CARD = """\
---
license: {license}
library_name: diffusers
tags: [csdiff, unclip, prior]
---

# {name}

A `{pipeline}` whose prior is a csdiff `{prior}`. diffusers takes classes of other packages only from imported modules,
so import csdiff's first:

```python
from diffusers import {loader}

import {module}, csdiff.pipelines.scheduler

pipe = {loader}.from_pretrained("PATH")
result = pipe("a red apple")
```
"""


def _card(name: str, pipe, adapter) -> str:
    """A README that says how to load the folder."""
    whole = hasattr(pipe, "prior_prior")
    prior = pipe.prior_prior if whole else pipe.prior
    return _CARD.format(
        license=adapter.metadata.get("license") or "apache-2.0",
        name=name,
        pipeline=type(pipe).__name__,
        prior=type(prior).__name__,
        module=type(prior).__module__,
        loader="AutoPipelineForText2Image" if whole else type(pipe).__name__,
    )
