"""`csdiff export`: the adapter of a run as a folder of its own, as a complete diffusers pipeline, or on the hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from csdiff.errors import CSDiffError
from csdiff.files import absolute, read_jsonl, write_json, writing_folder
from csdiff.kinds import kind_of

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
    """What was exported; None is what the adapter does not say, and an `output` or `url` that was not asked for."""

    output: Path | None
    source: str
    format: str
    adapter: str
    weights: str | None
    step: int | None
    dtype: str
    url: str | None


def export(config: ExportConfig) -> ExportResult:
    """Writes an adapter as a folder of its own, or as a pipeline with its encoders.

    Everything is looked at before anything is written, and the folder appears when it is whole.

    Raises:
        CSDiffError: No adapter there, a folder in the way, weights that do not fit the number format, encoders or a
            decoder that are not there or do not fit, or a hub that refuses.
        OSError: The place cannot be written.
    """
    import torch

    from csdiff import hub
    from csdiff.options import check_options

    check_options(config)
    source, repo = _find_adapter(config), config.push_to_hub
    output = _check_output(config, source)
    adapter = _load(source, config)
    kind, training = type(adapter).__name__, adapter.metadata.get("training") or {}
    if config.merge_lora and not adapter.uses_input_ids:
        raise CSDiffError(f"merge_lora: expected a LoRA adapter, found a {kind}; leave it out.")
    dtype = getattr(torch, DTYPES.get(config.dtype, config.dtype)) if config.dtype else adapter.dtype
    torch.nn.Module.to(adapter, dtype)
    if not all(tensor.isfinite().all() for tensor in adapter.state_dict().values()):
        raise CSDiffError(f"dtype: weights of {source} are beyond the range of {dtype}; use bfloat16.")
    write = partial(adapter.save_pretrained, card_location=repo or ".")
    if config.format != "adapter":
        write = _pipeline_writer(config, adapter, dtype)
    elif config.merge_lora:
        if output is None or repo:
            raise CSDiffError(
                "merge_lora: an adapter folder names its merged text encoder by place, which a hub repository cannot; "
                "push it with --format prior."
            )
        write = partial(_write_merged, adapter, output)
    if output is not None:
        with writing_folder(output, whole=True) as aside:
            write(aside)
    url = hub.push(repo, write, commit_message=f"Upload {kind}", private=config.private) if repo else None
    words = training.get("weights"), training.get("steps"), str(dtype).removeprefix("torch.")
    return ExportResult(output, str(source), config.format, kind, *words, url and str(url))


def _find_adapter(config: ExportConfig) -> str | Path:
    """The adapter folder that is meant, or the hub repository as it is."""
    from csdiff.training.run_folder import Checkpoints

    if not config.source:
        raise CSDiffError("source: expected a training run, checkpoint or adapter folder, found nothing; name one.")
    run, wanted = Path(config.source), config.checkpoint
    if kind_of(run) != "run":
        if wanted is not None:
            raise CSDiffError(f"checkpoint: expected a training run (with training.yaml), found {config.source}.")
        return run if run.exists() else config.source
    if wanted is None and (run / "config.json").is_file():
        return run
    checkpoints = Checkpoints(run / "checkpoints")
    number = (wanted or "").removeprefix("step-")
    found = checkpoints.path(int(number)) if number.isdecimal() else checkpoints.named(wanted or "latest")
    if found is None or not found.is_dir():
        steps = ", ".join(map(str, checkpoints.steps())) or "none yet"
        raise CSDiffError(
            f"checkpoint: expected best, latest or a step of those in {checkpoints.folder} ({steps}), found "
            f"{wanted or 'none'}."
        )
    return found


def _check_output(config: ExportConfig, source: str | Path) -> Path | None:
    if not config.output:
        if config.push_to_hub:
            return None
        raise CSDiffError("output: expected a folder to write, found none; give --output DIR or --push_to_hub ID.")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise CSDiffError(f"output: expected a folder, found the file {output}; give another --output.")
    if output.is_dir() and any(output.iterdir()):
        inside = Path(source).exists() and absolute(source).is_relative_to(absolute(output))
        if kind_of(output) not in ("adapter", "pipeline") or inside:
            raise CSDiffError(
                f"output: {output} is not an exported adapter or pipeline, or holds the adapter that is exported, and "
                "is not replaced; give another --output."
            )
        if not config.overwrite:
            raise CSDiffError(f"output: {output} is not empty; give another --output, or --overwrite to replace it.")
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
    for name, tensor in load_file(state).items():
        if name.startswith(ONLINE):
            parameters[name.removeprefix(ONLINE)].data.copy_(tensor)
    lines = read_jsonl(folder.parent.parent / METRICS_NAME)
    measured = [line for line in lines if (line.get("kind"), line["step"]) == ("validation", training.get("steps"))]
    adapter.metadata["training"]["weights"] = "online"
    adapter.metadata["metrics"] = measured[-1].get("online") or {} if measured else {}
    return adapter


def _write_merged(adapter, output: Path, folder: Path) -> None:
    """The adapter's merged text encoder in `text_encoder`, and the map after it as an adapter that names it."""
    from csdiff.embeddings import load_text_encoder
    from csdiff.embeddings.fingerprint import weights_sha256

    prior, place = adapter.as_prior(), folder / "text_encoder"
    named = adapter.metadata.get("text_encoder") or {}
    adapter.merged_text_encoder().save_pretrained(place)
    load_text_encoder(named.get("id") or adapter.config.text_encoder).tokenizer.save_pretrained(place)
    known = {"id": str(output.absolute() / "text_encoder"), "weights_sha256": weights_sha256(place, "text")}
    prior.metadata["text_encoder"] = {**named, **known, "revision": None}
    prior.save_pretrained(folder)


