"""Adapter folders: complete, reloadable, written whole."""

import re

import pytest
import torch

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter
from csdiff.adapters.folder import WEIGHTS
from tests.adapters.adapter_tester import DIM, embed, make_adapter, text_inputs

METADATA = {
    "text_encoder": {"id": "some-clip", "dim": DIM},
    "image_encoder": {"id": "some-clip", "dim": DIM},
    "metrics": {"centroid_gap": 0.04, "text_to_image": {"r@1": 0.5}},
    "normalized": False,
}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_round_trip_keeps_answers_and_metadata(adapter, name, tmp_path):
    adapter.metadata = dict(METADATA)
    adapter.calibrate_norm(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.5, 3.5]))
    adapter.save_pretrained(tmp_path / "adapter")
    written = names(tmp_path / "adapter")
    assert {"config.json", "csdiff.json", "README.md", WEIGHTS} <= set(written)
    assert all(file.endswith((".json", ".safetensors", ".md")) for file in written)
    assert names(tmp_path) == ["adapter"]
    direct, info = type(adapter).from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    for loaded in (AutoAdapter.from_pretrained(tmp_path / "adapter"), direct):
        assert type(loaded) is type(adapter)
        assert not loaded.training
        assert torch.equal(embed(loaded, text_inputs(name)), embed(adapter, text_inputs(name)))
        assert {key: loaded.metadata[key] for key in METADATA} == METADATA
        assert loaded.metadata["format"] == 1
        assert loaded.metadata["kind"] == "adapter"
        assert loaded.metadata["versions"]["torch"] == torch.__version__
        assert {n: p.requires_grad for n, p in loaded.named_parameters()} == {
            n: p.requires_grad for n, p in adapter.named_parameters()
        }


@pytest.mark.parametrize(("option", "dtype"), [("dtype", torch.float16), ("torch_dtype", torch.bfloat16)])
def test_loads_in_another_dtype_with_exact_statistics(adapter, tmp_path, option, dtype):
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, **{option: dtype})
    assert {p.dtype for p in loaded.parameters()} <= {dtype}
    assert torch.equal(loaded.clip_mean, adapter.clip_mean)
    loaded.save_pretrained(tmp_path / "cast")
    again = AutoAdapter.from_pretrained(tmp_path / "cast")
    assert torch.equal(again.clip_std, adapter.clip_std)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_sharded_weights_load(adapter, name, tmp_path):
    adapter.save_pretrained(tmp_path, max_shard_size=1000)
    # PEFT has one file, and the statistics of a LoRA adapter are another.
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = AutoAdapter.from_pretrained(tmp_path)
    assert torch.equal(embed(loaded, text_inputs(name)), embed(adapter, text_inputs(name)))
    adapter.save_pretrained(tmp_path)
    assert not [file.name for file in tmp_path.glob("*-of-*")]
    assert not list(tmp_path.glob("*.index.json"))


def test_a_variant_lies_beside_the_weights(adapter, name, tmp_path):
    adapter.save_pretrained(tmp_path / "prior")
    full = embed(adapter, text_inputs(name))
    half = AutoAdapter.from_pretrained(tmp_path / "prior").half()
    for shard in (300, "10GB"):
        half.save_pretrained(tmp_path / "prior", variant="fp16", max_shard_size=shard)
        loaded = AutoAdapter.from_pretrained(tmp_path, subfolder="prior", variant="fp16")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(embed(loaded, text_inputs(name)), embed(half.float(), text_inputs(name)))
        assert torch.equal(embed(AutoAdapter.from_pretrained(tmp_path / "prior"), text_inputs(name)), full)
    with pytest.raises(CSDiffError, match=r"ema.* is missing"):
        AutoAdapter.from_pretrained(tmp_path / "prior", variant="ema")
    # One variant alone needs no name; two do.
    adapter.save_pretrained(tmp_path / "alone", variant="fp16")
    assert torch.equal(embed(AutoAdapter.from_pretrained(tmp_path / "alone"), text_inputs(name)), full)
    adapter.save_pretrained(tmp_path / "alone", variant="ema")
    with pytest.raises(CSDiffError, match="variant"):
        AutoAdapter.from_pretrained(tmp_path / "alone")


def test_saving_again_replaces_and_leaves_foreign_files(tmp_path, text_encoder):
    (tmp_path / "notes.txt").write_text("mine")
    make_adapter("mlp", text_encoder).save_pretrained(tmp_path)
    adapter = make_adapter("mlp", text_encoder, seed=5)
    adapter.save_pretrained(tmp_path)
    assert torch.equal(
        embed(AutoAdapter.from_pretrained(tmp_path), text_inputs("mlp")), embed(adapter, text_inputs("mlp"))
    )
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not [file for file in tmp_path.iterdir() if "partial" in file.name]


def test_a_failing_save_leaves_the_last_one(tmp_path, text_encoder):
    adapter = make_adapter("mlp", text_encoder)
    adapter.save_pretrained(tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    adapter.metadata["data"] = object()
    with pytest.raises(TypeError):
        adapter.save_pretrained(tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
    with pytest.raises(TypeError):
        adapter.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("place", ["file", "below_a_file", "/proc/adapter"])
def test_unwritable_place_is_one_sentence(tmp_path, text_encoder, place):
    (tmp_path / "file").write_text("")
    place = {"file": tmp_path / "file", "below_a_file": tmp_path / "file" / "adapter"}.get(place, place)
    with pytest.raises(CSDiffError, match=f"Cannot save the adapter to {re.escape(str(place))}: "):
        make_adapter("mlp", text_encoder).save_pretrained(place)
    assert names(tmp_path) == ["file"]


def test_pickle_is_never_written(tmp_path):
    with pytest.raises(CSDiffError, match="safetensors only"):
        MLPAdapter(embedding_dim=4).save_pretrained(tmp_path / "adapter", safe_serialization=False)
    MLPAdapter(embedding_dim=4).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


def test_model_card_has_licence_metrics_and_code_that_runs(adapter, tmp_path, monkeypatch, capsys):
    adapter.metadata = {**METADATA, "license": "cc-by-4.0"}
    adapter.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "| text_to_image.r@1 | 0.5 |" in card
    assert "`some-clip`" in card
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert f"torch.Size([1, {DIM}])" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["adapters.md", "loss.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / page).read_text(), re.DOTALL)
    exec("\n".join(blocks), {})
    assert len(blocks) > 2
