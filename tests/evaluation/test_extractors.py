"""Feature extractors: known answers on photographs, and what each says of itself."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image

from csdiff.errors import CSDiffError
from csdiff.evaluation.extractors import load_extractor

PALACE, DAISY = 698, 985  # classes of ImageNet


@pytest.fixture(scope="module")
def efficientnet():
    return load_extractor("efficientnet-lite0")


def test_efficientnet_recognises_photographs(efficientnet):
    """The weights, the layers and the preprocessing belong together: otherwise the classes come out at random."""
    photographs = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    features = efficientnet(photographs)
    assert features.shape == (2, 1280)
    assert features.dtype == torch.float32
    assert efficientnet.model._fc(features).argmax(1).tolist() == [PALACE, DAISY]


def test_features_do_not_depend_on_the_batch(efficientnet):
    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (40, 64, 3), dtype=np.uint8)) for _ in range(3)]
    parts = torch.cat([efficientnet(pictures[:2]), efficientnet(pictures[2:])])
    torch.testing.assert_close(parts, efficientnet(pictures), rtol=1e-3, atol=1e-4)


def test_any_clip_folder_is_an_extractor(tiny_clip):
    extractor = load_extractor(str(tiny_clip))
    pictures = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    features = extractor(pictures)
    assert features.shape == (2, extractor.dim)
    torch.testing.assert_close(features, extractor.encoder.encode(pictures).embeds)
    description = extractor.describe()
    assert len(description["sha256"]) == 64
    assert description["resize"] == "bicubic (Pillow)"


def test_inception_without_weights_is_one_sentence(tmp_path):
    with pytest.raises(CSDiffError, match=r"^inception: expected .* found none"):
        load_extractor(f"inception:{tmp_path / 'missing.pth'}")