def _pipeline_writer(config: ExportConfig, adapter, dtype) -> Callable[[Path], None]:
    """A stock pipeline of the adapter, its encoders and, if it is to be whole, a decoder."""
    from diffusers import KandinskyV22CombinedPipeline, KandinskyV22Pipeline, KandinskyV22PriorPipeline

    from csdiff.pipelines.decoders import AdapterCard, check_pairing, resolve_decoder
    from csdiff.pipelines.loading import load_adapter
    from csdiff.pipelines.prior import load_encoders

    metadata, decoder, call = adapter.metadata, None, _EMBED
    if config.format == "pipeline":
        decoder = resolve_decoder(config.decoder)
        if decoder.hand_over != "kandinsky":
            raise CSDiffError(
                f"decoder: expected a Kandinsky 2.2 decoder for a pipeline folder, found {decoder.class_name} in "
                f"{decoder.source}; `csdiff generate` and load_adapter drive the other ones."
            )
        check_pairing(AdapterCard(Path(config.source), dict(adapter.config), metadata), decoder)
    parts = load_encoders(metadata, "format: the adapter's csdiff.json", dtype)
    # Refuses encoders whose weights have changed.
    pipe = load_adapter(KandinskyV22PriorPipeline(prior=None, scheduler=None, **parts), adapter)
    if decoder is not None:
        parts = KandinskyV22Pipeline.from_pretrained(decoder.source, dtype=dtype, use_safetensors=True).components
        pipe = KandinskyV22CombinedPipeline(
            **parts, **{f"prior_{name}": part for name, part in pipe.components.items()}
        )
        # The pipeline's own default is 512 pixels whatever its UNet was trained on.
        side = (pipe.unet.config.sample_size or 0) * pipe.decoder_pipe.movq_scale_factor or 512
        call = _DRAW.format(side=side, steps=decoder.steps, guidance=float(decoder.guidance))
    prior = getattr(pipe, "prior_prior", None) or pipe.prior
    card = _CARD.format(
        license=f"license: {metadata['license']}\n" if metadata.get("license") else "",
        name=Path(config.output or config.push_to_hub).name,
        pipeline=type(pipe).__name__,
        prior=type(prior).__name__,
        module=type(prior).__module__,
        loader="AutoPipelineForText2Image" if decoder is not None else type(pipe).__name__,
        location=config.push_to_hub or ".",
        call=call,
    )
    # Encoders keep their identity in another number format; a merged text encoder is another one.
    towers = ("image_encoder",) if adapter.uses_input_ids else ("text_encoder", "image_encoder")
    known = {"format": 1, "kind": "pipeline", **{key: metadata.get(key) for key in (*towers, "tokenizer")}}

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder, safe_serialization=True)
        write_json(folder / "csdiff.json", known)
        (folder / "README.md").write_text(card, encoding="utf-8")

    return write


_CARD = """\
---
{license}library_name: diffusers
tags: [csdiff, unclip, prior]
---

# {name}

A `{pipeline}` whose prior is a csdiff `{prior}`.
diffusers takes classes of other packages only from imported modules, so import csdiff's first. An adapter that answers
in one step wants one step without guidance.

```python
from diffusers import {loader}

import {module}, csdiff.pipelines.scheduler

pipe = {loader}.from_pretrained("{location}")
{call}
```
"""
_EMBED = 'image_embeds, negative = pipe("a red apple", num_inference_steps=1, guidance_scale=1.0).to_tuple()'
_DRAW = """\
image = pipe(
    "a red apple",
    prior_num_inference_steps=1,
    prior_guidance_scale=1.0,
    height={side},
    width={side},
    num_inference_steps={steps},
    guidance_scale={guidance},
).images[0]
image.save("apple.png")"""
