"""Plots: what they show, and that they leave matplotlib's global state alone."""

import base64
import io
import sys

import pytest
import torch
from PIL import Image

from csdiff.errors import CSDiffError
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities, png_base64


def cloud(n, d, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_the_gap_shows_before_and_not_after():
    image = cloud(60, 6, shift=1.0)
    text, predicted = -image, image + 0.01
    figure = plot_projection(text, image, predicted)
    before, after = figure.axes
    distances = []
    for axis in (before, after):
        images, others = (points.get_offsets().mean(0) for points in axis.collections[-2:])
        distances.append(((images - others) ** 2).sum() ** 0.5)
    assert distances[0] > 1
    assert distances[1] < 0.05


def test_text_of_another_width_leaves_one_panel():
    image = cloud(30, 6)
    assert len(plot_projection(cloud(30, 4), image, image, "tsne").axes) == 1
    assert len(plot_similarities(None, image, image).axes) == 1


def test_retrieval_curves_end_at_one():
    image = cloud(20, 5)
    figure = plot_retrieval({"adapter": image, "raw text": cloud(20, 5, 1)}, image)
    for axis in figure.axes:
        perfect, guess = (line.get_ydata() for line in axis.lines)
        assert perfect[0] == 1
        assert guess[0] < 0.5
        assert guess[-1] == pytest.approx(1)


def test_a_figure_is_a_png_and_pyplot_is_not_touched():
    picture = Image.open(io.BytesIO(base64.b64decode(png_base64(plot_similarities(None, cloud(20, 4), cloud(20, 4))))))
    assert picture.format == "PNG"
    module = sys.modules.get("matplotlib.pyplot")
    assert module is None or not module.get_fignums()


def test_the_gap_projection_shows_the_gap():
    image, text = cloud(50, 8), cloud(50, 8)
    text[:, 0] += 2
    figure = plot_projection(text, image, image, "gap")
    images, texts = (points.get_offsets() for points in figure.axes[0].collections[:2])
    rows = [z / z.norm(dim=1, keepdim=True) for z in (image, text)]
    gap = float((rows[0].mean(0) - rows[1].mean(0)).norm())
    assert abs(texts[:, 0].mean() - images[:, 0].mean() - gap) < 1e-5


def test_unknown_projection():
    with pytest.raises(CSDiffError, match=r"tsne.*umap"):
        plot_projection(None, cloud(9, 3), cloud(9, 3), "umap")
