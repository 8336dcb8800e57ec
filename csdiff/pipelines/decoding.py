"""Loading a decoder and drawing with it: one class for each way of handing over an image embedding."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import DecoderSource

Preview = Callable[[], Image.Image | None]
OnStep = Callable[[int, int, Preview], None]
"""Called after a step with its number from 1, the number of all, and what draws the image as it is now (None where the
pipeline shows nothing before the end). What it raises ends the drawing."""


@dataclass
class DrawingOptions:
    """What all images of a run share; `None` leaves it to the pipeline."""

    steps: int
    guidance: float
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None
    true_cfg: float = 1.0


class Decoder(ABC):
    """A decoder pipeline (`pipe`) and how it is called.

    Args:
        source: Where it is.
        dtype: Of its weights.
    """

    one_by_one = False
    """Whether a call shows all its image embeddings to every prompt, so that each image is a call of its own."""

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        self.source, self.dtype = source, dtype
        self.pipe = self._load()

    @abstractmethod
    def _load(self) -> Any:
        """The pipeline."""

    @abstractmethod
    def _arguments(
        self, prompts: list[str], image_embeds: Tensor, negative: Tensor | None, options: DrawingOptions
    ) -> dict[str, Any]:
        """How the pipeline is called for these prompts."""

    def _decode(self, latents: Tensor, options: DrawingOptions) -> Tensor:
        """Latents as pixels from -1 to 1, for a preview."""
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    def draw(
        self,
        prompts: list[str],
        image_embeds: Tensor,
        negative_image_embeds: Tensor | None,
        generators: list[torch.Generator],
        options: DrawingOptions,
        on_step: OnStep | None = None,
    ) -> list[Image.Image]:
        """Draws B images from raw image embeddings `(B, D)`.

        Args:
            prompts: B texts, for decoders that also read them.
            image_embeds: `(B, D)`.
            negative_image_embeds: `(B, D)`; None for the decoder's own.
            generators: B generators of the noise.
            options: What all images share.
            on_step: See `OnStep`; a preview shows the first image of the call.

        Raises:
            CSDiffError: an image is not finite; names the weights that are not, if there are such.
        """
        size = 1 if self.one_by_one else len(prompts)
        images = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            negative = None if negative_image_embeds is None else negative_image_embeds[rows]
            arguments = self._arguments(prompts[rows], image_embeds[rows], negative, options)
            with self._reporting(on_step, options, start // size, len(prompts) // size) as callback:
                drawn = self.pipe(**arguments, **callback, generator=generators[rows], output_type="np").images
            images.extend(drawn)
        for prompt, image in zip(prompts, images, strict=True):
            if not np.isfinite(image).all():
                raise CSDiffError(self._why_not_finite(prompt))
        return self.pipe.numpy_to_pil(np.stack(images))

    @contextmanager
    def _reporting(
        self, on_step: OnStep | None, options: DrawingOptions, call: int, calls: int
    ) -> Iterator[dict[str, Any]]:
        """Arguments that have the pipeline call `on_step`; pipelines without a callback are heard at their network."""
        if on_step is None:
            yield {}
            return

        def report(step: int, latents: Tensor | None) -> None:
            done = call * options.steps + min(step, options.steps)
            on_step(done, calls * options.steps, lambda: self._preview(latents, options))

        def modern(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            report(step + 1, tensors["latents"])
            return {}

        names = inspect.signature(self.pipe.__call__).parameters
        if "callback_on_step_end" in names:
            yield {"callback_on_step_end": modern}
        elif "callback" in names:
            # Called in the loop of a prior, too, whose latents are no image.
            yield {"callback": lambda step, timestep, latents: latents.ndim == 4 and report(step + 1, latents)}
        else:
            steps = iter(range(1, options.steps + 1))
            network = self.pipe.decoder
            hook = network.register_forward_hook(lambda *_: report(next(steps, options.steps), None))
            try:
                yield {}
            finally:
                hook.remove()

    @torch.no_grad()
    def _preview(self, latents: Tensor | None, options: DrawingOptions) -> Image.Image | None:
        if latents is None:
            return None
        pixels = self._decode(latents[:1], options).float().cpu()
        pixels = (pixels / 2 + 0.5).nan_to_num().clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return self.pipe.numpy_to_pil(pixels)[0]

    def _why_not_finite(self, prompt: str) -> str:
        for name, part in self.pipe.components.items():
            weights = part.state_dict() if isinstance(part, torch.nn.Module) else {}
            for tensor, values in weights.items():
                if count := int((~values.isfinite()).sum()):
                    return (
                        f"decoder: expected numbers in {name} of {self.source.source}, found {count} values that are "
                        f"NaN or infinite in its tensor {tensor}; copy or train it again."
                    )
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"The image of {prompt!r} is not finite: expected numbers, found NaN or infinity, though the weights of "
            f"{self.source.source} are finite in {dtype}; try --dtype float32, or less --guidance."
        )


class KandinskyDecoder(Decoder):
    """Kandinsky 2.2 and the shipped decoder: sees image embeddings only."""

    def _load(self):
        from diffusers import KandinskyV22Pipeline

        return load_pipeline(KandinskyV22Pipeline, self.source, self.dtype)

    def _arguments(self, prompts, image_embeds, negative, options):
        # The pipeline's own default is 512 pixels whatever the UNet was trained on.
        sample_size = self.pipe.unet.config.sample_size
        native = sample_size * self.pipe.movq_scale_factor if sample_size else 512
        return {
            "image_embeds": image_embeds,
            "negative_image_embeds": negative,
            "height": options.height or native,
            "width": options.width or native,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
        }

    def _decode(self, latents, options):
        movq = self.pipe.movq
        return movq.decode(latents.to(movq.dtype), force_not_quantize=True)["sample"]


class StableUnCLIPDecoder(Decoder):
    """Stable unCLIP: sees the image embedding and the prompt."""

    def _load(self):
        import diffusers

        self.has_prior = self.source.class_name == "StableUnCLIPPipeline"
        parts = {}
        if self.has_prior:
            parts = {f"prior{suffix}": part for suffix, part in _stand_in(self.source).items()}
        return load_pipeline(getattr(diffusers, self.source.class_name), self.source, self.dtype, **parts)

    def _arguments(self, prompts, image_embeds, negative, options):
        embeds = {"image_embeds": image_embeds}
        if self.has_prior:
            self.pipe.prior.image_embeds, embeds = image_embeds, {}
        return {**_beside_the_prompt(prompts, options), **embeds}


class UnCLIPDecoder(Decoder):
    """Karlo: sees the image embedding and the prompt, draws 64 pixels and enlarges them to 256."""

    def _load(self):
        from csdiff.pipelines.karlo import load_karlo

        parts = {f"prior{suffix}": part for suffix, part in _stand_in(self.source).items()}
        return load_karlo(repo=self.source.source, dtype=self.dtype, **parts)

    def _arguments(self, prompts, image_embeds, negative, options):
        if options.negative_prompt is not None or options.height or options.width:
            raise CSDiffError("Karlo takes no negative prompt, height or width; leave these options out.")
        self.pipe.prior.image_embeds = image_embeds
        return {
            "prompt": prompts,
            "decoder_num_inference_steps": options.steps,
            "decoder_guidance_scale": options.guidance,
            "prior_guidance_scale": 1.0,
        }


class IPAdapterDecoder(Decoder):
    """Stable Diffusion 1.5 or SDXL with an IP-Adapter: sees the image embedding and the prompt."""

    one_by_one = True
    _no_image_tower = "image_encoder_folder"

    def _load(self):
        import diffusers

        pipe = load_pipeline(getattr(diffusers, self.source.class_name), self.source, self.dtype)
        folder, subfolder, name = self.source.ip_adapter
        pipe.load_ip_adapter(folder, subfolder=subfolder, weight_name=name, **{self._no_image_tower: None})
        return pipe

    def _arguments(self, prompts, image_embeds, negative, options):
        from csdiff.pipelines.ip_adapter import ip_adapter_arguments

        embeds = ip_adapter_arguments(self.pipe, image_embeds, negative, guidance=options.guidance > 1)
        return {**_beside_the_prompt(prompts, options), **embeds}


class FluxDecoder(IPAdapterDecoder):
    """FLUX.1 with an IP-Adapter: sees the image embedding and the prompt."""

    _no_image_tower = "image_encoder_pretrained_model_name_or_path"

    def _arguments(self, prompts, image_embeds, negative, options):
        arguments = super()._arguments(prompts, image_embeds, negative, options)
        # The pipeline guides by a negative when there is both a scale and a prompt for it, at twice the time.
        arguments["negative_prompt"] = (options.negative_prompt or "") if options.true_cfg > 1 else None
        return {**arguments, "true_cfg_scale": options.true_cfg}

    def _decode(self, latents, options):
        vae, factor = self.pipe.vae, self.pipe.vae_scale_factor
        height, width = (side or self.pipe.default_sample_size * factor for side in (options.height, options.width))
        latents = self.pipe._unpack_latents(latents.to(vae.dtype), height, width, factor)
        return vae.decode(latents / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]


_DECODERS = {
    "kandinsky": KandinskyDecoder,
    "unclip": UnCLIPDecoder,
    "stable-unclip": StableUnCLIPDecoder,
    "ip-adapter": IPAdapterDecoder,
    "flux-ip-adapter": FluxDecoder,
}


def load_decoder(
    source: DecoderSource, device: torch.device, dtype: torch.dtype, offload: bool, progress: bool
) -> Decoder:
    """Loads a decoder onto a device.

    Raises:
        CSDiffError: offloading without a GPU, or weights in PyTorch's own format.
        OSError: files are missing or broken.
    """
    if offload and device.type == "cpu":
        raise CSDiffError("offload needs a GPU, found the device cpu; leave --offload out.")
    with quiet_diffusers():
        try:
            decoder = _DECODERS[source.hand_over](source, dtype)
        except OSError as error:
            if _has_only_pickles(source.source, error):
                raise CSDiffError(_conversion(source)) from error
            raise
    # None: a bar on a terminal, nothing in a log file.
    decoder.pipe.set_progress_bar_config(disable=None if progress else True, leave=False)
    if offload:
        decoder.pipe.enable_model_cpu_offload(device=device)
    else:
        decoder.pipe.to(device)
    return decoder


@contextmanager
def quiet_diffusers() -> Iterator[None]:
    """Keeps diffusers from showing loading bars, notices of types, and errors that are raised as well."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def load_pipeline(pipeline_class: type, source: DecoderSource, dtype: torch.dtype, **components):
    """`pipeline_class.from_pretrained`, safetensors only."""
    return pipeline_class.from_pretrained(source.source, dtype=dtype, use_safetensors=True, **components)


