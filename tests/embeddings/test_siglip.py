"""SigLIP and SigLIP 2 as encoders on either side, against transformers' own features."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from tiny import build_tiny_tokenizer

from csdiff.embeddings import load_caption_tokenizer, load_image_encoder, load_text_encoder
from csdiff.errors import CSDiffError

CAPTIONS = ["a red apple", "x", "a much longer caption of something else"]
SIZES = {"hidden_size": 24, "intermediate_size": 30, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module", params=["Siglip", "Siglip2"])
def siglip(request, tmp_path_factory):
    """A random SigLIP with tokenizer and image processor, whole; its towers alone in `text` and `image`."""
    name, path = request.param, tmp_path_factory.mktemp(request.param)
    tokenizer = build_tiny_tokenizer(max_length=20)
    # Padding of its own, as SigLIP has: what stands behind the caption is seen.
    tokenizer.pad_token = "!"
    vision = {"patch_size": 8, **({"image_size": 32} if name == "Siglip" else {"num_patches": 16})}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 20, "projection_size": 24}
    config = getattr(transformers, f"{name}Config")(text_config={**SIZES, **text}, vision_config={**SIZES, **vision})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    if name == "Siglip":
        processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    else:
        processor = transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16)
    for place, part in ((path, model), (path / "text", model.text_model), (path / "image", model.vision_model)):
        part.save_pretrained(place)
        tokenizer.save_pretrained(place)
        # As the published checkpoints say: what the tokenizer's class does by itself differs.
        stated = json.loads((place / "tokenizer_config.json").read_text())
        (place / "tokenizer_config.json").write_text(json.dumps({**stated, "padding_side": "right"}))
        processor.save_pretrained(place)
    return path


def features(siglip, images):
    model = transformers.AutoModel.from_pretrained(siglip)
    tokenizer = transformers.AutoTokenizer.from_pretrained(siglip)
    processor = transformers.AutoImageProcessor.from_pretrained(siglip, backend="pil")
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=20, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        text = model.get_text_features(ids).pooler_output
        image = model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    return text, image


def test_whole_or_one_tower_they_are_transformers_features(siglip):
    draw = np.random.default_rng(0)
    images = [Image.fromarray(draw.integers(0, 256, size, dtype=np.uint8)) for size in ((40, 30, 3), (30, 50, 3))]
    text, image = features(siglip, images)
    hashes = set()
    for folder in (siglip, siglip / "text"):
        encoder = load_text_encoder(folder)
        assert (encoder.dim, encoder.max_length, encoder.pooling) == (24, 20, "projection")
        torch.testing.assert_close(encoder.embed(CAPTIONS), text)
        # The tokenizer alone pads as the encoder was trained, too.
        assert torch.equal(load_caption_tokenizer(folder)(CAPTIONS)[0], encoder.caption_tokenizer(CAPTIONS)[0])
        encoding = encoder.encode(CAPTIONS)
        torch.testing.assert_close(encoding.embeds, text)
        # One caption alone is padded as it is among longer ones.
        torch.testing.assert_close(encoder.embed(CAPTIONS[:1]), text[:1])
        torch.testing.assert_close(encoder.project(encoding.states)[:, -1], text)
        hashes.add(encoder.describe()["weights_sha256"])
    for folder in (siglip, siglip / "image"):
        encoder = load_image_encoder(folder)
        assert encoder.dim == 24
        torch.testing.assert_close(encoder.encode(images).embeds, image)
        one = torch.stack([encoder.preprocess([part])[0] for part in images])
        torch.testing.assert_close(encoder.forward(one).embeds, image)
        hashes.add(encoder.describe()["weights_sha256"])
        with pytest.raises(CSDiffError, match="pools its image tokens by attention"):
            encoder.project(encoder.encode(images).tokens)
    # One hash a tower, whole or alone.
    assert len(hashes) == 2
