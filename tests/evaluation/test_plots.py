"""Plots: what they show, and that they leave matplotlib's global state alone."""

import base64
import io
import sys

import pytest
from PIL import Image
from tiny import cloud

from csdiff.errors import CSDiffError
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities, png_base64


@pytest.mark.parametrize("method", ["pca", "gap"])
def test_the_gap_shows_before_and_not_after(method):
    image = cloud(60, 6, shift=1.0)
    figure = plot_projection(-image, image, image + 0.01, method)
    before, after = ([points.get_offsets().mean(0) for points in axis.collections[:2]] for axis in figure.axes)
    rows = image / image.norm(dim=1, keepdim=True)
    gap = 2 * rows.mean(0).norm().item()
    assert ((before[0] - before[1]) ** 2).sum() ** 0.5 == pytest.approx(gap, rel=0.01)
    assert ((after[0] - after[1]) ** 2).sum() ** 0.5 < 0.05


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
        assert list(guess) == sorted(guess)
        assert guess[0] < 0.5
        assert guess[-1] == pytest.approx(1)


def test_a_figure_is_a_png_and_pyplot_is_not_touched():
    picture = Image.open(io.BytesIO(base64.b64decode(png_base64(plot_similarities(None, cloud(20, 4), cloud(20, 4))))))
    assert picture.format == "PNG"
    module = sys.modules.get("matplotlib.pyplot")
    assert module is None or not module.get_fignums()


def test_unknown_projection():
    with pytest.raises(CSDiffError, match=r"tsne.*umap"):
        plot_projection(None, cloud(9, 3), cloud(9, 3), "umap")
