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


def embedded(pictures, clip, output, **options):
    embed(EmbedConfig(str(pictures), str(output), str(clip), str(clip), progress=False, **options))
    return output


@pytest.fixture(scope="session")
def pooled_store(pictures, tiny_clip, tmp_path_factory):
    """The pictures embedded with the tiny CLIP."""
    return embedded(pictures, tiny_clip, tmp_path_factory.mktemp("pooled") / "store")


@pytest.fixture(scope="session")
def rich_store(pictures, tiny_clip, tmp_path_factory):
    """The same with the token states of both sides."""
    return embedded(
        pictures, tiny_clip, tmp_path_factory.mktemp("rich") / "store", text_states=True, image_tokens=True
    )
