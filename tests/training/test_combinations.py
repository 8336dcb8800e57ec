"""Adapters, objectives and encoders in every combination that makes sense, the recipes, and those that make none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_runs import SMALL, config, log

from csdiff.adapters.registry import AutoAdapter
from csdiff.cli import parse
from csdiff.embeddings import write_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.training import train
from csdiff.training.config import TrainConfig

pytestmark = pytest.mark.filterwarnings("ignore:.*has no csdiff.json")


COMBINATIONS = {
    "transformer, cached states": ("rich", {"adapter": "transformer"}),
    "transformer, text tower in the loop": ("pooled", {"adapter": "transformer"}),
    "mlp, text tower in the loop": ("pooled", {"data.text": "online"}),
    "linear": ("pooled", {"adapter": "linear"}),
    "lora": ("pooled", {"adapter": "lora"}),
    "diffusion prior": ("rich", {"adapter": "diffusion", "objective": "diffusion"}),
    "tokens cached": ("rich", {"objective_options": {"token_weight": 0.5}}),
    "tokens, both towers in the loop": ("pooled", {"objective_options": {"token_weight": 0.5}, "data.images": "DATA"}),
    "tokens, lora": ("rich", {"adapter": "lora", "objective_options": {"token_weight": 0.5}}),
    "tokens, transformer": ("rich", {"adapter": "transformer", "objective_options": {"token_weight": 0.5}}),
    "tokens, transformer, both towers in the loop": (
        "pooled",
        {"adapter": "transformer", "objective_options": {"token_weight": 0.5}, "data.images": "DATA"},
    ),
    "unpaired": ("pooled", {"data.unpaired_text": "STORE", "data.unpaired_image": "STORE"}),
    "unpaired, lora": ("pooled", {"adapter": "lora", "data.unpaired_text": "STORE"}),
    "image adapter": ("pooled", {"image_adapter": "mlp", "objective": "info_nce"}),
    "learnable temperature": ("pooled", {"objective_options": {"learnable_temperature": True}}),
    "eclipse": ("pooled", {"objective": "eclipse"}),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination(rich_store, pooled_store, pictures, tmp_path, name):
    which, changes = COMBINATIONS[name]
    store = {"rich": rich_store, "pooled": pooled_store}[which]
    known = {"DATA": str(pictures), "STORE": str(store)}
    changes = {key: known.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    made = config(store, tmp_path, max_steps=3, batch_size=16, micro_batch_size=7, **changes)
    adapter = changes.get("adapter", "mlp")
    made.adapter_options = {"lora": {"rank": 2, "dropout": 0.1}, "linear": {}}.get(adapter, made.adapter_options)
    if adapter in ("transformer", "diffusion"):
        made.adapter_options = SMALL
    result = train(made)
    assert result.metrics["count"] >= 2
    assert ("tokens" in log(tmp_path, "train")[-1]) == name.startswith("tokens")
    loaded = AutoAdapter.from_pretrained(tmp_path)
    rows = EmbeddingStore.open(store).read([0, 1])
    states = (rows.get("text_states"), rows.get("text_mask")) if loaded.uses_text_states else (None, None)
    if states[0] is None and loaded.uses_text_states:
        return
    assert loaded.embed(rows["text_embeds"], *states).isfinite().all()
    metadata = json.loads((tmp_path / "csdiff.json").read_text())
    assert metadata["text_encoder"]["dim"] == 16
    assert metadata["image_encoder"]["weights_sha256"]
    assert (tmp_path / "image_adapter" / "config.json").exists() == (name == "image adapter")


RECIPES = sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipe(rich_store, tiny_clip, tmp_path, recipe):
    # Recipes name encoders of their own: a store of no known encoder fits all of them.
    store, run = tmp_path / "store", tmp_path / "run"
    rich = EmbeddingStore.open(rich_store)
    write_store(store, **rich.read(range(40)), captions=rich.captions(range(40)))
    small = {"max_steps": 2, "batch_size": 16, "threads": 1, "data.train": store, "output_dir": run}
    if "adapter: transformer" in recipe.read_text():
        small |= {"adapter_options.num_layers": 1, "adapter_options.num_attention_heads": 2, "micro_batch_size": 7}
        small |= {"validation.limit": 2, "mixed_precision": "no"}
    if "text: online" in recipe.read_text():
        small["data.text_encoder"] = tiny_clip
    arguments = [f"--{key}={value}" for key, value in small.items()]
    made = parse(TrainConfig, [f"--config={recipe}", *arguments], prog="train")
    made.logging.trackers, made.logging.progress = [], False
    assert train(made).metrics
    assert len(log(run, "validation")) == 1


def test_a_transformer_with_the_token_term_resumes_to_the_bit(rich_store, tmp_path):
    options = {"adapter": "transformer", "batch_size": 16, "micro_batch_size": 7, "max_steps": 4}
    options |= {"adapter_options": {**SMALL, "dropout": 0.2}, "objective_options": {"token_weight": 0.5}}
    options |= {"checkpoint.every": 2, "checkpoint.keep": 0}
    train(config(rich_store, tmp_path / "a", **options))
    train(config(rich_store, tmp_path / "b", **options, resume=str(tmp_path / "a/checkpoints/step-00000002")))
    whole, resumed = (
        load_file(tmp_path / name / "checkpoints/step-00000004/state/weights.safetensors") for name in "ab"
    )
    assert any("proj_to_clip_embeddings" in name for name in whole)
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    whole, resumed = ([line["loss"] for line in log(tmp_path / name, "train")] for name in "ab")
    assert whole[2:] == resumed[-2:]


def test_a_captioned_dataset_is_embedded_once(pictures, tiny_clip, tmp_path):
    shards, encoders = [], {f"data.{tower}_encoder": str(tiny_clip) for tower in ("text", "image")}
    for steps in (2, 3):
        train(config(pictures, tmp_path, batch_size=16, max_steps=steps, **encoders))
        files = (tmp_path / "store" / "train").rglob("*.npy")
        shards.append({path: path.stat().st_mtime_ns for path in files})
    assert shards[0] == shards[1] != {}
