"""What cannot be trained is refused in one sentence, before anything is written."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tiny import make_plain_store, make_tiny_clip
from training_runs import SMALL, config

from csdiff.adapters.linear import LinearAdapter
from csdiff.embeddings import write_store
from csdiff.errors import CSDiffError
from csdiff.training import train
from csdiff.training.run_folder import Checkpoints, RunFolder

ABSENT = next(name for name in ("aim", "clearml", "comet_ml", "dvclive", "swanlab") if find_spec(name) is None)


def refused(store, output, *words, **changes):
    """The message of a run that ends in one sentence with these words."""
    with pytest.raises(CSDiffError) as caught:
        train(config(store, output, **changes))
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ema.decay": 1.0}, ["ema.decay", "1"]),
        ({"batch_size": 1}, ["--batch_size 1", "at least 2"]),
        ({"data.train": ""}, ["--data.train", "missing"]),
        ({"data.train": "nothing"}, ["--data.train", "does not exist"]),
        ({"data.train": "IMAGES"}, ["--data.train", "expected captions", "metadata.csv (file_name,caption)"]),
        ({"data.validation": "IMAGES"}, ["--data.validation", "expected captions"]),
        ({"data.train": "RUN"}, ["expected images or captions", "is an unfinished training run"]),
        ({"adapter": "mpl"}, ["--adapter mpl", "did you mean mlp?"]),
        ({"objective": "cs-aligner"}, ["--objective cs-aligner", "did you mean cs_aligner?"]),
        ({"adapter_options": {"widht": 3}, "batch_size": 1000}, ["--adapter_options", "widht", "did you mean width?"]),
        (
            {"objective_options": {"bandwith": 1}, "data.train": "nothing"},
            ["--objective_options", "did you mean bandwidth?"],
        ),
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
        ({"init_from": "rigde"}, ["--init_from rigde", "adapter folder", "did you mean ridge?"]),
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
    refused(plain_store, tmp_path / "out", *words, **changes)
    assert not (tmp_path / "out").exists()


TOKENS = {"adapter": "transformer", "adapter_options": SMALL, "objective_options": {"token_weight": 0.5}}


@pytest.mark.parametrize(
    ("store", "changes", "words"),
    [
        ("pooled", TOKENS, ["image tokens", "has none"]),
        ("pooled", {**TOKENS, "data.images": "IMAGES", "image_adapter": "mlp"}, ["maps pooled embeddings only"]),
        ("pooled", {**TOKENS, "adapter": "diffusion", "objective": "diffusion"}, ["diffusion takes none"]),
        (
            "rich",
            {"adapter": "transformer", "adapter_options": SMALL, "data.unpaired_text": "POOLED"},
            ["unpaired_text", "no text_states"],
        ),
        *(
            ("pooled", {"data.text_encoder": "OTHER", "data.text": text}, ["text encoder"])
            for text in ("cached", "online")
        ),
    ],
)
def test_refused_where_encoders_and_tokens_do_not_fit(
    rich_store, pooled_store, pictures, tmp_path, store, changes, words
):
    other = make_tiny_clip(tmp_path / "clip", seed=5)
    known = {"IMAGES": str(pictures), "POOLED": str(pooled_store), "OTHER": str(other)}
    changes = {name: known.get(str(value), value) for name, value in changes.items()}
    refused({"pooled": pooled_store, "rich": rich_store}[store], tmp_path / "out", *words, batch_size=16, **changes)
    assert not (tmp_path / "out").exists()


def test_stores_that_do_not_fit(plain_store, tmp_path):
    wide = make_plain_store(tmp_path / "wide", text_dim=20)
    unit = make_plain_store(tmp_path / "unit", unit_norm=True)
    images, out = make_plain_store(tmp_path / "images"), tmp_path / "out"
    for file in (images / "text_emb").iterdir():
        file.unlink()
    refused(plain_store, out, "20", "16", **{"data.validation": str(wide)})
    refused(unit, out, "unit-norm", "--data.accept_normalized true")
    mixed = {"data.validation": str(unit), "data.accept_normalized": True}
    refused(plain_store, out, "unit-norm", "raw", **mixed)
    refused(images, out, "no text embeddings")


def test_stores_of_different_encoders(tmp_path):
    for name in ("one", "two"):
        encoder = {"id": name, "weights_sha256": name * 20}
        content = {"format": 1, "kind": "store", "text_encoder": encoder, "image_encoder": encoder}
        (make_plain_store(tmp_path / name) / "csdiff.json").write_text(json.dumps(content))
    other = {"data.validation": str(tmp_path / "two")}
    refused(tmp_path / "one", tmp_path / "out", "one", "two", "differ", **other)


def test_another_run_in_the_output_folder(plain_store, tmp_path):
    train(config(plain_store, tmp_path, max_steps=2))
    before = content(tmp_path)
    other = {"max_steps": 2, "learning_rate": 1e-4, "seed": 7}
    words = "learning_rate was 0.003, is 0.0001", "seed was 0, is 7", "--resume never"
    assert "batch_size" not in refused(plain_store, tmp_path, *words, **other)
    assert content(tmp_path) == before
    train(config(plain_store, tmp_path, **other, resume="never"))
    assert (tmp_path / "previous-1" / "config.json").read_bytes() == before[tmp_path / "config.json"]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (0.0, "only zeros")])
def test_a_damaged_row_is_named(tmp_path, value, what):
    store = make_plain_store(tmp_path / "store")
    shard = store / "img_emb" / "img_emb_0.npy"
    rows = np.load(shard)
    rows[5] = value
    np.save(shard, rows)
    words = "row 5 of img_emb/img_emb_0.npy", what, str(store)
    for fraction in (0.0, 0.05):
        refused(store, tmp_path / "out", *words, **{"data.validation_fraction": fraction})


def test_too_few_rows(tmp_path):
    rows = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    images = {"image_embeds": rows.flip(0), "image_ids": [str(row // 4) for row in range(20)]}
    write_store(tmp_path / "images", text_embeds=rows, **images)
    write_store(tmp_path / "same", text_embeds=rows, image_embeds=torch.ones(20, 16))
    write_store(tmp_path / "row", text_embeds=rows[:1], image_embeds=rows[:1])
    no_split = {"data.validation_fraction": 0, "max_steps": 1, "batch_size": 8}
    words = "--batch_size 8", "5 images", "--data.one_caption_per_image false"
    refused(tmp_path / "images", tmp_path / "out", *words, **no_split)
    train(config(tmp_path / "images", tmp_path / "out", **no_split, **{"data.one_caption_per_image": False}))
    refused(tmp_path / "same", tmp_path / "o", "20 rows", "--data.validation", batch_size=4)
    refused(tmp_path / "row", tmp_path / "o", "1 row", "at least 2", **no_split)


def test_a_folder_that_is_no_run(tmp_path):
    store = make_plain_store(tmp_path / "store")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("my notes")
    before = content(tmp_path)
    for folder, found in ((store, "img_emb"), (tmp_path / "mine", "README.md")):
        for resume in ("auto", "never"):
            refused(store, folder, f"--output_dir {folder}", found, "give another", resume=resume)
    for place in ("README.md", "README.md/below"):
        refused(store, tmp_path / "mine" / place, "cannot be written")
    assert content(tmp_path) == before
    LinearAdapter(embedding_dim=16).save_pretrained(tmp_path / "adapter")
    refused(store, tmp_path / "adapter", "training.yaml", "another --output_dir")
    refused(store, tmp_path / "mine", "README.md", **{"data.store": str(tmp_path / "mine")})
    # What a run that was killed early leaves, and what people keep beside one.
    for number, name in enumerate(("train.log", "previous-1", "store", ".DS_Store")):
        (tmp_path / f"out{number}" / name).mkdir(parents=True)
        assert RunFolder(config(store, tmp_path / f"out{number}")).start_from() is None


def test_a_run_that_cannot_go_on(plain_store, tmp_path):
    train(config(plain_store, tmp_path, max_steps=4))
    refused(plain_store, tmp_path, "--max_steps 2", "4 steps already", max_steps=2)
    weights = Checkpoints(tmp_path / "checkpoints").latest() / "state" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    refused(plain_store, tmp_path, "step-00000004", "cannot be read", max_steps=6)
