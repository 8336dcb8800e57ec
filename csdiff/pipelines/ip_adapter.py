"""Image embeddings as IP-Adapter pipelines take them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from csdiff.errors import CSDiffError


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
