"""Adapters of every kind, trained for a second: on rows that no part of training saw, norms are as real ones are."""

import pytest
import torch

from csdiff import AutoAdapter
from csdiff.adapters import ADAPTERS
from csdiff.embeddings import EmbeddingStore, load_text_encoder, write_store
from csdiff.embeddings.fingerprint import weights_sha256
from csdiff.training import train
from csdiff.training.config import TrainConfig

# What is asserted holds for a badly trained adapter as for a good one.
RUNS = {
    "mlp": {"adapter_options": {"num_layers": 1, "dropout": 0.1}},
    "transformer": {"adapter_options": {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}},
    "linear": {},
    "lora": {"adapter_options": {"rank": 4}},
    "diffusion": {
        "objective": "diffusion",
        # without token states: sampling takes 25 passes over every row
        "adapter_options": {"num_layers": 1, "num_attention_heads": 2, "encoder_hid_proj_type": None},
    },
}


@pytest.fixture(scope="module")
def stores(tiny_clip, tmp_path_factory):
    """Two stores of different captions and their images, a gap apart and noisy: to train on, and to look at."""
    folder = tmp_path_factory.mktemp("pairs")
    encoder = load_text_encoder(tiny_clip)
    generator = torch.Generator().manual_seed(0)
    captions = ["".join(chr(97 + i) for i in torch.randint(26, (6,), generator=generator)) for _ in range(1800)]
    text = encoder.encode(captions)
    noise = text.embeds.std(0) * torch.randn(text.embeds.shape, generator=generator)
    image = 2 * text.embeds + torch.randn(1, 16, generator=generator) + 0.5 * noise
    known = {"id": str(tiny_clip), "weights_sha256": weights_sha256(tiny_clip, "text")}
    for name, rows in (("train", slice(0, 1200)), ("held_out", slice(1200, None))):
        write_store(
            folder / name,
            text_embeds=text.embeds[rows],
            image_embeds=image[rows],
            text_states=text.states[rows],
            text_mask=text.mask[rows],
            captions=captions[rows],
            fingerprint={"text_encoder": known},
            dtype="float32",
        )
    return folder


def test_every_kind_of_adapter_has_a_run():
    assert set(RUNS) == set(ADAPTERS)


@pytest.mark.parametrize("name", RUNS)
@torch.no_grad()
def test_predicted_norms_have_the_real_mean_and_spread(name, stores, tiny_clip, tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), adapter=name, max_steps=20, batch_size=64, **RUNS[name])
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
        tokens = load_text_encoder(tiny_clip).caption_tokenizer(store.captions(range(len(store))), "max_length")
        predicted = adapter.embed_input_ids(*tokens)
    elif adapter.uses_text_states:
        predicted = adapter.embed(rows["text_embeds"], rows["text_states"], rows["text_mask"])
    else:
        predicted = adapter.embed(rows["text_embeds"])
    norms, real = predicted.norm(dim=1), rows["image_embeds"].norm(dim=1)
    assert norms.mean().item() == pytest.approx(real.mean().item(), rel=0.02)
    assert norms.std().item() == pytest.approx(real.std().item(), rel=0.25)
