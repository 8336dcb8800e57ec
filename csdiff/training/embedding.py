"""Captioned datasets as training data: embedded once, reused while the fingerprint fits."""

from accelerate import Accelerator

from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.training.config import TrainConfig
from csdiff.training.console import Console


def embed_dataset(
    config: TrainConfig, accelerator: Accelerator, console: Console, path: str, name: str
) -> EmbeddingStore:
    raise CSDiffError("not yet")
