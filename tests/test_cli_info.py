"""`csdiff info`: what it says of each kind of folder, and what it finds wrong."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from tiny import make_pairs, make_pictures
from training_runs import config as run_config

from csdiff import AutoAdapter, CSDiffError
from csdiff.cli.info import InfoConfig, as_text, decoders, inspect_path
from csdiff.embeddings import EmbedConfig, StoreWriter, embed, write_store
from csdiff.files import folder_lock
from csdiff.kinds import kind_of
from csdiff.resources import assets_dir
from csdiff.training import train


def inspect(path, check=False):
    return inspect_path(InfoConfig(str(path), check))


@pytest.fixture(scope="module")
def original_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("info") / "store"
    text, image = map(torch.from_numpy, make_pairs(64, 16, 12))
    write_store(folder, text_embeds=text, image_embeds=image, captions=[f"no {index}" for index in range(64)])
    return folder


@pytest.fixture
def store(original_store, tmp_path):
    return shutil.copytree(original_store, tmp_path / "store")


@pytest.fixture
def adapter(tmp_path):
    return shutil.copytree(assets_dir() / "adapter", tmp_path / "adapter")


def test_an_adapter(adapter):
    facts = inspect(adapter, check=True)
    config, metadata = (json.loads((adapter / name).read_text()) for name in ("config.json", "csdiff.json"))
    assert (facts["kind"], facts["class"]) == ("adapter", config["_class_name"])
    assert all(facts[name] == metadata[name] for name in ("text_encoder", "metrics"))
    assert facts["problems"] == []
    assert facts["parameters"] == AutoAdapter.from_pretrained(adapter).num_parameters()
    assert facts["decoders"]["tiny"] == "fits"
    assert "1280" in facts["decoders"]["kandinsky22"]
    text = as_text(facts)
    assert all(word in text for word in ("adapter", "MLPAdapter", "tiny-clip", "text_to_image.r@1", "no problems"))


@pytest.mark.parametrize(
    ("image_encoder", "dim", "fitting"),
    [
        ("openai/clip-vit-large-patch14", 768, {"karlo", "sd-unclip-s"}),
        ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 1024, {"sd-unclip-h", "ip-adapter-sd15"}),
        ("stranger/clip", 768, set()),
    ],
)
def test_the_decoders_that_an_adapter_fits(image_encoder, dim, fitting):
    verdicts = decoders({"embedding_dim": dim, "image_encoder": {"id": image_encoder}, "normalized": False})
    assert fitting <= {name for name, verdict in verdicts.items() if verdict == "fits"}
    assert "fits" not in {verdicts["kandinsky22"], verdicts["tiny"]}
    normalized = decoders({"embedding_dim": dim, "image_encoder": {"id": image_encoder}, "normalized": True})
    assert "fits" not in normalized.values()


def test_a_broken_adapter(adapter):
    weights = next(adapter.glob("*.safetensors"))
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    (adapter / "old.bin").write_bytes(b"\x80\x04")
    (adapter / "csdiff.json").write_text("{")
    problems = inspect(adapter)["problems"]
    for name in (weights.name, "old.bin", "csdiff.json"):
        assert any(name in problem for problem in problems), name
    assert str(problems[0]) in as_text(inspect(adapter))


def test_values_that_are_not_finite_are_found_when_asked(adapter):
    weights = next(adapter.glob("*.safetensors"))
    tensors = load_file(weights)
    name = next(name for name in tensors if tensors[name].ndim == 2)
    tensors[name][0, 0] = np.nan
    save_file(tensors, weights)
    assert inspect(adapter)["problems"] == []
    assert "NaN" in " ".join(inspect(adapter, check=True)["problems"])


def test_a_store(store):
    facts = inspect(store, check=True)
    assert (facts["kind"], facts["rows"], facts["text_dim"], facts["image_dim"]) == ("store", 64, 16, 12)
    assert facts["captions"] is True
    assert facts["statistics"]["norm_mean"] == pytest.approx(10, rel=0.01)
    assert facts["problems"] == []
    assert facts["bytes"] == sum(file.stat().st_size for file in store.rglob("*") if file.is_file())


def test_what_a_store_left_out(tmp_path, tiny_clip):
    make_pictures(tmp_path, 3)
    (tmp_path / "2.png").write_bytes(b"no picture")
    options = {"text_encoder": str(tiny_clip), "image_encoder": str(tiny_clip), "max_skipped": 0.5, "progress": False}
    embed(EmbedConfig(source=str(tmp_path), output=str(tmp_path / "store"), **options))
    facts = inspect(tmp_path / "store")
    assert (facts["items"], facts["rows"], sum(facts["left_out"].values())) == (3, 2, 1)


def test_missing_and_damaged_shards(store):
    shard = next((store / "img_emb").glob("*.npy"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert inspect(store)["problems"] == []
    assert "sha256" in inspect(store, check=True)["problems"][0]
    shard.unlink()
    assert any(f"{shard} is missing" in problem for problem in inspect(store)["problems"])


def test_a_plain_store(plain_store):
    facts = inspect(plain_store)
    assert (facts["rows"], facts["normalized"], facts["captions"]) == (64, False, True)
    assert "clip-retrieval" in facts["layout"]
    assert facts["problems"] == []


def test_a_run_and_its_checkpoints(plain_store, tmp_path):
    folder = tmp_path / "run"
    train(run_config(plain_store, folder, **{"checkpoint.keep": 0, "validation.every": 0}))
    facts = inspect(folder, check=True)
    assert (facts["kind"], facts["finished"], facts["steps"]) == ("run", True, 12)
    assert facts["checkpoints"] == [4, 8, 12]
    assert (facts["running"], facts["problems"]) == (False, [])
    checkpoint = inspect(folder / "checkpoints" / "step-00000008")
    assert (checkpoint["kind"], checkpoint["progress"]["step"]) == ("checkpoint", 8)
    (folder / "checkpoints" / "step-00000004" / "state" / "optimizer.safetensors").write_bytes(b"half")
    shutil.copy(assets_dir() / "adapter" / "config.json", folder)
    assert any("found another in its place" in problem for problem in inspect(folder)["problems"])
    (folder / "config.json").unlink()
    assert any("step-00000004" in problem for problem in inspect(folder, check=True)["problems"])
    shutil.rmtree(folder / "checkpoints")
    assert "no checkpoint" in inspect(folder)["problems"][0]
    with folder_lock(folder, "a training run"):
        assert (inspect(folder)["running"], inspect(folder)["problems"]) == (True, [])
    assert not (folder / ".lock").exists()


def test_a_store_that_is_not_finished(tmp_path):
    with StoreWriter(tmp_path / "store", 1) as writer:
        writer.begin({})
        facts = inspect(tmp_path / "store")
        assert (facts["layout"], facts["problems"]) == ("csdiff, being written", [])
    facts = inspect(tmp_path / "store")
    assert facts["layout"] == "csdiff, not finished"
    assert "same `csdiff embed`" in facts["problems"][0]


def test_a_decoder_and_an_encoder(tiny_decoder, tiny_clip, tmp_path):
    facts = inspect(tiny_decoder, check=True)
    assert (facts["kind"], facts["class"]) == ("decoder", "KandinskyV22Pipeline")
    assert (facts["decoder"]["hand_over"], facts["decoder"]["embedding_dim"]) == ("kandinsky", 16)
    assert set(facts["components"]) == {"unet", "movq", "scheduler"}
    assert facts["problems"] == []
    assert (inspect(tiny_clip)["kind"], inspect(tiny_clip)["projection_dim"]) == ("encoder", 16)
    broken = shutil.copytree(tiny_decoder, tmp_path / "decoder")
    next((broken / "unet").glob("*.safetensors")).unlink()
    shutil.rmtree(broken / "movq")
    assert [name for name in ("unet", "movq") if name in " ".join(inspect(broken)["problems"])] == ["unet", "movq"]


@pytest.mark.parametrize("make", [lambda path: path / "nothing", lambda path: path])
def test_what_is_not_known_is_one_sentence(tmp_path, make):
    with pytest.raises(CSDiffError, match="path: expected"):
        inspect(make(tmp_path))


def test_adapters_of_diffusers_are_none_of_ours(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "T2IAdapter", "in_channels": 3}))
    assert kind_of(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "MLPAdapter", "embedding_dim": 8}))
    assert kind_of(tmp_path) == "adapter"
