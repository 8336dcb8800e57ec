"""Adapters trained on shipped pictures: on pictures that no part of training saw, norms are as real ones are."""

import pyarrow.parquet as parquet
import pytest
import torch

from csdiff import AutoAdapter
from csdiff.adapters import ADAPTER_NAMES, LinearAdapter
from csdiff.adapters.linear import METHODS
from csdiff.embeddings import EmbedConfig, EmbeddingStore, embed
from csdiff.resources import assets_dir
from csdiff.training import train
from csdiff.training.config import TrainConfig

# A few seconds each; what is asserted holds for a badly trained adapter as for a good one.
RUNS = {
    "mlp": {"max_steps": 30, "batch_size": 256, "adapter_options": {"num_layers": 1, "dropout": 0.1}},
    "transformer": {
        "max_steps": 12,
        "batch_size": 128,
        "adapter_options": {"num_layers": 1, "num_attention_heads": 4},
    },
    "linear": {"max_steps": 20, "batch_size": 256},
    "lora": {"max_steps": 6, "batch_size": 64, "adapter_options": {"rank": 4}},
    "diffusion": {
        "max_steps": 40,
        "batch_size": 128,
        "objective": "diffusion",
        # without token states: sampling takes 25 passes over every row
        "adapter_options": {"num_layers": 1, "num_attention_heads": 4, "encoder_hid_proj_type": None},
    },
}


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """Two stores of different pictures of the shipped train split: to train on, and to look at afterwards."""
    folder = tmp_path_factory.mktemp("shipped")
    table = parquet.read_table(assets_dir() / "data" / "train.parquet")
    for name, first, stride in (("train", 0, 5), ("held_out", 1, 12)):
        rows = range(first, len(table), stride)
        parquet.write_table(table.take(list(rows)), folder / f"{name}.parquet")
        options = {"captions_per_image": "random", "text_states": True, "progress": False}
        embed(EmbedConfig(source=str(folder / f"{name}.parquet"), output=str(folder / name), **options))
    return folder


def check_norms(predicted, real):
    assert predicted.mean().item() == pytest.approx(real.mean().item(), rel=0.02)
    assert predicted.std().item() == pytest.approx(real.std().item(), rel=0.25)


def test_every_kind_of_adapter_has_a_run():
    assert set(RUNS) == set(ADAPTER_NAMES)


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_predicted_norms_have_the_real_mean_and_spread(name, stores, tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), adapter=name, **RUNS[name])
    config.data.train, config.data.validation_fraction = str(stores / "train"), 0.5
    config.validation.limit = 64
    config.ema.decay = 0.9
    config.validation.every = config.checkpoint.every = 0
    config.logging.progress, config.logging.trackers = False, []
    with torch.enable_grad():
        train(config)
    adapter = AutoAdapter.from_pretrained(tmp_path)
    store = EmbeddingStore.open(stores / "held_out")
    rows = store.read(range(len(store)))
    if adapter.uses_input_ids:
        predicted = adapter.embed_input_ids(*tokenize(adapter, store.captions(range(len(store)))))
    elif adapter.uses_text_states:
        predicted = adapter.embed(rows["text_embeds"], rows["text_states"], rows["text_mask"])
    else:
        predicted = adapter.embed(rows["text_embeds"])
    check_norms(predicted.norm(dim=1), rows["image_embeds"].norm(dim=1))


def tokenize(adapter, captions):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets_dir() / "clip")
    tokens = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


@pytest.mark.parametrize("method", METHODS)
def test_norms_of_closed_form_maps(method, stores):
    adapter = LinearAdapter.fit(EmbeddingStore.open(stores / "train"), method)
    store = EmbeddingStore.open(stores / "held_out")
    rows = store.read(range(len(store)), ["text_embeds", "image_embeds"])
    check_norms(adapter.embed(rows["text_embeds"]).norm(dim=1), rows["image_embeds"].norm(dim=1))
