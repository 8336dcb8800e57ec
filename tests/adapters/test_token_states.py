"""Adapters that read token states: the transformer, one-shot or with a noise token, and the diffusion prior."""

import pytest
import torch
from diffusers import DDPMScheduler, PriorTransformer

from csdiff import CSDiffError
from csdiff.adapters import TransformerAdapter, build_adapter
from tests.adapters.adapter_tester import DIM, STATES_DIM, TOKENS, make_adapter, text_inputs


@pytest.mark.parametrize("noise_token", [False, True])
@pytest.mark.parametrize(("preset", "millions"), [("eclipse-768", 33.1), ("eclipse-1280", 34.2)])
def test_presets_have_the_published_sizes(preset, millions, noise_token):
    with torch.device("meta"):
        adapter = TransformerAdapter.from_preset(preset, noise_token=noise_token)
    assert round(adapter.num_parameters() / 1e6, 1) == millions
    assert len(adapter.transformer_blocks) == 10
    assert adapter.config.num_attention_heads * adapter.config.attention_head_dim == 16 * 32


@pytest.fixture
def adapter(text_encoder):
    return make_adapter("transformer", text_encoder)


@pytest.mark.parametrize("left", [False, True])
def test_tokens_are_seen_and_padding_is_not(adapter, left):
    embeds, states, mask = text_inputs("transformer")
    mask = mask.flip(1) if left else mask
    expected = adapter.embed(embeds, states, mask)
    torch.testing.assert_close(adapter.embed(embeds, states, mask.long()), expected, rtol=0, atol=0)
    changed = torch.where(mask[..., None], states, 1e3).requires_grad_()
    found = adapter.embed(embeds, changed, mask)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    found.square().sum().backward()
    assert torch.equal(changed.grad.abs().sum(-1) > 0, mask)
    assert adapter.embed(embeds, states, torch.zeros_like(mask)).isfinite().all()


def test_noise_token_samples_and_repeats(text_encoder):
    adapter = make_adapter("transformer", text_encoder, noise_token=True)
    embeds, states, mask = text_inputs("transformer", batch=2)
    draws = [adapter.embed(embeds, states, mask, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    assert not torch.allclose(*draws, atol=1e-3)
    # A pipeline hands its latents over: they are the noise, so its generator decides.
    latents = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    whitened = adapter(latents, 0, embeds, states, mask)[0]
    torch.testing.assert_close(adapter.post_process_latents(whitened), draws[0], rtol=0, atol=0)


def token_embeds():
    return torch.randn(3, TOKENS, DIM, generator=torch.Generator().manual_seed(9))


@pytest.mark.parametrize("noise_token", [False, True])
def test_tokens_are_read_beside_the_caption(text_encoder, noise_token):
    adapter = make_adapter("transformer", text_encoder, noise_token=noise_token)
    adapter.calibrate_norm(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 4.0, 5.0]))
    embeds, states, mask = text_inputs("transformer")
    tokens = token_embeds()
    torch.manual_seed(0)
    expected = adapter.embed(embeds, states, mask)
    torch.manual_seed(0)
    caption, mapped = adapter.embed_with_tokens(embeds, tokens, states, mask)
    assert torch.equal(caption, expected)
    assert mapped.shape == (3, TOKENS, DIM)
    # A row alone is cut to another length; neither that nor what the padding holds is seen.
    changed = torch.where(mask[..., None], states, 1e3)
    for row in range(3):
        one = slice(row, row + 1)
        alone = adapter.embed_with_tokens(embeds[one], tokens[one], changed[one], mask[one])[1]
        assert alone.shape == (1, TOKENS, DIM)
        torch.testing.assert_close(alone[0, mask[row]], mapped[row, mask[row]], rtol=1e-5, atol=1e-5)


def test_a_token_knows_those_before_it(adapter):
    embeds, states, _ = text_inputs("transformer")
    expected = adapter.embed_with_tokens(embeds, token_embeds(), states)[1]
    later, first = states.clone(), states.clone()
    later[:, 5:] += 1
    first[:, 0] += 1
    mapped = adapter.embed_with_tokens(embeds + 1, token_embeds(), later)[1]
    torch.testing.assert_close(mapped[:, :5], expected[:, :5], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mapped[:, 5], expected[:, 5], atol=1e-3)
    mapped = adapter.embed_with_tokens(embeds, token_embeds(), first)[1]
    assert not torch.allclose(mapped[:, 1:], expected[:, 1:], atol=1e-3)


@pytest.mark.parametrize("text_dim", [DIM, 20])
def test_a_fresh_adapter_maps_tokens_as_captions(text_dim):
    adapter = build_adapter("transformer", embedding_dim=DIM, text_dim=text_dim, preset="tiny")
    linear = build_adapter("linear", embedding_dim=DIM, text_dim=text_dim)
    adapter.init_from(linear)
    tokens, states = torch.randn(4, 5, text_dim), torch.randn(4, 5, text_dim)
    mapped = adapter.embed_with_tokens(tokens[:, 0], tokens, states)[1]
    torch.testing.assert_close(mapped, linear.embed(tokens.flatten(0, 1)).view(4, 5, DIM), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "count", "rule"),
    [("transformer", 2 * TOKENS, f"at most {TOKENS}"), ("diffusion", 5, f"exactly {TOKENS}")],
)
def test_token_states_are_required_and_checked(text_encoder, name, count, rule):
    adapter = make_adapter(name, text_encoder)
    embeds, states, _ = text_inputs(name)
    with pytest.raises(CSDiffError, match="needs the text encoder's token states"):
        adapter.embed(embeds)
    with pytest.raises(CSDiffError, match=rf"\(B, L, {STATES_DIM}\), found \(3, {TOKENS}, 3\)"):
        adapter.embed(embeds, states[..., :3])
    with pytest.raises(CSDiffError, match=f"{rule} text tokens, found {count}"):
        adapter.embed(embeds, states.repeat(1, 2, 1)[:, :count])


def test_tokens_of_another_shape_are_refused(adapter):
    embeds, states, _ = text_inputs("transformer")
    for wrong in (states, token_embeds()[:, 1:]):
        with pytest.raises(CSDiffError, match=rf"\(3, {TOKENS}, {DIM}\), found \(3, "):
            adapter.embed_with_tokens(embeds, wrong, states)


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
