import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 40 captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    lines = []
    for index in range(40):
        pixels = np.broadcast_to(draw.integers(0, 255, (2, 2, 3)), (2, 2, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), 0).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"thing {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="session")
def rich_store(pictures, tiny_clip, tmp_path_factory):
    """The pictures embedded with the tiny CLIP, token states included."""
    output = tmp_path_factory.mktemp("rich") / "store"
    encoders = {"text_encoder": str(tiny_clip), "image_encoder": str(tiny_clip)}
    embed(EmbedConfig(str(pictures), str(output), text_states=True, image_tokens=True, progress=False, **encoders))
    return output


@pytest.fixture(scope="session")
def pooled_store(pictures, tiny_clip, tmp_path_factory):
    """The same without token states."""
    output = tmp_path_factory.mktemp("pooled") / "store"
    encoders = {"text_encoder": str(tiny_clip), "image_encoder": str(tiny_clip)}
    embed(EmbedConfig(str(pictures), str(output), progress=False, **encoders))
    return output
