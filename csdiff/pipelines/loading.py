"""Adapters and the pipelines of diffusers: in the place of a prior, or as arguments of an IP-Adapter."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any, get_type_hints

import diffusers
import torch
from torch import Tensor

from csdiff.embeddings.fingerprint import HUB_CACHE, weights_sha256
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.pipelines.decoders import check_encoders
from csdiff.pipelines.scheduler import EmbeddingPrior, OneShotScheduler, is_one_shot


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
    if is_one_shot(adapter) and isinstance(pipe, diffusers.KandinskyV22PriorEmb2EmbPipeline):
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


def load_karlo(
    adapter=None,
    repo: str | os.PathLike = "kakaobrain/karlo-v1-alpha",
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    use_safetensors: bool = True,
    check: bool = True,
    **components,
):
    """Loads Karlo's `UnCLIPPipeline` with an adapter in place of its diffusion prior.

    `UnCLIPPipeline.from_pretrained` does not work since diffusers 0.38: Karlo's index names a module that has moved.
    Every component still loads by itself, and the constructor takes them. The prior's own weights are not read when
    an adapter is given.

    Args:
        adapter: an adapter, its folder, or a loaded `PriorTransformer`; None keeps Karlo's own prior.
        repo: hub id or folder with Karlo's subfolders.
        dtype: of the weights.
        revision: of the hub repository.
        use_safetensors: False also reads weights in PyTorch's own format (which diffusers loads without running code
            in them).
        check: refuse an adapter that does not fit (see `load_adapter`).
        **components: components already loaded (`decoder=`, `text_encoder=`, ...); they are used as they are.

    Returns:
        An `UnCLIPPipeline`.

    Raises:
        CSDiffError: the adapter does not fit.
        OSError: a component's folder is missing or incomplete.
    """
    loaded = dict(components)
    # The constructor says of what class every component is.
    for name, cls in get_type_hints(diffusers.UnCLIPPipeline.__init__).items():
        if name in loaded or (name == "prior" and adapter is not None):
            continue
        options = {"subfolder": name} | ({"revision": revision} if revision else {})
        if issubclass(cls, torch.nn.Module):
            options |= {"dtype": dtype, "use_safetensors": use_safetensors}
        loaded[name] = cls.from_pretrained(repo, **options)
    # a placeholder of the right width, so that the adapter is checked against what the decoder takes
    loaded.setdefault("prior", EmbeddingPrior(embedding_dim=loaded["text_proj"].config.clip_embeddings_dim))
    pipe = diffusers.UnCLIPPipeline(**loaded)
    return pipe if adapter is None else load_adapter(pipe, adapter, check=check)


def ip_adapter_image_embeds(
    image_embeds: Tensor,
    negative_image_embeds: Tensor | None = None,
    *,
    guidance: bool = True,
    blend: bool = False,
) -> list[Tensor]:
    """Shapes one image embedding for the argument `ip_adapter_image_embeds` of Stable Diffusion 1.5 and SDXL.

    diffusers gives every prompt of a call all the image prompts of the call, so several prompts are several calls.

    Args:
        image_embeds: Raw image embedding of one image, `(D,)` or `(1, D)`; with `blend` `(n, D)`.
        negative_image_embeds: The negative, as `image_embeds` or one row; zeros by default, what IP-Adapter is trained
            with.
        guidance: Whether the call uses classifier-free guidance (a guidance scale above 1). diffusers then splits
            the tensor in two and expects the negative half first.
        blend: Let one image be prompted by all `n` rows.

    Returns:
        A list (one IP-Adapter) of one tensor `(2, n, D)`, or `(1, n, D)` without guidance.

    Raises:
        CSDiffError: several rows without `blend`, or other shapes than these.

    Source:
        Ye et al., "IP-Adapter" (arXiv 2308.06721); `prepare_ip_adapter_image_embeds` in diffusers.
    """
    positive = torch.atleast_2d(image_embeds)
    if positive.ndim != 2:
        raise CSDiffError(f"image_embeds: expected (D,) or (n, D), found {tuple(image_embeds.shape)}.")
    if len(positive) > 1 and not blend:
        raise CSDiffError(
            f"image_embeds: expected one embedding a call, found {len(positive)}: the pipeline would show all of them "
            "to every prompt; call it once for each row, or give blend=True for one image of them all."
        )
    if not guidance:
        return [positive[None]]
    negative = torch.zeros_like(positive) if negative_image_embeds is None else torch.atleast_2d(negative_image_embeds)
    if negative.shape[-1] != positive.shape[-1] or negative.shape[0] not in (1, positive.shape[0]):
        raise CSDiffError(
            f"negative_image_embeds: expected {tuple(positive.shape)}, found {tuple(negative_image_embeds.shape)}."
        )
    return [torch.stack([negative.to(positive).expand_as(positive), positive])]


def ip_adapter_arguments(
    pipe,
    image_embeds: Tensor,
    negative_image_embeds: Tensor | None = None,
    *,
    guidance: bool = True,
    blend: bool = False,
) -> dict[str, Any]:
    """The arguments by which a pipeline takes one image embedding beside the prompt.

    Args:
        pipe: Any pipeline with an IP-Adapter that takes pooled embeddings (Stable Diffusion 1.5, SDXL, AnimateDiff and
            their image-to-image, inpainting and ControlNet kinds: one list, negative first; FLUX.1 and its kinds: two
            lists), or `StableCascadePriorPipeline` (one tensor).
        image_embeds: See `ip_adapter_image_embeds`.
        negative_image_embeds: The same. FLUX.1 reads it only with `true_cfg_scale` above 1, Stable Cascade never.
        guidance: Whether the call uses a `guidance_scale` above 1; FLUX.1 does not care.
        blend: Let one image be prompted by all rows of `image_embeds`.

    Raises:
        CSDiffError: as `ip_adapter_image_embeds`; a pipeline of another kind.

    Usage:
        >>> image = pipe("a red apple", **ip_adapter_arguments(pipe, prior("a red apple").image_embeds)).images[0]
    """
    names = inspect.signature(pipe.__call__).parameters
    if "negative_ip_adapter_image_embeds" in names:
        negative = torch.zeros_like(image_embeds) if negative_image_embeds is None else negative_image_embeds
        both = {"ip_adapter_image_embeds": image_embeds, "negative_ip_adapter_image_embeds": negative}
        return {name: ip_adapter_image_embeds(rows, guidance=False, blend=blend) for name, rows in both.items()}
    if "ip_adapter_image_embeds" in names:
        embeds = ip_adapter_image_embeds(image_embeds, negative_image_embeds, guidance=guidance, blend=blend)
        return {"ip_adapter_image_embeds": embeds}
    if type(pipe).__name__ == "StableCascadePriorPipeline":
        return {"image_embeds": ip_adapter_image_embeds(image_embeds, guidance=False, blend=blend)[0]}
    raise CSDiffError(
        f"Expected a pipeline with an IP-Adapter or StableCascadePriorPipeline, found {type(pipe).__name__}; "
        "docs/decoders.md says how the others take image embeddings."
    )


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
    options = {"prediction_type": "sample", "clip_sample_range": 10.0}
    if (names["prior"], names["text_encoder"]) == ("prior", "prior_text_encoder"):
        # stable unCLIP does not say which step comes next, so UnCLIPScheduler would take steps of one
        return diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", **options)
    return diffusers.UnCLIPScheduler(**options)


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
