"""Image embeddings in the shape that IP-Adapter pipelines take."""

import torch

from csdiff.errors import CSDiffError


def ip_adapter_image_embeds(
    image_embeds: torch.Tensor,
    negative_image_embeds: torch.Tensor | None = None,
    *,
    guidance: bool = True,
    dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Shapes image embeddings for the argument `ip_adapter_image_embeds` of Stable Diffusion 1.5 and SDXL.

    diffusers gives every prompt of a call the same image prompt, so one call draws one embedding: pass the rows one
    by one, or several rows to let one picture be prompted by all of them.

    Args:
        image_embeds: raw image embeddings of one picture, `(D,)` or `(n, D)` for `n` image prompts.
        negative_image_embeds: the negatives, `(D,)` or `(n, D)`; zeros by default, what IP-Adapter is trained with.
        guidance: whether the call uses classifier-free guidance (a guidance scale above 1). diffusers then splits
            the tensor in two and expects the negative half first.
        dtype: of the result; that of `image_embeds` by default.

    Returns:
        A list (one IP-Adapter) of one tensor `(2, n, D)`, or `(1, n, D)` without guidance.

    Raises:
        CSDiffError: other shapes than these.

    Source:
        Ye et al., "IP-Adapter" (arXiv 2308.06721); `prepare_ip_adapter_image_embeds` in diffusers.
    """
    positive = torch.atleast_2d(image_embeds)
    if positive.ndim != 2:
        raise CSDiffError(f"image_embeds: expected (D,) or (n, D), found {tuple(image_embeds.shape)}.")
    rows = [positive]
    if guidance:
        negative = (
            torch.zeros_like(positive) if negative_image_embeds is None else torch.atleast_2d(negative_image_embeds)
        )
        if negative.shape[-1] != positive.shape[-1] or negative.shape[0] not in (1, positive.shape[0]):
            raise CSDiffError(
                f"negative_image_embeds: expected {tuple(positive.shape)}, found {tuple(negative_image_embeds.shape)}."
            )
        rows.insert(0, negative.to(positive).expand_as(positive))
    return [torch.stack(rows).to(dtype or image_embeds.dtype)]
