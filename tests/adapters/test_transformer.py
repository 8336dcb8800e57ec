"""The transformer adapter: sizes, masks, noise, and that diffusers' LoRA tools take it."""

import pytest
import torch

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
    draw = lambda seed: adapter.embed(embeds, states, mask, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.allclose(draw(0), draw(1), atol=1e-3)
    one_prompt = (embeds[:1].repeat(2, 1), states[:1].repeat(2, 1, 1), mask[:1].repeat(2, 1))
    first, second = adapter.embed(*one_prompt, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(first, second, atol=1e-3)
    # A pipeline hands its latents over: they are the noise, so its generator decides.
    latents = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    whitened = adapter(latents, 0, embeds, states, mask)[0]
    torch.testing.assert_close(adapter.post_process_latents(whitened), draw(0), rtol=0, atol=0)


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


def test_states_are_required_and_checked(adapter):
    embeds, states, _ = text_inputs("transformer")
    with pytest.raises(CSDiffError, match="needs the text encoder's token states"):
        adapter.embed(embeds)
    with pytest.raises(CSDiffError, match=rf"\(B, L, {STATES_DIM}\), found \(3, {TOKENS}, 3\)"):
        adapter.embed(embeds, states[..., :3])
    with pytest.raises(CSDiffError, match=rf"at most {TOKENS} text tokens, found {2 * TOKENS}"):
        adapter.embed(embeds, states.repeat(1, 2, 1))
    for wrong in (states, token_embeds()[:, 1:]):
        with pytest.raises(CSDiffError, match=rf"\(3, {TOKENS}, {DIM}\), found \(3, "):
            adapter.embed_with_tokens(embeds, wrong, states)


def test_diffusers_lora_layers_train(adapter, tmp_path):
    from peft import LoraConfig

    inputs = text_inputs("transformer")
    before = adapter.embed(*inputs)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    adapter.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    changed = adapter.embed(*inputs)
    assert not torch.allclose(changed, before, atol=1e-4)
    adapter.save_lora_adapter(tmp_path)
    adapter.delete_adapters("default")
    torch.testing.assert_close(adapter.embed(*inputs), before, rtol=0, atol=1e-6)
    adapter.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    torch.testing.assert_close(adapter.embed(*inputs), changed, rtol=0, atol=1e-6)
