"""The shipped adapter on the shipped held-out pictures: its norms are those of real image embeddings."""

import io

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image

from csdiff import AutoAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.resources import assets_dir


@torch.no_grad()
def test_predicted_norms_have_the_real_mean_and_spread():
    rows = parquet.read_table(assets_dir() / "data" / "combination.parquet").to_pylist()[::2]
    pictures = [Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
    text = load_text_encoder("tiny-clip").encode([row["captions"][0] for row in rows])
    real = load_image_encoder("tiny-clip").encode(pictures).embeds.norm(dim=1)
    adapter = AutoAdapter.from_pretrained(assets_dir() / "adapter")
    predicted = adapter.embed(text.embeds, text.states, text.mask).norm(dim=1)
    assert predicted.mean().item() == pytest.approx(real.mean().item(), rel=0.02)
    assert predicted.std().item() == pytest.approx(real.std().item(), rel=0.25)
