"""The table of metrics: every number of a result is in it, and it says which is better."""

import subprocess
import sys

import pytest
import torch

from csdiff.evaluation.embedding_metrics import held_out_metrics
from csdiff.evaluation.metrics import METRICS, lookup, metric, metric_rows
from csdiff.files import flatten
from csdiff.tables import text_table


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
