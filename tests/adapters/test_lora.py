"""LoRA in the text encoder: sizes, plain PEFT, merging, and the two parts a pipeline takes."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection
from transformers.utils import logging

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import LoRAAdapter
from csdiff.embeddings.fingerprint import weights_sha256
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
    # The frozen encoder is not saved.
    frozen = sum(p.numel() * 4 for p in adapter.parameters() if not p.requires_grad)
    assert sum(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < frozen
    plain = CLIPTextModelWithProjection.from_pretrained(text_encoder)
    loaded = PeftModel.from_pretrained(plain, tmp_path).eval()
    ids = token_ids()
    torch.testing.assert_close(loaded(input_ids=ids).text_embeds, adapter.encode(ids)[0], rtol=0, atol=0)
    assert loaded.peft_config["default"].base_model_name_or_path == text_encoder


def test_half_precision_weights_on_disk_train_in_float32(text_encoder, tmp_path):
    """A float16 folder gives what a float32 folder of the same values gives, bit for bit, after a step of training."""
    half = CLIPTextModelWithProjection.from_pretrained(text_encoder).half()
    half.save_pretrained(tmp_path / "half")
    half.float().save_pretrained(tmp_path / "full")
    trained = []
    for name in ("half", "full"):
        adapter = make_adapter("lora", str(tmp_path / name))
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        optimizer = torch.optim.AdamW([p for p in adapter.parameters() if p.requires_grad], lr=1e-4)
        adapter.embed_input_ids(token_ids()).square().mean().backward()
        optimizer.step()
        adapter.save_pretrained(tmp_path / f"{name}-adapter")
        trained.append(AutoAdapter.from_pretrained(tmp_path / f"{name}-adapter").embed_input_ids(token_ids()))
    assert torch.equal(*trained)


@pytest.mark.filterwarnings("error")
def test_loading_says_nothing(adapter, text_encoder, tmp_path, caplog):
    """A folder with both towers: transformers reports the tensors of the other one, in colour, to a pipe too."""
    adapter.save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        CLIPTextModelWithProjection.from_pretrained(text_encoder)
        assert caplog.records
        caplog.clear()
        AutoAdapter.from_pretrained(tmp_path)
    finally:
        logging.disable_propagation()
    assert not caplog.records


def test_a_relative_or_moved_encoder_is_found(text_encoder, tmp_path, monkeypatch):
    """Named relatively, loaded from another directory; moved, named again; another model in its place is refused."""
    shutil.copytree(text_encoder, tmp_path / "clip")
    monkeypatch.chdir(tmp_path)
    adapter = make_adapter("lora", "clip")
    weights = {"weights_sha256": weights_sha256("clip", "text")}
    adapter.metadata["text_encoder"] = {"id": str(tmp_path / "clip"), **weights}
    adapter.save_pretrained("runs/l")
    expected = adapter.embed_input_ids(token_ids())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert torch.equal(AutoAdapter.from_pretrained("../runs/l").embed_input_ids(token_ids()), expected)
    (tmp_path / "clip").rename(tmp_path / "moved")
    with pytest.raises(CSDiffError, match=r"clip.*text_encoder="):
        AutoAdapter.from_pretrained("../runs/l")
    loaded = AutoAdapter.from_pretrained("../runs/l", text_encoder="../moved")
    assert torch.equal(loaded.embed_input_ids(token_ids()), expected)
    assert loaded.metadata["text_encoder"] == {"id": str(tmp_path / "moved"), "revision": None, **weights}
    other = CLIPTextModelWithProjection.from_pretrained("../moved")
    other.text_projection.weight.data += 1
    other.save_pretrained("../other")
    with pytest.raises(CSDiffError, match="other"):
        AutoAdapter.from_pretrained("../runs/l", text_encoder="../other")


def test_an_encoder_that_only_the_folder_names_is_not_fetched(text_encoder, tmp_path, monkeypatch):
    make_adapter("lora", text_encoder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_encoder": "stranger/clip"}))
    monkeypatch.setattr("csdiff.embeddings.encoders.download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CSDiffError, match=r"stranger/clip.*--text_encoder"):
        AutoAdapter.from_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, text_encoder=text_encoder)
    assert loaded.config.text_encoder == text_encoder


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
    with pytest.raises(CSDiffError, match="gone: "):
        LoRAAdapter(embedding_dim=8, text_encoder=str(tmp_path / "gone"))
