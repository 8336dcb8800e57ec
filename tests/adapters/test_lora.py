"""LoRA in the text encoder: sizes, plain PEFT, merging, and the two parts a pipeline takes."""

import pytest
import torch
from peft import PeftModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import LoRAAdapter
from tests.adapters.adapter_tester import DIM, make_adapter, token_ids


@pytest.fixture
def adapter(text_encoder):
    return make_adapter("lora", text_encoder)


VIT_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


@pytest.mark.parametrize(("sizes", "millions"), [(VIT_L, 1.33), (BIG_G, 5.90)])
def test_published_sizes(sizes, millions):
    with torch.device("meta"):
        encoder = CLIPTextModelWithProjection(CLIPTextConfig(**sizes, projection_dim=sizes["hidden_size"]))
        adapter = LoRAAdapter(embedding_dim=sizes["hidden_size"], base_model=encoder)
    assert round(adapter.num_parameters(only_trainable=True) / 1e6, 2) == millions
    trained = {n.split(".")[-4] for n, p in adapter.named_parameters() if p.requires_grad}
    assert trained == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_a_fresh_adapter_is_the_frozen_encoder(text_encoder):
    adapter = LoRAAdapter(embedding_dim=DIM, text_encoder=text_encoder).eval()
    plain = CLIPTextModelWithProjection.from_pretrained(text_encoder).eval()
    ids = token_ids()
    torch.testing.assert_close(adapter.embed_input_ids(ids), plain(ids).text_embeds, rtol=1e-5, atol=1e-6)
    adapter.set_statistics(torch.randn(DIM), torch.rand(DIM) + 0.5)
    torch.testing.assert_close(adapter.embed_input_ids(ids), plain(ids).text_embeds, rtol=1e-5, atol=1e-5)


def test_plain_peft_loads_the_folder(adapter, text_encoder, tmp_path):
    adapter.save_pretrained(tmp_path)
    plain = CLIPTextModelWithProjection.from_pretrained(text_encoder)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = token_ids()
    torch.testing.assert_close(loaded(input_ids=ids).text_embeds, adapter.encode(ids)[0], rtol=0, atol=0)
    assert loaded.peft_config["default"].base_model_name_or_path == text_encoder


def test_merged_encoder_is_plain_and_equal(adapter):
    ids = token_ids()
    before = adapter.encode(ids)
    merged = adapter.merged_text_encoder().eval()
    assert type(merged) is CLIPTextModelWithProjection
    assert not any("lora" in name for name, _ in merged.named_parameters())
    output = merged(ids)
    torch.testing.assert_close(output.text_embeds, before[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.last_hidden_state, before[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapter.encode(ids)[0], before[0], rtol=0, atol=0)


def test_encoder_and_prior_together_are_the_adapter(adapter, tmp_path):
    adapter.calibrate_norm(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 3.5]))
    adapter.metadata["metrics"] = {"r": 1}
    ids = token_ids()
    prior = adapter.as_prior()
    expected = adapter.embed_input_ids(ids)
    torch.testing.assert_close(prior.embed(adapter.text_encoder(ids).text_embeds), expected, rtol=0, atol=1e-6)
    prior.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.embed(adapter.encode(ids)[0]), expected, rtol=0, atol=1e-6)
    assert loaded.metadata["metrics"] == {"r": 1}


def test_the_frozen_encoder_is_not_saved(adapter, tmp_path):
    assert not any("text_model" in name and "lora_" not in name for name in adapter.state_dict())
    adapter.save_pretrained(tmp_path)
    frozen = sum(p.numel() * 4 for p in adapter.parameters() if not p.requires_grad)
    saved = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert saved < frozen


def test_training_leaves_the_frozen_encoder_alone(adapter, text_encoder):
    optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=1.0)
    adapter.embed_input_ids(token_ids()).square().mean().backward()
    optimizer.step()
    assert adapter.encode(token_ids())[0].isfinite().all()
    plain = CLIPTextModelWithProjection.from_pretrained(text_encoder).state_dict()
    for name, parameter in adapter.text_encoder.named_parameters():
        if "lora_" not in name:
            assert torch.equal(parameter, plain[name.replace(".base_layer", "")])


def test_an_encoder_in_memory_is_used(adapter, text_encoder, tmp_path):
    adapter.save_pretrained(tmp_path)
    base = CLIPTextModelWithProjection.from_pretrained(text_encoder)
    loaded = AutoAdapter.from_pretrained(tmp_path, base_model=base)
    assert loaded.text_encoder is base
    torch.testing.assert_close(
        loaded.embed_input_ids(token_ids()), adapter.embed_input_ids(token_ids()), rtol=0, atol=0
    )


def test_wrong_targets_and_widths_are_one_sentence(text_encoder, tmp_path):
    with pytest.raises(CSDiffError, match=r"LoRA targets \['to_q'\] do not exist .* linear layers are .*'fc1'"):
        LoRAAdapter(embedding_dim=DIM, text_encoder=text_encoder, target_modules=["q_proj", "to_q"])
    with pytest.raises(CSDiffError, match="targets are empty"):
        LoRAAdapter(embedding_dim=DIM, text_encoder=text_encoder, target_modules=[])
    with pytest.raises(CSDiffError, match=f"projects to {DIM}, found text_dim 8 and embedding_dim 8"):
        LoRAAdapter(embedding_dim=8, text_encoder=text_encoder)
    with pytest.raises(CSDiffError, match="could not be loaded"):
        LoRAAdapter(embedding_dim=8, text_encoder=str(tmp_path / "gone"))
