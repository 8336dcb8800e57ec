"""Adapters inside Stable unCLIP and Karlo."""

import pytest
import torch
from diffusers import UnCLIPPipeline
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from tiny_pipelines import (
    DIM,
    PROMPT,
    clip_parts,
    karlo_folder,
    prior_transformer,
    stable_unclip,
    stable_unclip_img2img,
)

import csdiff
from csdiff.pipelines import CSDiffPriorPipeline, EmbeddingPrior, OneShotScheduler, load_karlo

SMALL = {"num_inference_steps": 2, "output_type": "np"}
KARLO_STEPS = {"decoder_num_inference_steps": 2, "super_res_num_inference_steps": 2, "output_type": "np"}


def class_labels_seen(pipe, **arguments) -> torch.Tensor:
    """Runs a stable unCLIP pipeline; returns the image embeddings its UNet was given, unconditional half first."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"]), with_kwargs=True
    )
    try:
        pipe(**arguments)
    finally:
        hook.remove()
    # the other half is the embedded noise level
    return seen[0][:, :DIM]


def image_embeddings_seen(pipe, **arguments) -> torch.Tensor:
    """Runs Karlo; returns the image embeddings that its projection was given."""
    seen = []
    hook = pipe.text_proj.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["image_embeddings"]), with_kwargs=True
    )
    try:
        pipe(**arguments)
    finally:
        hook.remove()
    return seen[0]


@pytest.fixture(scope="module")
def karlo(tiny_clip, tmp_path_factory):
    torch.manual_seed(0)
    return karlo_folder(tmp_path_factory.mktemp("karlo"), tiny_clip, DIM)


def karlo_embeds(pipe, adapter, prompt):
    tokens = pipe.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        return adapter.embed(pipe.text_encoder(tokens.input_ids).text_embeds)


def test_stable_unclip_with_load_adapter(tiny_clip, adapter_folder, adapter, embed):
    pipe = csdiff.load_adapter(stable_unclip(tiny_clip, DIM), adapter_folder)
    pipe.set_progress_bar_config(disable=True)
    unconditional, positive = class_labels_seen(pipe, prompt=PROMPT, **SMALL).chunk(2)
    torch.testing.assert_close(positive, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    assert (unconditional == 0).all()
    seen = class_labels_seen(pipe, prompt=[PROMPT, "a cat"], num_images_per_prompt=2, **SMALL)
    expected = embed(adapter, PROMPT, "a cat").repeat_interleave(2, dim=0)
    torch.testing.assert_close(seen.chunk(2)[1], expected, atol=1e-5, rtol=0)


def test_stable_unclip_saved_and_reloaded(tiny_clip, adapter, embed, tmp_path):
    pipe = csdiff.load_adapter(stable_unclip(tiny_clip, DIM), adapter)
    pipe.save_pretrained(tmp_path)
    reloaded = type(pipe).__mro__[1].from_pretrained(tmp_path)
    reloaded.set_progress_bar_config(disable=True)
    seen = class_labels_seen(reloaded, prompt=PROMPT, prior_guidance_scale=1.0, **SMALL)
    torch.testing.assert_close(seen.chunk(2)[1], embed(adapter, PROMPT), atol=1e-5, rtol=0)


def test_stable_unclip_img2img_takes_image_embeds(tiny_clip, adapter, embed):
    pipe = stable_unclip_img2img(tiny_clip, DIM)
    pipe.set_progress_bar_config(disable=True)
    prior = CSDiffPriorPipeline(adapter, **clip_parts(tiny_clip))
    prior.set_progress_bar_config(disable=True)
    image_embeds = prior(PROMPT).image_embeds
    seen = class_labels_seen(pipe, prompt=PROMPT, image_embeds=image_embeds, noise_level=0, **SMALL)
    torch.testing.assert_close(seen.chunk(2)[1], embed(adapter, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("decoder_guidance", [1.0, 4.0])
def test_karlo_with_an_adapter(karlo, adapter, decoder_guidance):
    pipe = load_karlo(adapter, karlo, check=False)
    assert isinstance(pipe, UnCLIPPipeline)
    pipe.set_progress_bar_config(disable=True)
    seen = image_embeddings_seen(pipe, prompt=PROMPT, decoder_guidance_scale=decoder_guidance, **KARLO_STEPS)
    torch.testing.assert_close(seen, karlo_embeds(pipe, adapter, PROMPT), atol=1e-5, rtol=0)


def test_karlo_with_components_and_its_own_prior(karlo, tiny_clip):
    prior = prior_transformer(tiny_clip, DIM)
    projection = UnCLIPTextProjModel.from_pretrained(karlo, subfolder="text_proj")
    pipe = load_karlo(repo=karlo, prior=prior, text_proj=projection)
    assert pipe.prior is prior
    assert pipe.text_proj is projection
    prior.save_pretrained(karlo / "prior")
    assert type(load_karlo(repo=karlo, dtype=torch.bfloat16).prior) is type(prior)


def test_embedding_prior_hands_over_any_embedding(karlo):
    prior = EmbeddingPrior(embedding_dim=DIM)
    pipe = load_karlo(repo=karlo, prior=prior, prior_scheduler=OneShotScheduler())
    pipe.set_progress_bar_config(disable=True)
    prior.image_embeds = torch.randn(2, DIM) * 10
    # whatever the guidance: both halves get the same embedding
    seen = image_embeddings_seen(pipe, prompt=[PROMPT, "a cat"], prior_guidance_scale=4.0, **KARLO_STEPS)
    torch.testing.assert_close(seen, prior.image_embeds, atol=1e-5, rtol=0)
