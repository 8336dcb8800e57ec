"""The diffusion prior: stock weights, a loss that is the stated one, samples that follow the data."""

import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer

from csdiff import CSDiffError
from csdiff.adapters import DiffusionAdapter, build_adapter
from tests.adapters.adapter_tester import DIM, STATES_DIM, TOKENS, make_adapter, text_inputs

SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


def test_stock_diffusers_loads_the_folder(tmp_path):
    adapter = build_adapter("diffusion", embedding_dim=DIM, num_embeddings=TOKENS, **SMALL).eval()
    adapter.set_statistics(torch.randn(DIM), torch.rand(DIM) + 0.5)
    adapter.save_pretrained(tmp_path)
    stock = PriorTransformer.from_pretrained(tmp_path)
    latents, embeds, states = torch.randn(2, DIM), torch.randn(2, DIM), torch.randn(2, TOKENS, DIM)
    mask = torch.ones(2, TOKENS, dtype=torch.bool)
    assert torch.equal(stock(latents, 9, embeds, states, mask)[0], adapter(latents, 9, embeds, states, mask)[0])
    assert torch.equal(stock.post_process_latents(latents), adapter.post_process_latents(latents))


def test_statistics_are_buffers_not_parameters(text_encoder):
    names = {name for name, _ in make_adapter("diffusion", text_encoder).named_parameters()}
    assert not names & {"clip_mean", "clip_std"}


def test_loss_is_the_error_of_the_clean_embedding(text_encoder):
    adapter = make_adapter("diffusion", text_encoder, condition_dropout=0.0)
    inputs, image = text_inputs("diffusion"), torch.randn(3, DIM)
    loss = adapter.training_loss(inputs[0], image, *inputs[1:], generator=torch.Generator().manual_seed(4))
    generator = torch.Generator().manual_seed(4)
    steps = torch.randint(1000, (3,), generator=generator)
    noise = torch.randn(3, DIM, generator=generator)
    kept = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod[steps][:, None]
    clean = (image - adapter.clip_mean) / adapter.clip_std
    predicted = adapter(kept.sqrt() * clean + (1 - kept).sqrt() * noise, steps, *inputs)[0]
    torch.testing.assert_close(loss, (predicted - clean).square().mean(), rtol=1e-5, atol=1e-6)


def test_dropped_rows_see_no_text(text_encoder):
    adapter = make_adapter("diffusion", text_encoder, condition_dropout=1.0)
    losses = []
    for seed in (1, 8):
        inputs, generator = text_inputs("diffusion", seed=seed), torch.Generator().manual_seed(0)
        losses.append(adapter.training_loss(inputs[0], torch.ones(3, DIM), *inputs[1:], generator=generator))
    assert torch.equal(*losses)


def test_guidance_of_one_is_no_guidance_and_more_extrapolates(text_encoder):
    adapter = make_adapter("diffusion", text_encoder)
    inputs = text_inputs("diffusion")

    def sample(scale, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return adapter.embed(*inputs, guidance_scale=scale, num_inference_steps=4, generator=generator)

    assert torch.equal(sample(1.0), sample(1.0))
    assert not torch.equal(sample(1.0), sample(1.0, seed=1))
    assert not torch.allclose(sample(1.0), sample(4.0), atol=1e-4)


def test_trained_samples_follow_the_text():
    torch.manual_seed(0)
    adapter = build_adapter("diffusion", embedding_dim=4, encoder_hid_proj_type=None, condition_dropout=0.0, **SMALL)
    assert not adapter.uses_text_states
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    for _ in range(150):
        text = torch.randn(64, 4)
        loss = adapter.training_loss(text, text.roll(1, dims=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        text = torch.randn(64, 4)
        image = adapter.eval().embed(text, num_inference_steps=10)
    assert torch.cosine_similarity(image, text.roll(1, dims=1)).mean() > 0.8


def test_bad_inputs_are_one_sentence(text_encoder):
    adapter = make_adapter("diffusion", text_encoder)
    embeds, states, mask = text_inputs("diffusion")
    with pytest.raises(CSDiffError, match="needs the text encoder's token states"):
        adapter.embed(embeds)
    with pytest.raises(CSDiffError, match=f"exactly {TOKENS} text tokens, found 5"):
        adapter.embed(embeds, states[:, :5], mask[:, :5])
    with pytest.raises(CSDiffError, match=rf"\(B, L, {STATES_DIM}\)"):
        adapter.embed(embeds, states[..., :4], mask)
    with pytest.raises(CSDiffError, match="`clip_embed_dim` follow"):
        DiffusionAdapter(embedding_dim=8, clip_embed_dim=4)
