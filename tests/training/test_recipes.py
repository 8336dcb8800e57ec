"""Every recipe for training starts, on tiny stand-ins for its data."""

from pathlib import Path

import pytest
import torch
import training_runs
from tiny import make_plain_store

from csdiff.cli import parse
from csdiff.embeddings import write_store
from csdiff.embeddings.store import EmbeddingStore
from csdiff.training import train
from csdiff.training.config import TrainConfig

RECIPES = ["tiny", "embeddings", "captions", "regression", "retrieval", "cpu", "one-gpu", "eight-gpus"]
pytestmark = pytest.mark.filterwarnings("ignore:.*has no csdiff.json")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Pairs with token states, as `csdiff embed --text_states true` makes them."""
    plain = EmbeddingStore.open(make_plain_store(tmp_path_factory.mktemp("plain") / "store"))
    draw = torch.Generator().manual_seed(0)
    states = torch.randn(len(plain), 4, 16, generator=draw)
    mask = torch.ones(len(plain), 4, dtype=torch.bool)
    path = tmp_path_factory.mktemp("states") / "store"
    write_store(path, **plain.read(range(len(plain))), text_states=states, text_mask=mask)
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_recipe(root: Path, store, tmp_path, name):
    small = {"max_steps": 2, "batch_size": 16, "output_dir": str(tmp_path), "threads": 1, "data.train": str(store)}
    arguments = [f"--{key}={value}" for key, value in small.items()]
    if "gpu" in name:
        arguments += ["--adapter_options.num_layers=1", "--adapter_options.num_attention_heads=2"]
        arguments += ["--micro_batch_size=7", "--validation.limit=2"]
    made = parse(TrainConfig, [f"--config={root / 'configs' / name}.yaml", *arguments], prog="train")
    made.logging.trackers, made.logging.progress = [], False
    assert train(made).metrics
    assert len(training_runs.log(tmp_path, "validation")) == 1
