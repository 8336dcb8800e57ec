import pytest

from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed


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
