"""Plots, the table of metrics with its words for them, and that matplotlib's global state is left alone."""

import base64
import io
import subprocess
import sys

import pytest
import torch
from PIL import Image
from tiny import cloud

from csdiff.errors import CSDiffError
from csdiff.evaluation.embedding_metrics import held_out_metrics
from csdiff.evaluation.metrics import METRICS, lookup, metric, metric_rows
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities, png_base64
from csdiff.files import flatten
from csdiff.tables import text_table


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


def test_every_number_of_a_result_has_a_name():
    image = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)) + 1
    found = held_out_metrics(image + 0.1, image, image - 1)
    for key in flatten(found):
        if key not in ("count", "mmd.bandwidth"):
            assert metric(key).label
    assert len({entry.label for entry in METRICS}) == len(METRICS)


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("text_to_image.r@1", 0.9, 0.8),
        ("text_to_image.median_rank", 2, 3),
        ("centroid_gap", 0.1, 0.2),
        ("norm.std_ratio", 0.9, 1.2),
        ("norm.std_ratio", 1.1, 0.8),
        ("kernel_distance", -3, 1),
        ("separability", 0.4, 0.6),
    ],
)
def test_the_better_value_has_the_smaller_loss(key, good, bad):
    assert metric(key).loss(good) < metric(key).loss(bad)
    # Below zero an unbiased distance is as good as zero.
    assert metric("kernel_distance").loss(-4.2) == metric("kernel_distance").loss(0) == 0


def test_errors_stand_beside_their_values():
    columns = {"a": {"kernel_distance": 5.0, "errors": {"kernel_distance": 0.25}}, "b": {"kernel_distance": 7.0}}
    assert metric_rows(columns) == [["kernel distance x 1000", "near 0", "5.0000 ± 0.2500", "7.0000"]]
    assert lookup({"cs_divergence_at": {"0.5": 2}}, "cs_divergence_at.0.5") == 2


def test_tables_hold_long_names_and_brackets_and_no_colour():
    text = text_table(["x" * 300, "[bold]runs/a[/bold]"], [["[red]row[/red]", 12345], ["other", None]], "[i]title[/i]")
    for part in ("x" * 300, "[bold]runs/a[/bold]", "[red]row[/red]", "12,345", "[i]title[/i]"):
        assert part in text
    assert "\x1b" not in text


def test_names_of_metrics_cost_no_model_library():
    code = "import sys, csdiff.evaluation.metrics; print({'torch', 'sklearn', 'rich'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
