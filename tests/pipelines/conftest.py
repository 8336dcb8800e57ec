"""Tiny adapters and the text embeddings they are compared on, shared by the tests of this room."""

import warnings

import pytest
import torch
from diffusers.utils import logging
from tiny_pipelines import random_adapter

from csdiff.adapters import MLPAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder


@pytest.fixture(scope="session", autouse=True)
def quiet_diffusers():
    """Progress bars of tiny pipelines say nothing."""
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*multichannel.*")


@pytest.fixture(scope="session")
def encoders(tiny_clip) -> dict:
    """Both towers of the tiny CLIP."""
    return {"text": load_text_encoder(str(tiny_clip)), "image": load_image_encoder(str(tiny_clip))}


@pytest.fixture(scope="session")
def metadata(encoders) -> dict:
    """`csdiff.json` of an adapter for the tiny CLIP."""
    return {f"{tower}_encoder": encoder.describe() for tower, encoder in encoders.items()}


@pytest.fixture
def adapter(metadata) -> MLPAdapter:
    """An adapter for the tiny CLIP."""
    return random_adapter(metadata)


@pytest.fixture(scope="session")
def adapter_folder(metadata, tmp_path_factory):
    """The same adapter, saved."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    random_adapter(metadata).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def embed(encoders):
    """`embed(adapter, *prompts)`: what the adapter makes of prompts, by the shortest way."""

    def run(adapter, *prompts):
        text = encoders["text"].encode(list(prompts))
        with torch.no_grad():
            return adapter.embed(text.embeds, text.states, text.mask)

    return run


@pytest.fixture(scope="session")
def zero_image_embeds(encoders):
    """Embedding of an all-zero image, `(1, D)`."""
    size = encoders["image"].model.config.image_size
    with torch.no_grad():
        return encoders["image"].forward(torch.zeros(1, 3, size, size)).embeds
