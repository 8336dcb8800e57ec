"""Images to image embeddings with a transformers vision model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csdiff.embeddings.encoders import Encoder, EncoderFiles, encoder_files, load_config, load_weights, quiet_loading
from csdiff.errors import CSDiffError

if TYPE_CHECKING:
    from PIL.Image import Image


# Types of models with an image tower, whole or that tower alone, and its class.
VISION_TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
VISION_TOWERS |= {"siglip2": "Siglip2VisionModel"}


@dataclass(frozen=True)
class ImageEncoding:
    """What an image encoder makes of B images.

    Attributes:
        embeds: `(B, D)` embeddings, raw: never normalised.
        tokens: `(B, V, H)` last hidden states, the class token first.
    """

    embeds: Tensor
    tokens: Tensor


class ImageEncoder(Encoder):
    """A frozen image encoder with its image processor; made by `load_image_encoder`.

    Pixel values are one tensor for every encoder, so that images make batches. Encoders of images of any shape
    (SigLIP 2 NaFlex) take P patches, their mask and their grid instead: these are its last three columns.

    Attributes:
        dim: D, width of the embeddings.
        tokens_dim: H, width of the token states.
    """

    tower = "image"

    def __init__(self, model, processor, files: EncoderFiles):
        super().__init__(model, files)
        self.processor = processor
        self.is_clip = hasattr(model, "visual_projection")
        self.takes_patches = model.config.model_type == "siglip2_vision_model"
        self.tokens_dim: int = model.config.hidden_size
        self.dim: int = model.config.projection_dim if self.is_clip else self.tokens_dim

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """Pixel values (B, 3, S, S) or (B, P, F + 3), on the CPU: resized, cropped and normalised for the encoder."""
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
        values = self.processor(images=rgb, return_tensors="pt")
        pixels = values["pixel_values"]
        if not self.takes_patches:
            return pixels
        grids = values["spatial_shapes"][:, None].expand(-1, pixels.shape[1], -1)
        return torch.cat([pixels, values["pixel_attention_mask"][..., None].to(pixels), grids.to(pixels)], dim=-1)

    def blank(self) -> Tensor:
        """Pixel values (3, S, S) of a black image."""
        from PIL import Image

        return self.preprocess([Image.new("RGB", (64, 64))])[0]

    def forward(self, pixel_values: Tensor) -> ImageEncoding:
        """Encode pixel values; differentiable when the model's weights are."""
        if self.takes_patches:
            pixels, mask, grids = pixel_values.to(self.device).split([pixel_values.shape[-1] - 3, 1, 2], dim=-1)
            output = self.model(pixels.to(self.model.dtype), mask[..., 0].long(), grids[:, 0].long())
        else:
            output = self.model(pixel_values.to(self.device, self.model.dtype))
        tokens = output.last_hidden_state
        if self.is_clip:
            return ImageEncoding(output.image_embeds, tokens)
        pooled = output.get("pooler_output")
        return ImageEncoding(tokens.mean(1) if pooled is None else pooled, tokens)

    @torch.no_grad()
    def encode(self, images: Sequence[Image]) -> ImageEncoding:
        """Encode images."""
        return self.forward(self.preprocess(images))

    def project(self, tokens: Tensor) -> Tensor:
        """Token states (B, V, H) in the space of the embeddings (B, V, D); as they are without a projection.

        Raises:
            CSDiffError: The encoder pools its tokens by attention, and single ones have no place among the embeddings.
        """
        if getattr(self.model, "use_head", False):
            raise CSDiffError(
                f"{self.id} pools its image tokens by attention, and single ones cannot be compared with text; leave "
                "the token term out (token_weight 0)."
            )
        if not self.is_clip:
            return tokens
        return self.model.visual_projection(self.model.vision_model.post_layernorm(tokens))

    def describe_preprocessing(self) -> dict:
        """The image processor's part of a `csdiff.json`."""
        return json.loads(self.processor.to_json_string())


def load_image_encoder(
    id: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    *,
    revision: str | None = None,
) -> ImageEncoder:
    """Load an image encoder: a vision tower of CLIP or SigLIP, or another vision model with a pooled output.

    Args:
        id: "tiny-clip", a folder (of a model, or of a diffusers pipeline that has an image encoder), or a hub id.
        device: Where to put it; the CPU by default.
        dtype: Of the weights; by default the checkpoint's own, float32 on the CPU.
        revision: Branch, tag or commit on the hub.

    Raises:
        CSDiffError: Nothing there, not an image encoder, weights missing, or pickled weights.
    """
    files = encoder_files(id, "image", revision)
    model_class, processor = inspect_image_encoder(files)
    model = load_weights(model_class, files, device, dtype)
    if model.main_input_name != "pixel_values" or not hasattr(model.config, "hidden_size"):
        raise CSDiffError(f"{id}: expected an image encoder, found a {model.config.model_type} model.")
    return ImageEncoder(model, processor, files)


def inspect_image_encoder(files: EncoderFiles) -> tuple[type, object]:
    """Everything about an image encoder but its weights: model class and image processor."""
    import transformers

    kind = load_config(files).model_type
    model_class = VISION_TOWERS.get(kind.removesuffix("_vision_model"), "AutoModel")
    # One resize for everybody, whether torchvision is installed or not.
    options = {"backend": "pil", "local_files_only": True}
    with quiet_loading():
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(files.processor, **options)
        except (OSError, ValueError, KeyError) as error:
            where = f"{files.id}: expected an image processor in {files.processor}"
            raise CSDiffError(f"{where}, found none ({error}).") from error
    return getattr(transformers, model_class), processor
