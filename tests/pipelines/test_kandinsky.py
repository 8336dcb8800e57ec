"""Adapters inside the Kandinsky 2.2 pipelines: what reaches the UNet is what the adapter says."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForText2Image,
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetImg2ImgPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22Img2ImgCombinedPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintCombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    UnCLIPScheduler,
)
from PIL import Image
from tiny_pipelines import DIM, PROMPT, clip_parts, kandinsky_parts, prior_transformer

import csdiff
from csdiff.pipelines import CSDiffPriorPipeline

SIZE = 64
SMALL = {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "np"}


@pytest.fixture(scope="module")
def decoder_parts():
    torch.manual_seed(0)
    return kandinsky_parts(DIM)


@pytest.fixture(scope="module")
def prior_parts(tiny_clip):
    torch.manual_seed(0)
    return clip_parts(tiny_clip)


@pytest.fixture
def prior_pipe(adapter, prior_parts):
    pipe = CSDiffPriorPipeline(adapter, **prior_parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def stock_prior(tiny_clip, prior_parts) -> dict:
    return {
        "prior": prior_transformer(tiny_clip, DIM),
        "scheduler": UnCLIPScheduler(prediction_type="sample"),
        **prior_parts,
    }


def combined(cls, decoder_parts, tiny_clip, prior_parts):
    prior = {f"prior_{name}": part for name, part in stock_prior(tiny_clip, prior_parts).items()}
    pipe = cls(**decoder_parts, **prior)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_embeds_seen(pipe, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs a pipeline; returns the negative and the positive embeddings that the UNet was given."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["added_cond_kwargs"]["image_embeds"]), with_kwargs=True
    )
    try:
        images = pipe(**arguments).images
    finally:
        hook.remove()
    assert images.shape[1:] == (SIZE, SIZE, 3)
    return tuple(seen[0].chunk(2))


def picture(color="red"):
    return Image.new("RGB", (SIZE, SIZE), color)


DECODERS = {
    "text to image": (KandinskyV22Pipeline, {}, {}),
    "image to image": (KandinskyV22Img2ImgPipeline, {}, {"image": picture(), "strength": 0.6}),
    "inpainting": (
        KandinskyV22InpaintPipeline,
        {"in_channels": 9},
        {"image": picture(), "mask_image": Image.new("L", (SIZE, SIZE), 255)},
    ),
    "controlnet": (
        KandinskyV22ControlnetPipeline,
        {"in_channels": 8, "hint": True},
        {"hint": torch.rand(1, 3, SIZE, SIZE)},
    ),
    "controlnet image to image": (
        KandinskyV22ControlnetImg2ImgPipeline,
        {"in_channels": 8, "hint": True},
        {"hint": torch.rand(1, 3, SIZE, SIZE), "image": picture(), "strength": 0.6},
    ),
}


@pytest.mark.parametrize("name", DECODERS)
def test_every_decoder_takes_the_embeddings(name, prior_pipe, adapter, embed):
    cls, unet_options, arguments = DECODERS[name]
    pipe = cls(**kandinsky_parts(DIM, **unet_options))
    pipe.set_progress_bar_config(disable=True)
    output = prior_pipe(PROMPT, negative_prompt="blurry")
    negative, positive = image_embeds_seen(pipe, **output, **arguments, **SMALL)
    torch.testing.assert_close(positive, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    torch.testing.assert_close(negative, embed(adapter, "blurry"), atol=1e-5, rtol=0)


COMBINED = {
    "text to image": KandinskyV22CombinedPipeline,
    "image to image": KandinskyV22Img2ImgCombinedPipeline,
    "inpainting": KandinskyV22InpaintCombinedPipeline,
}


@pytest.mark.parametrize("name", COMBINED)
def test_load_adapter_into_combined_pipelines(
    name, tiny_clip, prior_parts, adapter_folder, adapter, embed, zero_image_embeds
):
    cls, (_, unet_options, arguments) = COMBINED[name], DECODERS[name]
    pipe = combined(cls, kandinsky_parts(DIM, **unet_options), tiny_clip, prior_parts)
    assert csdiff.load_adapter(pipe, adapter_folder) is pipe
    assert isinstance(pipe, cls)
    pipe.set_progress_bar_config(disable=True)
    negative, positive = image_embeds_seen(pipe, prompt=PROMPT, **arguments, **SMALL)
    torch.testing.assert_close(positive, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    torch.testing.assert_close(negative, zero_image_embeds, atol=1e-5, rtol=0)
    explicit = {"negative_prompt": "blurry", "prior_num_inference_steps": 7, "prior_guidance_scale": 1.0}
    negative, positive = image_embeds_seen(pipe, prompt=PROMPT, **arguments, **explicit, **SMALL)
    torch.testing.assert_close(positive, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    torch.testing.assert_close(negative, embed(adapter, "blurry"), atol=1e-5, rtol=0)


def test_auto_pipeline_saved_and_reloaded(
    tiny_clip, decoder_parts, prior_parts, adapter_folder, adapter, embed, tmp_path
):
    pipe = combined(KandinskyV22CombinedPipeline, decoder_parts, tiny_clip, prior_parts)
    csdiff.load_adapter(pipe, adapter_folder).save_pretrained(tmp_path)
    reloaded = AutoPipelineForText2Image.from_pretrained(tmp_path)
    assert type(reloaded) is KandinskyV22CombinedPipeline
    reloaded.set_progress_bar_config(disable=True)
    _, positive = image_embeds_seen(reloaded, prompt=PROMPT, **SMALL)
    torch.testing.assert_close(positive, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    other_task = AutoPipelineForImage2Image.from_pipe(pipe)
    assert type(other_task) is KandinskyV22Img2ImgCombinedPipeline
    assert type(other_task.prior_prior) is type(adapter)


def test_load_adapter_into_the_prior_pipeline(tiny_clip, prior_parts, adapter, embed):
    pipe = KandinskyV22PriorPipeline(**stock_prior(tiny_clip, prior_parts))
    pipe = csdiff.load_adapter(pipe, adapter)
    pipe.set_progress_bar_config(disable=True)
    torch.testing.assert_close(pipe(PROMPT).image_embeds, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    mixed = pipe.interpolate([PROMPT, "a cat"], [0.25, 0.75]).image_embeds
    expected = 0.25 * embed(adapter, PROMPT) + 0.75 * embed(adapter, "a cat")
    torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=0)
