"""Loading a decoder and drawing with it: one class for each way of handing over an image embedding."""

from dataclasses import dataclass

import torch
from PIL import Image

from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import DecoderSource


@dataclass
class DrawingOptions:
    """What all pictures of a run share; `None` leaves it to the pipeline."""

    steps: int
    guidance: float
    negative_prompt: str | None = None
    height: int | None = None
    width: int | None = None


class KandinskyDecoder:
    """Kandinsky 2.2 and the shipped decoder: sees image embeddings only."""

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        from diffusers import KandinskyV22Pipeline

        self.pipe = load_pipeline(KandinskyV22Pipeline, source, dtype)

    def draw(
        self, prompts, image_embeds, negative_image_embeds, generators, options: DrawingOptions
    ) -> list[Image.Image]:
        # the pipeline's own default is 512 pixels whatever the UNet was trained on
        sample_size = self.pipe.unet.config.sample_size
        native = sample_size * self.pipe.movq_scale_factor if sample_size else 512
        return self.pipe(
            image_embeds=image_embeds,
            negative_image_embeds=negative_image_embeds,
            height=options.height or native,
            width=options.width or native,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generators,
        ).images


class StableUnCLIPDecoder:
    """Stable unCLIP: sees the image embedding and the prompt."""

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        import diffusers

        from csdiff.pipelines.embedding_prior import EmbeddingPrior
        from csdiff.pipelines.scheduler import OneShotScheduler

        pipeline_class = getattr(diffusers, source.class_name)
        self.has_prior = source.class_name == "StableUnCLIPPipeline"
        parts = {}
        if self.has_prior:
            prior = EmbeddingPrior(embedding_dim=source.embedding_dim)
            parts = {"prior": prior, "prior_scheduler": OneShotScheduler()}
        self.pipe = load_pipeline(pipeline_class, source, dtype, **parts)

    def draw(
        self, prompts, image_embeds, negative_image_embeds, generators, options: DrawingOptions
    ) -> list[Image.Image]:
        embeds = {}
        if self.has_prior:
            self.pipe.prior.image_embeds = image_embeds
        else:
            embeds["image_embeds"] = image_embeds
        return self.pipe(
            prompt=prompts,
            negative_prompt=None if options.negative_prompt is None else [options.negative_prompt] * len(prompts),
            height=options.height,
            width=options.width,
            num_inference_steps=options.steps,
            guidance_scale=options.guidance,
            generator=generators,
            **embeds,
        ).images


class UnCLIPDecoder:
    """Karlo: sees the image embedding and the prompt, draws 64 pixels and enlarges them to 256."""

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        from csdiff.pipelines.embedding_prior import EmbeddingPrior
        from csdiff.pipelines.karlo import load_karlo
        from csdiff.pipelines.scheduler import OneShotScheduler

        prior = EmbeddingPrior(embedding_dim=source.embedding_dim)
        self.pipe = load_karlo(repo=source.source, dtype=dtype, prior=prior, prior_scheduler=OneShotScheduler())

    def draw(
        self, prompts, image_embeds, negative_image_embeds, generators, options: DrawingOptions
    ) -> list[Image.Image]:
        if options.negative_prompt is not None or options.height or options.width:
            raise CSDiffError("Karlo takes no negative prompt, height or width; leave these options out.")
        self.pipe.prior.image_embeds = image_embeds
        return self.pipe(
            prompts,
            decoder_num_inference_steps=options.steps,
            decoder_guidance_scale=options.guidance,
            prior_guidance_scale=1.0,
            generator=generators,
        ).images


class IPAdapterDecoder:
    """Stable Diffusion 1.5 or SDXL with an IP-Adapter: sees the image embedding and the prompt."""

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        import diffusers

        self.pipe = load_pipeline(getattr(diffusers, source.class_name), source, dtype)
        folder, subfolder, name = source.ip_adapter
        self.pipe.load_ip_adapter(folder, subfolder=subfolder, weight_name=name, image_encoder_folder=None)

    def draw(
        self, prompts, image_embeds, negative_image_embeds, generators, options: DrawingOptions
    ) -> list[Image.Image]:
        from csdiff.pipelines.ip_adapter import ip_adapter_image_embeds

        images = []
        # one call gives all its prompts the same image embeddings, so each picture is a call
        for row, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
            negative = None if negative_image_embeds is None else negative_image_embeds[row]
            images += self.pipe(
                prompt=prompt,
                negative_prompt=options.negative_prompt,
                ip_adapter_image_embeds=ip_adapter_image_embeds(
                    image_embeds[row], negative, guidance=options.guidance > 1
                ),
                height=options.height,
                width=options.width,
                num_inference_steps=options.steps,
                guidance_scale=options.guidance,
                generator=generator,
            ).images
        return images


DECODERS = {
    "kandinsky": KandinskyDecoder,
    "unclip": UnCLIPDecoder,
    "stable-unclip": StableUnCLIPDecoder,
    "ip-adapter": IPAdapterDecoder,
}


def load_decoder(source: DecoderSource, device: torch.device, dtype: torch.dtype, offload: bool, progress: bool):
    """Loads a decoder onto a device.

    Returns:
        An object with `pipe`, the diffusers pipeline, and
        `draw(prompts, image_embeds, negative_image_embeds, generators, options) -> list[PIL.Image.Image]`; embeddings
        are raw `(B, D)`, prompts and generators lists of B.

    Raises:
        CSDiffError: offloading without a GPU.
        OSError: files are missing or broken.
    """
    if offload and device.type == "cpu":
        raise CSDiffError("offload needs a GPU, found the device cpu; leave --offload out.")
    decoder = DECODERS[source.hand_over](source, dtype)
    decoder.pipe.set_progress_bar_config(disable=not progress, leave=False)
    if offload:
        decoder.pipe.enable_model_cpu_offload(device=device)
    else:
        decoder.pipe.to(device)
    return decoder


def load_pipeline(pipeline_class: type, source: DecoderSource, dtype: torch.dtype, **components):
    """`pipeline_class.from_pretrained`, safetensors only, without its loading bar and its notices of types."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        return pipeline_class.from_pretrained(source.source, dtype=dtype, use_safetensors=True, **components)
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
