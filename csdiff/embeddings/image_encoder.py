"""Images to image embeddings with a transformers vision model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from csdiff.embeddings.encoders import EncoderFiles, load_config, load_weights, quiet_loading
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.errors import CSDiffError

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ImageEncoding:
    """What an image encoder makes of B images.

    Attributes:
        embeds: `(B, D)` embeddings, raw: never normalised.
        tokens: `(B, V, H)` last hidden states, the class token first.
    """

    embeds: Tensor
    tokens: Tensor


class ImageEncoder:
    """A frozen image encoder with its image processor; made by `load_image_encoder`.

    Attributes:
        dim: D, width of the embeddings.
        tokens_dim: H, width of the token states.
    """

    def __init__(self, model, processor, id: str, files: EncoderFiles):
        self.model, self.processor, self.id, self.files = model, processor, id, files
        self.is_clip = hasattr(model, "visual_projection")
        self.tokens_dim: int = model.config.hidden_size
        self.dim: int = model.config.projection_dim if self.is_clip else self.tokens_dim

    @classmethod
    def load(cls, id, files, *, device=None, dtype=None) -> ImageEncoder:
        model_class, processor = cls.inspect(id, files)
        model = load_weights(model_class, files, id, device, dtype)
        if model.main_input_name != "pixel_values" or not hasattr(model.config, "hidden_size"):
            kind = model.config.model_type
            raise CSDiffError(f"{id}: expected an image encoder, found a {kind} model; choose another.")
        return cls(model, processor, id, files)

    @staticmethod
    def inspect(id: str, files: EncoderFiles) -> tuple:
        """Everything about an encoder but its weights: model class and image processor.

        Raises:
            CSDiffError: No image processor.
        """
        from transformers import AutoImageProcessor, AutoModel, CLIPVisionModelWithProjection

        is_clip = load_config(id, files).model_type in ("clip", "clip_vision_model")
        with quiet_loading():
            try:
                # One resize for everybody, whether torchvision is installed or not.
                processor = AutoImageProcessor.from_pretrained(files.processor, backend="pil", local_files_only=True)
            except (OSError, ValueError, KeyError) as error:
                raise CSDiffError(
                    f"{id}: expected an image processor in {files.processor}, found none ({error})."
                ) from error
        return (CLIPVisionModelWithProjection if is_clip else AutoModel), processor

    @property
    def device(self) -> torch.device:
        return self.model.device

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """Pixel values (B, 3, S, S) on the CPU: resized, cropped and normalised as the encoder wants them."""
        rgb = [image if image.mode == "RGB" else image.convert("RGB") for image in images]
        return self.processor(images=rgb, return_tensors="pt")["pixel_values"]

    def blank(self) -> Tensor:
        """Pixel values (3, S, S) of a black image."""
        from PIL import Image

        return self.preprocess([Image.new("RGB", (64, 64))])[0]

    def forward(self, pixel_values: Tensor) -> ImageEncoding:
        """Encode pixel values; differentiable when the model's weights are."""
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
        """Token states (B, V, H) in the space of the embeddings (B, V, D); as they are without a projection."""
        if not self.is_clip:
            return tokens
        return self.model.visual_projection(self.model.vision_model.post_layernorm(tokens))

    def describe(self, weights: bool = True) -> dict:
        """This encoder's part of a `csdiff.json`; without `weights` what needs no reading of the files."""
        identity = {}
        if weights:
            identity = {"id": self.id, "revision": self.files.revision, "weights_sha256": self._weights_sha256}
        return {
            **identity,
            "dim": self.dim,
            "class": type(self.model).__name__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
        }

    def describe_preprocessing(self) -> dict:
        """The image processor's part of a `csdiff.json`."""
        return json.loads(self.processor.to_json_string())

    @cached_property
    def _weights_sha256(self) -> str:
        return weights_sha256(self.files.model, "image" if self.is_clip else None)
