"""Fixtures every room shares. Folders are made once a session and must not be written to by tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# No test reaches a model hub, and two cores are shared by whatever runs beside the tests.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tiny tensors are slower on several threads, and waiting threads keep the other test process from its core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from tiny import make_pictures, make_plain_store, make_tiny_clip

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture
def checkout(root, tmp_path, monkeypatch) -> Path:
    """A folder that looks like the checkout, in which the test runs: what commands write stays out of the real one."""
    for name in ("assets", "configs", "csdiff", "generate.py", "train_adapter.py"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_clip(tmp_path_factory.mktemp("models") / "clip")


@pytest.fixture(scope="session")
def tiny_decoder(tiny_clip: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `KandinskyV22Pipeline` folder whose U-Net is conditioned on image embeddings only."""
    from tiny_pipelines import build

    folder = tmp_path_factory.mktemp("models") / "decoder"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        build("KandinskyV22Pipeline", tiny_clip).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of forty captioned pictures."""
    return make_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="session")
def plain_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain_store(tmp_path_factory.mktemp("stores") / "plain")
