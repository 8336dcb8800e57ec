"""Putting an adapter into a pipeline object that has a prior."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from csdiff.embeddings.fingerprint import HUB_CACHE, weights_sha256
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.pipelines.decoders import check_encoders
from csdiff.pipelines.scheduler import OneShotScheduler, is_one_shot


def load_adapter(pipe, adapter: str | os.PathLike | torch.nn.Module, *, check: bool = True):
    """Puts an adapter into a pipeline that has a prior, and returns the pipeline.

    The adapter becomes the prior, and `OneShotScheduler` its scheduler, which makes one step of the 25 that are asked
    for. The guidance of 4 with which these pipelines call their prior has no effect on one-shot adapters (see
    `Adapter.post_process_latents`): `pipe("a red apple")` is right as it stands. An adapter that changes the text
    encoder (LoRA) brings it along, merged. A diffusion adapter gets the scheduler it was trained for.

    Args:
        pipe: `KandinskyV22PriorPipeline`, a Kandinsky 2.2 combined pipeline (text to image, image to image,
            inpainting), `StableUnCLIPPipeline`, `UnCLIPPipeline` (see `load_karlo`), or any pipeline with the same
            parts. It is changed in place.
        adapter: an adapter, its folder, or a hub repository.
        check: refuse an adapter whose dimensions or encoders are not the pipeline's.

    Returns:
        `pipe`.

    Raises:
        CSDiffError: the pipeline has no prior, its prior must start from a picture, or the adapter was trained for
            other dimensions or other encoders.

    Usage:
        >>> pipe = AutoPipelineForText2Image.from_pretrained("kandinsky-community/kandinsky-2-2-decoder")
        >>> image = csdiff.load_adapter(pipe, "runs/my-adapter")("a red apple").images[0]
    """
    names = _prior_parts(pipe)
    if isinstance(adapter, (str, os.PathLike)):
        from csdiff.adapters import AutoAdapter

        adapter = AutoAdapter.from_pretrained(adapter)
    from diffusers import KandinskyV22PriorEmb2EmbPipeline

    if is_one_shot(adapter) and isinstance(pipe, KandinskyV22PriorEmb2EmbPipeline):
        raise CSDiffError(
            "KandinskyV22PriorEmb2EmbPipeline starts denoising at a picture, which an adapter that answers in one "
            "pass would not look at: mix prompts and pictures with CSDiffPriorPipeline.interpolate instead."
        )
    if check:
        _check(pipe, names, adapter)

    parts = {}
    if getattr(adapter, "uses_input_ids", False):
        if names["scheduler"] == "prior_scheduler" and names["text_encoder"] == "text_encoder":
            raise CSDiffError(
                f"{type(pipe).__name__} reads one text encoder for prior and decoder, and this adapter brings its "
                "own; use `csdiff generate`, which keeps them apart, or an adapter without a text encoder."
            )
        # without PEFT, so that the pipeline saves and reloads as a stock one
        parts[names["text_encoder"]], adapter = adapter.merged_text_encoder(), adapter.as_prior()
    parts[names["prior"]] = adapter
    text_encoder = getattr(pipe, names["text_encoder"])
    for model in parts.values():
        model.to(text_encoder.device)
        # diffusers warns of every cast, also of one to the dtype that is there
        if model.dtype != text_encoder.dtype:
            model.to(dtype=text_encoder.dtype)
    parts[names["scheduler"]] = OneShotScheduler() if is_one_shot(adapter) else _diffusion_scheduler(names)
    pipe.register_modules(**parts)
    inner = getattr(pipe, "prior_pipe", None)
    if inner is not None:
        inner.register_modules(**{name.removeprefix("prior_"): part for name, part in parts.items()})
    return pipe


def _prior_parts(pipe) -> dict[str, str | None]:
    """Names under which a pipeline keeps the parts of its prior; CSDiffError where it has none."""
    components, names = getattr(pipe, "components", {}), {}
    for part in ("prior", "scheduler", "text_encoder", "image_encoder"):
        names[part] = next((name for name in (f"prior_{part}", part) if name in components), None)
    if None in (names["prior"], names["scheduler"], names["text_encoder"]):
        raise CSDiffError(
            f"load_adapter: expected a pipeline with a prior (see its docstring), found {type(pipe).__name__}; hand "
            "it `image_embeds` from CSDiffPriorPipeline instead."
        )
    return names


def _diffusion_scheduler(names: dict):
    """For adapters that denoise: whitened embeddings reach beyond the [-1, 1] to which schedulers clip by default."""
    from diffusers import DDPMScheduler, UnCLIPScheduler

    if (names["prior"], names["text_encoder"]) == ("prior", "prior_text_encoder"):
        # stable unCLIP does not say which step comes next, so UnCLIPScheduler would take steps of one
        return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample_range=10.0)
    return UnCLIPScheduler(prediction_type="sample", clip_sample_range=10.0)


def _check(pipe, names: dict, adapter):
    known = {}
    for tower in ("text", "image"):
        encoder = getattr(pipe, names[f"{tower}_encoder"] or "", None)
        width = getattr(getattr(encoder, "config", None), "projection_dim", None)
        known[tower] = width, _identity(encoder, tower)
    old = getattr(pipe, names["prior"])
    if known["image"][0] is None and old is not None:
        known["image"] = old.config.embedding_dim, known["image"][1]
    check_encoders(adapter.config, getattr(adapter, "metadata", None) or {}, type(pipe).__name__, **known)


def _identity(encoder, tower: str) -> dict | None:
    """Where a loaded transformers model came from and, for a local folder, the hash of its weights.

    Of an encoder in the folder of a pipeline that states its encoders, what is stated there: a copy in another number
    format has other bytes.
    """
    origin = getattr(getattr(encoder, "config", None), "_name_or_path", None)
    if not origin:
        return None
    folder = Path(origin)
    beside = folder.parent / "csdiff.json"
    if beside.is_file() and (known := read_json(beside).get(f"{tower}_encoder")):
        return known
    # what the hub's cache holds is known by its name
    if HUB_CACHE.search(origin) or not any(folder.glob("*.safetensors")):
        return {"id": origin}
    return {"id": origin, "weights_sha256": weights_sha256(folder, tower)}