def _stand_in(source: DecoderSource) -> dict[str, Any]:
    """A prior that answers with embeddings computed beforehand, and its scheduler."""
    from csdiff.pipelines.embedding_prior import EmbeddingPrior
    from csdiff.pipelines.scheduler import OneShotScheduler

    return {"": EmbeddingPrior(embedding_dim=source.embedding_dim), "_scheduler": OneShotScheduler()}


def _beside_the_prompt(prompts: Sequence[str], options: DrawingOptions) -> dict[str, Any]:
    negative = None if options.negative_prompt is None else [options.negative_prompt] * len(prompts)
    return {
        "prompt": prompts,
        "negative_prompt": negative,
        "height": options.height,
        "width": options.width,
        "num_inference_steps": options.steps,
        "guidance_scale": options.guidance,
    }


def _has_only_pickles(source: str, error: OSError) -> bool:
    """Whether a decoder did not load because a component has its weights in PyTorch's own format only."""
    if Path(source).is_dir():
        folders = [folder for folder in Path(source).iterdir() if any(folder.glob("*.bin"))]
        return any(not any(folder.glob("*.safetensors")) for folder in folders)
    absent = ("Could not find the necessary", "not appear to have a file named", "no file named")
    return "safetensors" in str(error) and any(words in str(error) for words in absent)


def _conversion(source: DecoderSource) -> str:
    load = f"from diffusers import DiffusionPipeline as P; P.from_pretrained({source.source!r}, use_safetensors=False)"
    if source.hand_over == "unclip":
        load = f"from csdiff.pipelines import load_karlo; load_karlo(repo={source.source!r}, use_safetensors=False)"
    return (
        f"decoder: expected safetensors in {source.source}, found weights in PyTorch's own format alone, which are "
        f"pickles and not read here; if you trust them, convert them with python -c \"{load}.save_pretrained('DIR')\" "
        "and give --decoder DIR."
    )
