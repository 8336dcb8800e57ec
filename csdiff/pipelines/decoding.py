"""Loading a decoder and drawing with it: one class for each way of handing over an image embedding."""

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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


class Decoder(ABC):
    """A decoder pipeline (`pipe`) and how it is called.

    Args:
        source: where it is.
        dtype: of its weights.
    """

    def __init__(self, source: DecoderSource, dtype: torch.dtype):
        self.source, self.dtype = source, dtype
        self.pipe = self._load(source, dtype)

    @abstractmethod
    def _load(self, source: DecoderSource, dtype: torch.dtype):
        """The pipeline."""

    @abstractmethod
    def _call(self, prompts, image_embeds, negative_image_embeds, generators, options: DrawingOptions) -> np.ndarray:
        """Pictures `(B, H, W, 3)`, 0 to 1."""

    def draw(
        self,
        prompts: list[str],
        image_embeds: torch.Tensor,
        negative_image_embeds: torch.Tensor | None,
        generators: list[torch.Generator],
        options: DrawingOptions,
    ) -> list[Image.Image]:
        """Draws B pictures from raw image embeddings `(B, D)`.

        Raises:
            CSDiffError: a picture is not finite; names the weights that are not, if there are such.
        """
        pictures = self._call(prompts, image_embeds, negative_image_embeds, generators, options)
        for prompt, picture in zip(prompts, pictures, strict=True):
            if not np.isfinite(picture).all():
                raise CSDiffError(self._why_not_finite(prompt))
        return self.pipe.numpy_to_pil(pictures)

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
            f"The picture of {prompt!r} is not finite: expected numbers, found NaN or infinity, though the weights of "
            f"{self.source.source} are finite in {dtype}; try --dtype float32, or less --guidance."
        )


class KandinskyDecoder(Decoder):
    """Kandinsky 2.2 and the shipped decoder: sees image embeddings only."""

    def _load(self, source, dtype):
        from diffusers import KandinskyV22Pipeline

        return load_pipeline(KandinskyV22Pipeline, source, dtype)

    def _call(self, prompts, image_embeds, negative_image_embeds, generators, options):
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
            output_type="np",
        ).images


class StableUnCLIPDecoder(Decoder):
    """Stable unCLIP: sees the image embedding and the prompt."""

    def _load(self, source, dtype):
        import diffusers

        from csdiff.pipelines.embedding_prior import EmbeddingPrior
        from csdiff.pipelines.scheduler import OneShotScheduler

        pipeline_class = getattr(diffusers, source.class_name)
        self.has_prior = source.class_name == "StableUnCLIPPipeline"
        parts = {}
        if self.has_prior:
            prior = EmbeddingPrior(embedding_dim=source.embedding_dim)
            parts = {"prior": prior, "prior_scheduler": OneShotScheduler()}
        return load_pipeline(pipeline_class, source, dtype, **parts)

    def _call(self, prompts, image_embeds, negative_image_embeds, generators, options):
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
            output_type="np",
            **embeds,
        ).images


class UnCLIPDecoder(Decoder):
    """Karlo: sees the image embedding and the prompt, draws 64 pixels and enlarges them to 256."""

    def _load(self, source, dtype):
        from csdiff.pipelines.embedding_prior import EmbeddingPrior
        from csdiff.pipelines.karlo import load_karlo
        from csdiff.pipelines.scheduler import OneShotScheduler

        prior = EmbeddingPrior(embedding_dim=source.embedding_dim)
        return load_karlo(repo=source.source, dtype=dtype, prior=prior, prior_scheduler=OneShotScheduler())

    def _call(self, prompts, image_embeds, negative_image_embeds, generators, options):
        if options.negative_prompt is not None or options.height or options.width:
            raise CSDiffError("Karlo takes no negative prompt, height or width; leave these options out.")
        self.pipe.prior.image_embeds = image_embeds
        return self.pipe(
            prompts,
            decoder_num_inference_steps=options.steps,
            decoder_guidance_scale=options.guidance,
            prior_guidance_scale=1.0,
            generator=generators,
            output_type="np",
        ).images


class IPAdapterDecoder(Decoder):
    """Stable Diffusion 1.5 or SDXL with an IP-Adapter: sees the image embedding and the prompt."""

    def _load(self, source, dtype):
        import diffusers

        pipe = load_pipeline(getattr(diffusers, source.class_name), source, dtype)
        folder, subfolder, name = source.ip_adapter
        pipe.load_ip_adapter(folder, subfolder=subfolder, weight_name=name, image_encoder_folder=None)
        return pipe

    def _call(self, prompts, image_embeds, negative_image_embeds, generators, options):
        from csdiff.pipelines.ip_adapter import ip_adapter_image_embeds

        pictures = []
        # one call gives all its prompts the same image embeddings, so each picture is a call
        for row, (prompt, generator) in enumerate(zip(prompts, generators, strict=True)):
            negative = None if negative_image_embeds is None else negative_image_embeds[row]
            picture = self.pipe(
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
                output_type="np",
            ).images
            pictures.append(picture)
        return np.concatenate(pictures)


DECODERS = {
    "kandinsky": KandinskyDecoder,
    "unclip": UnCLIPDecoder,
    "stable-unclip": StableUnCLIPDecoder,
    "ip-adapter": IPAdapterDecoder,
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
            decoder = DECODERS[source.hand_over](source, dtype)
        except OSError as error:
            if has_only_pickles(source.source, error):
                raise CSDiffError(_conversion(source)) from error
            raise
    # None: a bar on a terminal, nothing in a log file
    decoder.pipe.set_progress_bar_config(disable=None if progress else True, leave=False)
    if offload:
        decoder.pipe.enable_model_cpu_offload(device=device)
    else:
        decoder.pipe.to(device)
    return decoder


def has_only_pickles(source: str, error: OSError) -> bool:
    """Whether a decoder did not load because a component has its weights in PyTorch's own format only."""
    if Path(source).is_dir():
        for folder in filter(Path.is_dir, Path(source).iterdir()):
            if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
                return True
        return False
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


@contextmanager
def quiet_diffusers():
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
