"""What ships: the data set, the tiny CLIP, the decoder and the adapter are what `assets/README.md` says."""

import json
from collections import defaultdict

import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from diffusers import KandinskyV22Pipeline

from csdiff import AutoAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.resources import assets_dir

ASSETS = assets_dir()
SPLITS = ("train", "combination", "concept")


@pytest.fixture(scope="module")
def rows():
    columns = ["captions", "label", "style", "concept", "split"]
    return {split: pq.read_table(ASSETS / f"data/{split}.parquet", columns=columns).to_pylist() for split in SPLITS}


def test_size_and_licences():
    files = [path for path in ASSETS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 100e6
    assert not [path for path in files if path.suffix in {".bin", ".pt", ".pth", ".ckpt", ".pkl"}]
    licences = (ASSETS / "LICENSES.md").read_text()
    for path in files:
        relative = path.relative_to(ASSETS)
        assert relative.parts[0] in licences, f"{relative} has no source and licence in LICENSES.md"


def test_splits_hold_out_what_they_say(rows):
    styles = defaultdict(set)
    for row in rows["train"]:
        styles[row["concept"]].add(row["style"])
    assert all(row["split"] == split for split in SPLITS for row in rows[split])
    for row in rows["combination"]:
        assert styles[row["concept"]]
        assert row["style"] not in styles[row["concept"]]
    assert not {row["concept"] for row in rows["concept"]} & set(styles)
    total = sum(map(len, rows.values()))
    assert total > 6000
    assert 0.06 < len(rows["combination"]) / total < 0.09
    concepts = {row["concept"] for split in SPLITS for row in rows[split]}
    assert 0.04 < len({row["concept"] for row in rows["concept"]}) / len(concepts) < 0.065


def test_the_models_on_held_out_pictures_as_datasets_reads_them(tmp_path):
    """The tiny CLIP finds them and has a modality gap; the shipped adapter closes it and keeps retrieval."""
    files = {"combination": str(ASSETS / "data/combination.parquet")}
    data = load_dataset("parquet", data_files=files, split="combination", cache_dir=str(tmp_path))
    first = data[0]
    assert first["image"].size == (128, 128)
    assert len(first["captions"]) >= 3
    assert all(first["label"] in caption for caption in first["captions"][:3])
    text = load_text_encoder("tiny-clip").encode([captions[0] for captions in data["captions"]])
    encoder = load_image_encoder("tiny-clip")
    image = torch.cat([encoder.encode(rows["image"]).embeds for rows in data.iter(batch_size=64)])
    raw = embedding_metrics(text.embeds, image)
    assert raw["text_to_image"]["r@10"] >= 0.80
    assert raw["centroid_gap"] > 0.2
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    with torch.no_grad():
        adapted = embedding_metrics(adapter.embed(text.embeds, text.states, text.mask), image)
    assert adapted["centroid_gap"] < 0.3 * raw["centroid_gap"]
    assert adapted["kernel_distance"] < 0.1 * raw["kernel_distance"]
    assert adapted["text_to_image"]["r@10"] > raw["text_to_image"]["r@10"] - 0.03
    assert adapted["norm"]["mean_ratio"] == pytest.approx(1, abs=0.02)
    assert adapted["norm"]["std_ratio"] == pytest.approx(1, abs=0.25)


def test_stock_pipeline_loads_the_decoder_and_the_fingerprints_agree():
    decoder = KandinskyV22Pipeline.from_pretrained(ASSETS / "decoder")
    assert type(decoder) is KandinskyV22Pipeline
    fingerprints = {name: json.loads((ASSETS / name / "csdiff.json").read_text()) for name in ("decoder", "adapter")}
    assert fingerprints["decoder"]["image_encoder"] == fingerprints["adapter"]["image_encoder"]
    assert decoder.unet.config.encoder_hid_dim == fingerprints["adapter"]["image_encoder"]["dim"]


def test_figures_are_recorded():
    figures = json.loads((ASSETS / "figures.json").read_text())
    readme = (ASSETS / "README.md").read_text()
    for split in ("combination", "concept"):
        assert f"{figures['clip'][split]['r@1']:.3f}" in readme
        assert f"{figures['adapter'][split]['adapter']['centroid_gap']:.3f}" in readme


def test_the_record_of_the_shipped_adapter_names_no_place_of_the_machine_that_made_it():
    record = json.loads((ASSETS / "adapter/csdiff.json").read_text())
    assert record["data"]["train"] == "assets/data/train.parquet"
    assert "store" not in record["data"]
