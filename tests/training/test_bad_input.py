"""What cannot be trained is refused in one sentence, before anything is written."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import training_runs
from tiny import make_plain_store

from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings import write_store
from csdiff.errors import CSDiffError
from csdiff.training import train
from csdiff.training.run_folder import Checkpoints

ABSENT = next(name for name in ("aim", "clearml", "comet_ml", "dvclive", "swanlab") if find_spec(name) is None)


def refused(made, *words):
    with pytest.raises(CSDiffError) as caught:
        train(made)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_steps": -1}, ["max_steps", "-1"]),
        ({"learning_rate": 0.0}, ["learning_rate"]),
        ({"ema.decay": 1.0}, ["ema.decay", "1"]),
        ({"batch_size": 1}, ["--batch_size 1", "at least 2"]),
        ({"data.train": ""}, ["--data.train", "missing"]),
        ({"data.train": "nothing"}, ["--data.train", "does not exist"]),
        ({"data.train": "IMAGES"}, ["--data.train", "expected captions", "metadata.csv (file_name,caption)"]),
        ({"data.validation": "IMAGES"}, ["--data.validation", "expected captions"]),
        ({"data.train": "RUN"}, ["expected images or captions", "is an unfinished training run"]),
        ({"adapter": "mpl"}, ["--adapter mpl", "did you mean mlp?"]),
        ({"objective": "cs-aligner"}, ["--objective cs-aligner", "did you mean cs_aligner?"]),
        ({"adapter_options": {"widht": 3}}, ["--adapter_options", "widht", "did you mean width?"]),
        ({"objective_options": {"bandwith": 1}}, ["--objective_options", "did you mean bandwidth?"]),
        ({"objective_options": {"bandwidth": -1.0}}, ["--objective_options", "bandwidth", "-1"]),
        ({"adapter": "diffusion"}, ["--adapter diffusion", "--objective"]),
        ({"objective": "diffusion"}, ["--adapter mlp", "--objective diffusion"]),
        ({"batch_size": 1000}, ["--batch_size 1000", "58 pairs", "give --batch_size 58"]),
        ({"validation.metric": "text_to_image.r@3"}, ["--validation.metric", "did you mean text_to_image.r@"]),
        ({"logging.trackers": ["tensorbord"]}, ["--logging.trackers", "tensorbord", "tensorboard"]),
        ({"logging.trackers": ["ABSENT"]}, [f"--logging.trackers {ABSENT}", "not installed", "tensorboard"]),
        ({"export": "best", "data.validation_fraction": 0.0}, ["--export best", "held out", "--data.validation"]),
        ({"adapter": "transformer"}, ["text_encoder"]),
        ({"adapter": "transformer", "data.text": "cached"}, ["token states", "none"]),
        ({"adapter": "lora", "data.text_encoder": "CLIP", "data.text": "cached"}, ["lora", "cached text"]),
        ({"objective_options": {"token_weight": 1.0}}, ["--data.text_encoder"]),
        ({"objective": "info_nce", "data.unpaired_image": "STORE"}, ["info_nce", "unpaired", "cs_aligner"]),
        ({"init_from": "nowhere"}, ["nowhere"]),
        ({"resume": "nowhere"}, ["--resume nowhere", "checkpoint"]),
        ({"gradient_checkpointing": True, "adapter": "linear"}, ["--gradient_checkpointing", "LinearAdapter"]),
    ],
)
def test_refused_before_anything_is_written(plain_store, tiny_clip, tmp_path, changes, words):
    for name in ("images/a.png", "run/training.yaml"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    known = {"STORE": str(plain_store), "CLIP": str(tiny_clip), "['ABSENT']": [ABSENT]}
    known |= {"IMAGES": str(tmp_path / "images"), "RUN": str(tmp_path / "run")}
    changes = {name: known.get(str(value), value) for name, value in changes.items()}
    if changes.get("adapter", "mlp") != "mlp":
        changes.setdefault("adapter_options", {})
    refused(training_runs.config(plain_store, tmp_path / "out", **changes), *words)
    assert not (tmp_path / "out").exists()


def test_stores_that_do_not_fit(plain_store, tmp_path):
    wide = make_plain_store(tmp_path / "wide", text_dim=20)
    unit = make_plain_store(tmp_path / "unit", unit_norm=True)
    refused(training_runs.config(plain_store, tmp_path / "out", **{"data.validation": str(wide)}), "20", "16")
    refused(training_runs.config(unit, tmp_path / "out"), "unit-norm", "--data.accept_normalized true")
    mixed = {"data.validation": str(unit), "data.accept_normalized": True}
    refused(training_runs.config(plain_store, tmp_path / "out", **mixed), "unit-norm", "raw")
    images = make_plain_store(tmp_path / "images")
    for file in (images / "text_emb").iterdir():
        file.unlink()
    refused(training_runs.config(images, tmp_path / "out"), "no text embeddings")


def test_stores_of_different_encoders(plain_store, tmp_path):
    stores = []
    for name in ("one", "two"):
        store = make_plain_store(tmp_path / name)
        encoder = {"id": name, "weights_sha256": name * 20}
        content = {"format": 1, "kind": "store", "text_encoder": encoder, "image_encoder": encoder}
        (store / "csdiff.json").write_text(json.dumps(content))
        stores.append(store)
    made = training_runs.config(stores[0], tmp_path / "out", **{"data.validation": str(stores[1])})
    refused(made, "one", "two", "differ")


def test_another_run_in_the_output_folder(plain_store, tmp_path):
    train(training_runs.config(plain_store, tmp_path, max_steps=2))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    other = training_runs.config(plain_store, tmp_path, max_steps=2, learning_rate=1e-4, seed=7)
    message = refused(other, "learning_rate was 0.003, is 0.0001", "seed was 0, is 7", "--resume never")
    assert "batch_size" not in message
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    other.resume = "never"
    train(other)
    assert (tmp_path / "previous-1" / "config.json").read_bytes() == before[tmp_path / "config.json"]


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (0.0, "only zeros")])
def test_a_damaged_row_is_named(tmp_path, value, what):
    store = make_plain_store(tmp_path / "store")
    shard = store / "img_emb" / "img_emb_0.npy"
    rows = np.load(shard)
    rows[5] = value
    np.save(shard, rows)
    made = training_runs.config(store, tmp_path / "out", **{"data.validation_fraction": 0.0})
    refused(made, "row 5 of img_emb/img_emb_0.npy", what, str(store))
    refused(training_runs.config(store, tmp_path / "out"), "row 5 of img_emb/img_emb_0.npy")


@pytest.mark.parametrize("name", ["text_encoder", "files", "data"])
def test_a_fingerprint_of_other_types(tmp_path, name):
    store = make_plain_store(tmp_path / "store")
    (store / "csdiff.json").write_text(json.dumps({"format": 1, "kind": "store", name: "tiny-clip"}))
    refused(training_runs.config(store, tmp_path / "out"), "csdiff.json", name, "tiny-clip")


def test_too_few_rows(tmp_path):
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    images = {"image_embeds": rows.flip(0), "image_ids": [str(row // 4) for row in range(20)]}
    write_store(tmp_path / "images", text_embeds=rows, **images)
    write_store(tmp_path / "same", text_embeds=rows, image_embeds=torch.ones(20, 16))
    write_store(tmp_path / "row", text_embeds=rows[:1], image_embeds=rows[:1])
    no_split = {"data.validation_fraction": 0, "max_steps": 1, "batch_size": 8}
    made = training_runs.config(tmp_path / "images", tmp_path / "out", **no_split)
    refused(made, "--batch_size 8", "5 images", "--data.one_caption_per_image false")
    made.data.one_caption_per_image = False
    train(made)
    refused(training_runs.config(tmp_path / "same", tmp_path / "o", batch_size=4), "20 rows", "--data.validation")
    refused(training_runs.config(tmp_path / "row", tmp_path / "o", **no_split), "1 row", "at least 2")


def test_a_folder_that_is_no_run(tmp_path):
    store = make_plain_store(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for folder, found in ((store, "img_emb"), (tmp_path / "mine", "README.md")):
        for resume in ("auto", "never"):
            refused(
                training_runs.config(store, folder, resume=resume), f"--output_dir {folder}", found, "give another"
            )
    for place in ("README.md", "README.md/below"):
        refused(training_runs.config(store, tmp_path / "mine" / place), "cannot be written")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    LinearAdapter(embedding_dim=16).save_pretrained(tmp_path / "adapter")
    refused(training_runs.config(store, tmp_path / "adapter"), "training.yaml", "another --output_dir")


def test_a_run_that_cannot_go_on(plain_store, tmp_path):
    train(training_runs.config(plain_store, tmp_path, max_steps=4))
    refused(training_runs.config(plain_store, tmp_path, max_steps=2), "--max_steps 2", "4 steps already")
    weights = Checkpoints(tmp_path / "checkpoints").latest() / "state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    refused(training_runs.config(plain_store, tmp_path, max_steps=6), "step-00000004", "cannot be read")
