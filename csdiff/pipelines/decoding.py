"""Loading a decoder and drawing with it: one class for each way of handing over an image embedding."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from csdiff.errors import CSDiffError
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import DecoderSource
from csdiff.pipelines.loading import ip_adapter_arguments, load_karlo
from csdiff.pipelines.scheduler import EmbeddingPrior, OneShotScheduler

OnStep = Callable[[int, int, Callable[[], Image.Image | None]], None]
"""Called after a step with its number from 1, the number of all, and what draws the image as it is now (None where the
pipeline shows nothing before the end). What it raises ends the drawing."""


def load_decoder(source: DecoderSource, options: GenerateConfig, device: torch.device) -> Decoder:
    """Loads a decoder onto a device, as `dtype`, `offload` and `progress` of the options say.

    Raises:
        CSDiffError: offloading without a GPU, or weights in PyTorch's own format.
        OSError: files are missing or broken.
    """
    if options.offload and device.type == "cpu":
        raise CSDiffError("offload needs a GPU, found the device cpu; leave --offload out.")
    # diffusers shows loading bars, notices of types, and errors that are raised as well
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        decoder = _DECODERS[source.hand_over](source, source.dtype(options.dtype, device))
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        load, repo = "from csdiff.pipelines import load_karlo; load_karlo(repo=", repr(source.source)
        if source.hand_over != "unclip":
            load = "from diffusers import DiffusionPipeline as P; P.from_pretrained("
        raise CSDiffError(
            f"decoder: expected safetensors in {source.source}, a part has none ({' '.join(str(error).split())}); "
            "weights in PyTorch's own format are pickles and not read here; if you trust them, convert them with "
            f"python -c \"{load}{repo}, use_safetensors=False).save_pretrained('DIR')\" and give --decoder DIR."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
    # None: a bar on a terminal, nothing in a log file.
    decoder.pipe.set_progress_bar_config(disable=None if options.progress else True, leave=False)
    if options.offload:
        decoder.pipe.enable_model_cpu_offload(device=device)
    else:
        decoder.pipe.to(device)
    return decoder


class Decoder:
    """A decoder pipeline (`pipe`) and how it is called."""

    # Whether a call shows all its image embeddings to every prompt, so that each image is a call of its own.
    one_by_one = False
    pipeline_class: str | None = None

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        self.source, self.dtype = source, dtype
        self.pipe = self._load()

    def _load(self, **components: Any) -> Any:
        """The pipeline."""
        pipeline_class = getattr(diffusers, self.pipeline_class or self.source.class_name)
        return pipeline_class.from_pretrained(self.source.source, dtype=self.dtype, use_safetensors=True, **components)

    def _arguments(
        self, prompts: list[str], image_embeds: Tensor, negative: Tensor | None, options: GenerateConfig
    ) -> dict[str, Any]:
        """How the pipeline is called; here, all but the image embedding of one that also reads the prompt."""
        return {
            "prompt": prompts,
            "negative_prompt": None if options.negative_prompt is None else [options.negative_prompt] * len(prompts),
            "height": options.height,
            "width": options.width,
            "num_inference_steps": options.steps,
            "guidance_scale": options.guidance,
        }

    def _decode(self, latents: Tensor, options: GenerateConfig) -> Tensor:
        """Latents as pixels from -1 to 1, for a preview."""
        vae = self.pipe.vae
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]

    def draw(
        self,
        prompts: Sequence[str],
        image_embeds: Tensor,
        negative: Tensor | None,
        generators: Sequence[torch.Generator],
        options: GenerateConfig,
        on_step: OnStep | None = None,
    ) -> Iterator[Image.Image]:
        """Draws N images, `batch_size` at once.

        Args:
            prompts: N texts, for decoders that also read them.
            image_embeds: `(N, D)` raw image embeddings.
            negative: `(1, D)`, the embedding of what none should show; None for the decoder's own.
            generators: N generators of the noise.
            options: Of these `DecoderSource.sampling` (filled), the negative prompt, the size (None leaves it to the
                pipeline), `true_cfg` and `batch_size`.
            on_step: See `OnStep`; a preview shows the first image of the call.

        Raises:
            CSDiffError: an image is not finite; names the weights that are not, if there are such.
        """
        size = 1 if self.one_by_one else options.batch_size
        calls = range(0, len(prompts), size)
        for call, start in enumerate(calls):

            def report(step: int, latents: Tensor | None, call: int = call) -> None:
                if on_step is not None:
                    done = call * options.steps + min(step, options.steps)
                    on_step(done, len(calls) * options.steps, lambda: self._preview(latents, options))

            rows = slice(start, start + size)
            arguments = self._arguments(prompts[rows], image_embeds[rows], negative, options) | self._callback(report)
            images = self.pipe(**arguments, generator=generators[rows], output_type="np").images
            for prompt, image in zip(prompts[rows], images, strict=True):
                if not np.isfinite(image).all():
                    raise CSDiffError(self._why_not_finite(prompt))
            yield from self.pipe.numpy_to_pil(images)

    def _callback(self, report: Callable[[int, Tensor | None], None]) -> dict[str, Any]:
        """Arguments that have the pipeline call `report(step, latents)` after each step."""

        def modern(pipe: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            report(step + 1, tensors["latents"])
            return {}

        if "callback_on_step_end" in inspect.signature(self.pipe.__call__).parameters:
            return {"callback_on_step_end": modern}
        # Called in the loop of a prior, too, whose latents are no image.
        return {"callback": lambda step, timestep, latents: latents.ndim == 4 and report(step + 1, latents)}

    @torch.no_grad()
    def _preview(self, latents: Tensor | None, options: GenerateConfig) -> Image.Image | None:
        if latents is None:
            return None
        pixels = self._decode(latents[:1], options).float().cpu()
        return self.pipe.numpy_to_pil((pixels / 2 + 0.5).nan_to_num().clamp(0, 1).permute(0, 2, 3, 1).numpy())[0]

    def _why_not_finite(self, prompt: str) -> str:
        for name, part in self.pipe.components.items():
            for tensor, values in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
                if broken := int((~values.isfinite()).sum()):
                    return (
                        f"decoder: expected numbers in {name} of {self.source.source}, found {broken} values that are "
                        f"NaN or infinite in its tensor {tensor}; copy or train it again."
                    )
        return (
            f"The image of {prompt!r} is not finite: expected numbers, found NaN or infinity, though the weights of "
            f"{self.source.source} are finite in {self.dtype}; try --dtype float32, or less --guidance."
        )


class KandinskyDecoder(Decoder):
    """Kandinsky 2.2 and the shipped decoder: sees image embeddings only."""

    pipeline_class = "KandinskyV22Pipeline"

    def _arguments(self, prompts, image_embeds, negative, options):
        # The pipeline's own default is 512 pixels whatever the UNet was trained on.
        sample_size = self.pipe.unet.config.sample_size
        native = sample_size * self.pipe.movq_scale_factor if sample_size else 512
        return {
            "image_embeds": image_embeds,
            "negative_image_embeds": None if negative is None else negative.expand_as(image_embeds),
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
        # One of the two pipelines has a prior, and computes the embedding itself.
        if self.source.class_name != "StableUnCLIPPipeline":
            return super()._load()
        prior = EmbeddingPrior(embedding_dim=self.source.embedding_dim)
        return super()._load(prior=prior, prior_scheduler=OneShotScheduler())

    def _arguments(self, prompts, image_embeds, negative, options):
        arguments = super()._arguments(prompts, image_embeds, negative, options)
        if not hasattr(self.pipe, "prior"):
            return {**arguments, "image_embeds": image_embeds}
        self.pipe.prior.image_embeds = image_embeds
        return arguments


class UnCLIPDecoder(Decoder):
    """Karlo: sees the image embedding and the prompt, draws 64 pixels and enlarges them to 256."""

    def _load(self):
        self.heard = None
        prior = EmbeddingPrior(embedding_dim=self.source.embedding_dim)
        return load_karlo(prior=prior, prior_scheduler=OneShotScheduler(), repo=self.source.source, dtype=self.dtype)

    def _arguments(self, prompts, image_embeds, negative, options):
        self.pipe.prior.image_embeds = image_embeds
        return {
            "prompt": prompts,
            "decoder_num_inference_steps": options.steps,
            "decoder_guidance_scale": options.guidance,
            "prior_guidance_scale": 1.0,
        }

    def _callback(self, report):
        # This pipeline calls nobody: its steps are heard at its network.
        if self.heard is not None:
            self.heard.remove()
        steps = count(1)
        self.heard = self.pipe.decoder.register_forward_hook(lambda *_: report(next(steps), None))
        return {}


class IPAdapterDecoder(Decoder):
    """Stable Diffusion 1.5 or SDXL with an IP-Adapter: sees the image embedding and the prompt."""

    one_by_one = True
    _no_image_tower = "image_encoder_folder"

    def _load(self):
        pipe = super()._load()
        folder, subfolder, name = self.source.ip_adapter
        pipe.load_ip_adapter(folder, subfolder=subfolder, weight_name=name, **{self._no_image_tower: None})
        return pipe

    def _arguments(self, prompts, image_embeds, negative, options):
        embeds = ip_adapter_arguments(self.pipe, image_embeds, negative, guidance=options.guidance > 1)
        return super()._arguments(prompts, image_embeds, negative, options) | embeds


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
