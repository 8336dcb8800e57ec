"""One rule for "the same encoder", and the hash of a tower."""

import warnings

import pytest
import torch

from csdiff.embeddings import compare_encoders, load_image_encoder, load_text_encoder, weights_sha256
from csdiff.embeddings.fingerprint import check_same_encoder
from csdiff.errors import CSDiffError

VIT_L, KARLO, UNCLIP = (
    "openai/clip-vit-large-patch14",
    "kakaobrain/karlo-v1-alpha",
    "stabilityai/stable-diffusion-2-1-unclip-small",
)
ONE = {"id": "a/b", "weights_sha256": "1" * 64, "dim": 4}


@pytest.mark.parametrize(
    ("expected", "found", "verdict"),
    [
        (ONE, {**ONE, "id": "/moved/elsewhere"}, "same"),
        (ONE, {**ONE, "weights_sha256": "2" * 64}, "different"),
        (ONE, {**ONE, "dim": 5}, "different"),
        ({**ONE, "pooling": "mean"}, {**ONE, "pooling": "cls"}, "different"),
        (ONE, None, "unknown"),
        (ONE, {"id": None, "dim": 4}, "unknown"),
        # Without both hashes: by name.
        (ONE, {"id": "a/b"}, "same"),
        (ONE, {"id": "c/d"}, "different"),
        (ONE, {"id": "/models/clip"}, "unknown"),
        ({"id": "/models/b"}, {"id": "/models/b"}, "same"),
        ({"id": VIT_L}, {"id": KARLO}, "same"),
        ({"id": VIT_L}, {"id": "/hub/models--kakaobrain--karlo-v1-alpha/snapshots/1/text_encoder"}, "same"),
        ({"id": VIT_L}, {"id": "/models/karlo-v1-alpha/text_encoder"}, "same"),
        ({"id": VIT_L}, {"id": "tiny-clip"}, "different"),
        # The hashes go before the names: a folder called like it may hold anything.
        ({"id": VIT_L, "weights_sha256": "1"}, {"id": "/models/karlo-v1-alpha", "weights_sha256": "2"}, "different"),
    ],
)
def test_one_rule_says_whether_two_records_are_of_one_encoder(expected, found, verdict):
    assert compare_encoders(expected, found, "text").verdict == verdict
    assert compare_encoders(found, expected, "text").verdict == verdict


def test_a_published_pipeline_has_the_encoder_for_one_tower_only():
    """Stable unCLIP decodes image embeddings of ViT-L/14, and reads its prompts with another text tower."""
    assert compare_encoders({"id": VIT_L}, {"id": UNCLIP}, "image").verdict == "same"
    assert compare_encoders({"id": VIT_L}, {"id": UNCLIP}, "text").verdict == "different"


def test_different_encoders_are_refused_and_unknown_ones_warned_of():
    with pytest.raises(CSDiffError, match=r"text encoder of the store \(c/d\) .* the adapter \(a/b\)") as error:
        check_same_encoder(ONE, {"id": "c/d"}, "text", "the adapter", "the store")
    assert "\n" not in str(error.value)
    with pytest.warns(UserWarning, match=r"text encoder of the store \(/mine\) may not be that of the adapter"):
        check_same_encoder(ONE, {"id": "/mine"}, "text", "the adapter", "the store")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_same_encoder(ONE, None, "text", "the adapter", "a foreign store")


def test_a_tower_has_one_hash_whole_or_alone(tiny_clip, tmp_path):
    text, image = load_text_encoder(tiny_clip), load_image_encoder(tiny_clip)
    text.model.save_pretrained(tmp_path / "text", max_shard_size="20KB")
    image.model.save_pretrained(tmp_path / "image")
    assert len(list((tmp_path / "text").glob("*.safetensors"))) > 1
    assert weights_sha256(tmp_path / "text", "text") == text.describe()["weights_sha256"]
    assert weights_sha256(tmp_path / "image", "image") == image.describe()["weights_sha256"]
    assert text.describe()["weights_sha256"] != image.describe()["weights_sha256"]
    with torch.no_grad():
        text.model.text_projection.weight[0, 0] += 1
    text.model.save_pretrained(tmp_path / "changed")
    assert weights_sha256(tmp_path / "changed", "text") != text.describe()["weights_sha256"]
    file = tmp_path / "changed/model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CSDiffError, match=r"model\.safetensors"):
        weights_sha256(tmp_path / "changed", "text")
