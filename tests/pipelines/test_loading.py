"""`load_adapter`: what it refuses, and adapters that are more than a prior."""

import pytest
import torch
from diffusers import KandinskyV22PriorPipeline, UnCLIPScheduler
from PIL import Image
from tiny import make_lora
from tiny_pipelines import DIM, PROMPT, build, clip_parts, karlo_folder, random_adapter, random_transformer

from csdiff import CSDiffError, load_adapter
from csdiff.adapters import DiffusionAdapter
from csdiff.pipelines import CSDiffPriorPipeline, load_karlo


@pytest.fixture
def pipe(tiny_clip):
    """A stock prior pipeline."""
    return build("KandinskyV22PriorPipeline", tiny_clip)


@pytest.fixture
def lora(metadata, tiny_clip):
    adapter = make_lora(tiny_clip, metadata)
    adapter.set_statistics(torch.randn(DIM), torch.rand(DIM) + 0.5, torch.randn(DIM), torch.rand(DIM) + 0.5)
    adapter.calibrate_norm(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.5]))
    return adapter


@pytest.fixture
def diffusion(metadata, encoders):
    size = {"states_dim": encoders["text"].states_dim, "num_embeddings": encoders["text"].max_length}
    size |= {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
    adapter = DiffusionAdapter(embedding_dim=DIM, **size).eval()
    adapter.metadata = dict(metadata)
    return adapter


def test_lora_brings_its_text_encoder_and_is_saved_merged(pipe, lora, tiny_clip, tmp_path):
    tokens = pipe.tokenizer(PROMPT, padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = lora.embed_input_ids(tokens.input_ids)
    load_adapter(pipe, lora)
    for prior in (pipe, CSDiffPriorPipeline(lora, **clip_parts(tiny_clip))):
        torch.testing.assert_close(prior(PROMPT).image_embeds, expected, atol=1e-5, rtol=1e-5)
    pipe.save_pretrained(tmp_path)
    assert any("lora_" in name for name, _ in lora.named_parameters()), "what is merged is a copy"
    reloaded = KandinskyV22PriorPipeline.from_pretrained(tmp_path)
    seen = reloaded(PROMPT, num_inference_steps=1, guidance_scale=1.0).image_embeds
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert reloaded.prior.metadata["text_encoder"] == lora.metadata["text_encoder"]


def test_lora_leaves_the_decoders_text_encoder_alone(lora, tiny_clip, tmp_path):
    pipe = build("StableUnCLIPPipeline", tiny_clip)
    own = pipe.text_encoder
    load_adapter(pipe, lora)
    assert pipe.text_encoder is own
    assert pipe.prior_text_encoder is not own
    with pytest.raises(CSDiffError, match="one text encoder for prior and decoder"):
        load_karlo(lora, karlo_folder(tmp_path, tiny_clip), check=False)


def test_text_states_and_masks_reach_the_transformer(pipe, encoders, metadata, embed):
    adapter = random_transformer(encoders["text"], metadata)
    prompts = ["a cat", "a rather longer prompt", ""]
    seen = load_adapter(pipe, adapter)(prompts).image_embeds
    torch.testing.assert_close(seen, embed(adapter, *prompts), atol=1e-5, rtol=1e-5)


def test_a_noise_token_draws_from_the_generator(pipe, encoders, metadata):
    parts = {name: part for name, part in pipe.components.items() if name not in ("prior", "scheduler")}
    ours = CSDiffPriorPipeline(random_transformer(encoders["text"], metadata, noise_token=True), **parts)

    def draw(seed, **options):
        return ours(PROMPT, num_images_per_prompt=2, generator=torch.Generator().manual_seed(seed), **options)

    assert torch.equal(draw(0).image_embeds, draw(0).image_embeds)
    assert not torch.equal(draw(0).image_embeds, draw(1).image_embeds)
    assert not torch.equal(*draw(0).image_embeds)
    # a negative prompt does not change what the prompt gives
    torch.testing.assert_close(draw(0).image_embeds, draw(0, negative_prompt="blurry").image_embeds)


def test_a_diffusion_adapter_gets_its_scheduler_and_many_steps(pipe, encoders, diffusion, tiny_clip):
    load_adapter(pipe, diffusion)
    assert isinstance(pipe.scheduler, UnCLIPScheduler)
    text = encoders["text"].encode([PROMPT])
    with torch.no_grad():
        options = {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
        expected = diffusion.embed(text.embeds, text.states, text.mask, **options)
    seen = pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen.image_embeds, expected, atol=1e-4, rtol=1e-4)
    stable = load_adapter(build("StableUnCLIPPipeline", tiny_clip), diffusion)
    stable(PROMPT, prior_num_inference_steps=3, num_inference_steps=1, output_type="np")
    assert len(stable.prior_scheduler.timesteps) == 3


def test_starting_at_a_picture_is_for_diffusion_adapters(tiny_clip, adapter, diffusion):
    pipe = build("KandinskyV22PriorEmb2EmbPipeline", tiny_clip)
    prior = pipe.prior
    with pytest.raises(CSDiffError, match=r"starts denoising at a picture.* CSDiffPriorPipeline\.interpolate"):
        load_adapter(pipe, adapter)
    assert pipe.prior is prior
    load_adapter(pipe, diffusion)
    picture = Image.new("RGB", (32, 32), "red")
    output = pipe(PROMPT, image=picture, num_inference_steps=4, strength=0.5, guidance_scale=1.0)
    assert output.image_embeds.shape == (1, DIM)
    assert output.image_embeds.isfinite().all()


def test_from_an_adapter_folder(adapter_folder, adapter, embed, zero_image_embeds, tmp_path):
    prior = CSDiffPriorPipeline.from_pretrained(adapter_folder)
    image_embeds, negative_image_embeds = prior(PROMPT).to_tuple()
    torch.testing.assert_close(image_embeds, embed(adapter, PROMPT), atol=1e-5, rtol=0)
    torch.testing.assert_close(negative_image_embeds, zero_image_embeds, atol=1e-5, rtol=0)
    half = CSDiffPriorPipeline.from_pretrained(adapter_folder, torch_dtype=torch.bfloat16)
    assert half.text_encoder.dtype == half.prior.dtype == torch.bfloat16
    random_adapter().save_pretrained(tmp_path / "adapter")
    with pytest.raises(CSDiffError, match="names no text encoder"):
        CSDiffPriorPipeline.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dim": 24}, "makes image embeddings of 24 .* takes 16"),
        ({"text_dim": 24}, "text embeddings of 24 .* gives 16"),
    ],
)
def test_other_dimensions_are_refused(pipe, options, words):
    prior = pipe.prior
    with pytest.raises(CSDiffError, match=words):
        load_adapter(pipe, random_adapter(**options))
    assert pipe.prior is prior


@pytest.mark.parametrize("tower", ["text_encoder", "image_encoder"])
def test_other_encoders_are_refused_unless_told_otherwise(pipe, adapter, metadata, tower):
    adapter.metadata = {**metadata, tower: {"id": "elsewhere/clip", "weights_sha256": "0" * 64}}
    words = rf"{tower.replace('_', ' ')} .* is not that of the adapter \(elsewhere/clip\)"
    with pytest.raises(CSDiffError, match=words):
        load_adapter(pipe, adapter)
    assert load_adapter(pipe, adapter, check=False).prior is adapter
