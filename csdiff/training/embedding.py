"""Captioned datasets as training data: embedded once, reused while data and encoders are the same."""

from pathlib import Path

from accelerate import Accelerator

from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed
from csdiff.embeddings.store import EmbeddingStore
from csdiff.training.config import TrainConfig

DEFAULT_ENCODER = "tiny-clip"


def embed_dataset(
    config: TrainConfig, accelerator: Accelerator, path: str, name: str, states: bool, tokens: bool
) -> EmbeddingStore:
    """The store of a captioned dataset, made now or by an earlier run.

    Args:
        config: The run; names the encoders and the place.
        accelerator: Its processes share the work.
        path: Dataset in any form that `csdiff embed` reads.
        name: `train`, `validation`, `unpaired_text` or `unpaired_image`; the last two are embedded on one side only.
        states: Keep token states of the text.
        tokens: Keep token states of the pictures.

    Raises:
        CSDiffError: nothing to read, no such encoder, or a store there that was made otherwise.
    """
    base = Path(config.data.store) if config.data.store else Path(config.output_dir) / "store"
    with_text, with_images = name != "unpaired_image", name != "unpaired_text"
    embed(
        EmbedConfig(
            source=path,
            output=str(base / name),
            text_encoder=(config.data.text_encoder or DEFAULT_ENCODER) if with_text else None,
            image_encoder=(config.data.image_encoder or DEFAULT_ENCODER) if with_images else None,
            text_states=states and with_text,
            image_tokens=tokens and with_images,
            device=str(accelerator.device),
            progress=config.logging.progress,
        )
    )
    return EmbeddingStore.open(base / name)
