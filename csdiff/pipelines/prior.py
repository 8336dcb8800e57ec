"""Kandinsky 2.2's prior pipeline with the right defaults for a one-shot adapter."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import torch
from diffusers import KandinskyV22PriorPipeline
from diffusers.pipelines.kandinsky import KandinskyPriorPipelineOutput

from csdiff.adapters import AutoAdapter
from csdiff.adapters.folder import on_hub
from csdiff.data.items import well_formed
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.embeddings.encoders import find_encoder
from csdiff.embeddings.fingerprint import Tower
from csdiff.embeddings.text_encoder import CaptionTokenizer
from csdiff.errors import CSDiffError
from csdiff.files import read_json
from csdiff.pipelines.embedding import text_encoder_options
from csdiff.pipelines.scheduler import OneShotScheduler, is_one_shot


class CSDiffPriorPipeline(KandinskyV22PriorPipeline):
    """Text prompts to CLIP image embeddings, `z = adapter(text_encoder(prompt))`, one step, no extrapolation.

    A `KandinskyV22PriorPipeline` for an adapter: one forward pass, no classifier-free guidance, negative prompts that
    become `negative_image_embeds` for the decoder, and `spread`. Its output goes into any decoder that takes image
    embeddings.

    Args:
        prior (`Adapter`): the adapter, or any model with the forward of diffusers' `PriorTransformer`. A LoRA adapter
            takes the text encoder's place too, merged.
        text_encoder (`CLIPTextModelWithProjection`): the frozen text tower the adapter was trained on.
        tokenizer (`CLIPTokenizer`): its tokenizer.
        image_encoder (`CLIPVisionModelWithProjection`, *optional*): the image tower. It gives the default negative
            (the embedding of an all-zero image, as Kandinsky 2.2 does) and lets `interpolate` take images. Without
            it the default negative is the adapter's answer to the empty prompt.
        image_processor (`CLIPImageProcessor`, *optional*): the image tower's preprocessing.
        scheduler (`OneShotScheduler`, *optional*): made here when left out; None makes one for each call. Another
            scheduler is kept only for a prior that is itself a diffusion model.

    Usage:
        >>> prior = CSDiffPriorPipeline(adapter, text_encoder, tokenizer, image_encoder, image_processor)
        >>> image_embeds, negative_image_embeds = prior("a red apple").to_tuple()
        >>> image = decoder(image_embeds=image_embeds, negative_image_embeds=negative_image_embeds).images[0]
    """

    _optional_components = ["image_encoder", "image_processor", "scheduler"]

    def __init__(
        self, prior, text_encoder, tokenizer, image_encoder=None, image_processor=None, scheduler=OneShotScheduler
    ):
        if getattr(prior, "uses_input_ids", False):
            prior, text_encoder = prior.as_prior(), prior.merged_text_encoder()
        if scheduler is OneShotScheduler or (scheduler is not None and is_one_shot(prior)):
            scheduler = OneShotScheduler()
        # From now on the texts of special tokens are text for it.
        CaptionTokenizer(tokenizer)
        super().__init__(prior, image_encoder, text_encoder, tokenizer, scheduler, image_processor)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a saved prior pipeline, a stock one's folder with `prior=adapter`, or an adapter folder.

        Of an adapter folder the encoders are loaded that its `csdiff.json` names.

        Args:
            pretrained_model_name_or_path: folder, or hub repository of a pipeline.
            **kwargs: as for `DiffusionPipeline.from_pretrained` (`dtype`, `variant`, components by name, ...); of an
                adapter folder `text_encoder` and `image_encoder` may also be where an encoder is now: a folder or a
                hub repository.

        Raises:
            CSDiffError: no adapter folder there, or one that is broken or names no text encoder, or one without a CLIP
                projection.
            OSError: no such repository.

        Usage:
            >>> prior = CSDiffPriorPipeline.from_pretrained("runs/my-adapter")
        """
        folder = Path(pretrained_model_name_or_path)
        index = folder / "model_index.json"
        if not index.is_file() and not on_hub(pretrained_model_name_or_path):
            return cls._from_adapter_folder(folder, **kwargs)
        if index.is_file():
            # diffusers takes classes of other packages only from modules that are already imported
            for value in read_json(index).values():
                if isinstance(value, list) and str(value[0]).startswith("csdiff."):
                    importlib.import_module(value[0])
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _from_adapter_folder(cls, folder: Path, **components):
        dtype = components.pop("dtype", None) or components.pop("torch_dtype", None)
        # A name or a folder says where an encoder is; a model is used as it is.
        places = {}
        for name in ("text_encoder", "image_encoder"):
            if isinstance(components.get(name), (str, os.PathLike)):
                places[name] = components.pop(name)
        variant = components.pop("variant", None)
        adapter = AutoAdapter.from_pretrained(folder, dtype=dtype, variant=variant, **places)
        towers = []
        if not components.keys() >= {"text_encoder", "tokenizer"}:
            towers.append("text")
        if "image_encoder" not in components and (adapter.metadata.get("image_encoder") or {}).get("id"):
            towers.append("image")
        return cls(adapter, **{**load_encoders(adapter.metadata, str(folder), dtype, towers), **components})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_images_per_prompt: int = 1,
        num_inference_steps: int = 25,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        guidance_scale: float = 4.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (the signature diffusers has)
        spread: float = 0.0,
    ) -> KandinskyPriorPipelineOutput | tuple:
        """Embeds prompts as image embeddings.

        Args:
            prompt: One prompt or several, `P`.
            negative_prompt: One for all prompts, or `P`; the adapter's answer to it is the decoder's negative.
                Default: the image tower's embedding of an all-zero image.
            num_images_per_prompt: `n`; rows of one prompt are next to each other. They differ only for adapters
                that sample (a noise token), and with `spread`.
            num_inference_steps: Used by diffusion priors only.
            generator: Seeds `latents`; one, or a list of `P * n`.
            latents: Noise `(P * n, D)` for adapters that sample and for `spread`; drawn when left out.
            guidance_scale: Used by diffusion priors only: one-shot adapters are right without it.
            output_type: "pt" or "np".
            return_dict: A tuple when False.
            callback_on_step_end: Called after each step, as in diffusers.
            callback_on_step_end_tensor_inputs: Names of the tensors the callback is given.
            spread: Share of noise in the answers to the prompts, from 0 (none) to 1, for variety; the embedding is
                `sqrt(1 - spread^2) z + spread * latents` in the whitened space, see `Adapter.spread`.

        Returns:
            `image_embeds` and `negative_image_embeds`, both raw `(P * n, D)`.

        Raises:
            CSDiffError: no prompts, other numbers of prompts, negatives or generators, or a `spread` beyond 0 to 1 or
                for a prior that samples.
            ValueError: from diffusers, for an `output_type` or tensor names that it does not have.
        """
        prompts = _texts(prompt, "prompt")
        negatives = None if negative_prompt is None else _texts(negative_prompt, "negative_prompt")
        if negatives and len(negatives) == 1:
            negatives = negatives * len(prompts)
        count = len(prompts) * num_images_per_prompt
        generators = len(generator) if isinstance(generator, list) else count
        if num_images_per_prompt < 1 or len(negatives or prompts) != len(prompts) or generators != count:
            raise CSDiffError(
                f"Expected num_images_per_prompt of 1 or more, negative_prompt one or one for each of {len(prompts)} "
                f"prompts, and generator one or a list of {count}, found {num_images_per_prompt} images, "
                f"{len(negatives or prompts)} negatives and {generators} generators."
            )

        scheduler = self.scheduler
        if scheduler is None:
            self.scheduler = OneShotScheduler()
        if is_one_shot(self.prior):
            guidance_scale = 1.0
            shape = (count, self.prior.config.embedding_dim)
            latents = self.prepare_latents(
                shape, self.text_encoder.dtype, self._execution_device, generator, latents, self.scheduler
            )
            noise = latents
            if negatives:
                # The same noise for a prompt and its negative, so that asking for one does not change the other.
                latents = torch.cat([latents, latents])
        elif spread:
            raise CSDiffError("spread: a diffusion prior draws its own noise; vary the generator instead.")
        image_embeds, negative_image_embeds = super().__call__(
            prompts,
            negatives,
            num_images_per_prompt=num_images_per_prompt,
            num_inference_steps=num_inference_steps,
            generator=generator,
            latents=latents,
            guidance_scale=guidance_scale,
            # numpy has no bfloat16: from float32, below
            output_type="pt" if output_type == "np" else output_type,
            return_dict=False,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        self.scheduler = scheduler
        if spread:
            whitened = (image_embeds.float() - self.prior.clip_mean) / self.prior.clip_std
            whitened = self.prior.spread(whitened, spread, noise=noise)
            image_embeds = self.prior.post_process_latents(whitened).to(image_embeds.dtype)
        both = (image_embeds, negative_image_embeds)
        if output_type == "np":
            both = tuple(embeds.float().cpu().numpy() for embeds in both)
        return KandinskyPriorPipelineOutput(*both) if return_dict else both

    def progress_bar(self, iterable=None, total=None):
        """Diffusers' bar; one step needs none."""
        return iterable if is_one_shot(self.prior) else super().progress_bar(iterable, total)

    def get_zero_embed(self, batch_size: int = 1, device: str | torch.device | None = None) -> torch.Tensor:
        """The default negative, `(batch_size, D)`: an all-zero image embedded, or the empty prompt without a tower."""
        if self.image_encoder is not None:
            return super().get_zero_embed(batch_size, device)
        device = device or self._execution_device
        embeds, states, mask = self._encode_prompt([""], device, 1, do_classifier_free_guidance=False)
        prediction = self.prior(
            torch.zeros_like(embeds[:, :1]).expand(1, self.prior.config.embedding_dim), 0, embeds, states, mask
        )
        return self.prior.post_process_latents(prediction.predicted_image_embedding).repeat(batch_size, 1)

    def interpolate(
        self,
        images_and_prompts: list[str | PIL.Image.Image | torch.Tensor],
        weights: list[float],
        *args,
        device: str | torch.device | None = None,
        **kwargs,
    ) -> KandinskyPriorPipelineOutput:
        """Mixes prompts and images: `z = sum_i weight_i * z_i`, with `z_i` a raw image embedding.

        As diffusers' method, with these differences: prompts go through the adapter, images (or pixel tensors
        `(1, 3, H, W)`) are embedded on the pipeline's device by default, and `negative_prompt` is the decoder's
        negative, "" the default one. Both embeddings of the result are `(num_images_per_prompt, D)`.

        Raises:
            CSDiffError: an image without an image tower.
        """
        if self.image_encoder is None and any(not isinstance(item, str) for item in images_and_prompts):
            raise CSDiffError(
                "interpolate: mixing in an image needs an image tower; load this pipeline with image_encoder=."
            )
        return super().interpolate(
            images_and_prompts, weights, *args, device=device or self._execution_device, **kwargs
        )


def load_encoders(
    metadata: dict, of: str, dtype: torch.dtype | None, towers: Sequence[Tower] = ("text", "image")
) -> dict:
    """The encoders that an adapter's `csdiff.json` (`metadata`, from `of`) names, as parts of a pipeline by name.

    Raises:
        CSDiffError: an encoder that is not named, not there, or without a CLIP projection.
    """
    found = {tower: find_encoder(metadata.get(f"{tower}_encoder"), tower, of=of) for tower in towers}
    parts = {}
    if "text" in found:
        id = found["text"]["id"]
        text = load_text_encoder(id, dtype=dtype, **text_encoder_options(found["text"], metadata))
        if text.pooling != "projection":
            raise CSDiffError(
                f"{id} has no CLIP text projection, which this pipeline's calls need; encode the text with "
                "csdiff.embeddings.load_text_encoder and call adapter.embed."
            )
        parts |= {"text_encoder": text.model, "tokenizer": text.tokenizer}
    if "image" in found:
        image = load_image_encoder(found["image"]["id"], dtype=dtype, revision=found["image"].get("revision"))
        parts |= {"image_encoder": image.model, "image_processor": image.processor}
    return parts


def _texts(given: str | Sequence[str], name: str) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, (list, tuple)) or not texts or not all(isinstance(text, str) for text in texts):
        raise CSDiffError(f"{name}: expected a string or a list of strings, found {given!r}.")
    return [well_formed(text) for text in texts]
