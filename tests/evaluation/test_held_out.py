"""The costlier metrics: two-sample test, separability, extrapolation, and what a perfect adapter gets."""

import math

import pytest
import torch
import torch.nn.functional as F

from csdiff.errors import CSDiffError
from csdiff.evaluation import held_out_metrics, linear_separability, real_metrics
from csdiff.evaluation.distances import frechet_distance, frechet_extrapolated, mmd_test
from csdiff.evaluation.embedding_metrics import embedding_metrics
from csdiff.evaluation.metrics import lookup


def cloud(n, d, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_mmd_against_sums_over_pairs():
    x, y = (F.normalize(cloud(n, 4, seed), dim=1).double() for n, seed in ((6, 0), (5, 1)))

    def mean(a, b, skip):
        pairs = [
            math.exp(-(a[i] - b[j]).square().sum() / (2 * 0.7**2))
            for i in range(len(a))
            for j in range(len(b))
            if not (skip and i == j)
        ]
        return sum(pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert mmd_test(2 * x, y, bandwidth=0.7, permutations=5).squared == pytest.approx(expected)


def test_p_values_are_uniform_for_one_distribution_and_small_for_two():
    values = [mmd_test(cloud(30, 5, seed), cloud(30, 5, seed + 500), permutations=99).p_value for seed in range(100)]
    # 5 of 100 are expected below 0.05; 14 or more happen once in 5,000.
    assert sum(value <= 0.05 for value in values) < 14
    assert 0.35 < sum(values) / 100 < 0.65
    assert mmd_test(cloud(60, 5), cloud(60, 5, 1, shift=1.0), permutations=99).p_value == 0.01


def test_separability_of_one_cloud_of_two_and_of_a_hidden_direction():
    x = cloud(400, 20)
    assert linear_separability(x, cloud(400, 20, 1)) == pytest.approx(0.5, abs=0.08)
    assert linear_separability(x, cloud(400, 20, 1, shift=2.0)) > 0.98
    # One narrow direction tells them apart, beside nineteen wide ones that do not.
    narrow = torch.cat([x[:, :19], 0.05 * x[:, 19:]], dim=1)
    moved = torch.cat([cloud(400, 19, 1), 0.05 * cloud(400, 1, 2) + 1.5], dim=1)
    assert linear_separability(narrow, moved) > 0.95


def test_extrapolation_removes_the_bias_of_small_samples():
    d = 8
    x, y = cloud(200, d), cloud(200, d, 1)
    biased = frechet_distance(x, y)
    assert biased > 0.01
    extrapolated = [frechet_extrapolated(cloud(200, d, s), cloud(200, d, s + 99)) for s in range(0, 1000, 100)]
    mean = sum(extrapolated) / len(extrapolated)
    assert abs(mean) < 0.2 * biased


def test_extrapolation_keeps_a_true_distance():
    x, y = cloud(2000, 4), cloud(2000, 4, 1, shift=0.7)
    assert frechet_extrapolated(x, y) == pytest.approx(frechet_distance(x, y), rel=0.1)


def test_a_perfect_adapter_gets_what_real_against_real_gets():
    """Predictions drawn as the images are: every metric of distributions is as for other real images."""
    image, other = cloud(300, 6, 0, 0.5), cloud(300, 6, 1, 0.5)
    found, real = held_out_metrics(other, image), real_metrics(image)
    assert found["kernel_distance"] == pytest.approx(0, abs=40)
    assert real["kernel_distance"] == pytest.approx(0, abs=40)
    assert found["mmd"]["p_value"] > 0.01
    assert found["separability"] == pytest.approx(0.5, abs=0.1)
    assert found["frechet_halves"] == pytest.approx(real["frechet_distance"], abs=0.02)
    assert found["cs_divergence_at"]["0.5"] == found["cs_divergence"]
    assert set(real) == set(found) - {"text_to_image", "image_to_text", "cosine"}


def test_a_gap_shows_in_every_metric_of_distributions():
    image = cloud(300, 6, 0, 0.5)
    found, real = held_out_metrics(cloud(300, 6, 1, -0.5), image), real_metrics(image)
    for name in ("centroid_gap", "kernel_distance", "cs_divergence", "frechet_halves", "frechet_extrapolated"):
        assert found[name] > 5 * abs(real[name])
    assert found["mmd"]["p_value"] < 0.01
    assert found["separability"] > 0.8


def test_too_few_images():
    with pytest.raises(CSDiffError, match="at least 8 different images to evaluate on, found 3"):
        held_out_metrics(cloud(3, 4), cloud(3, 4))


def test_estimates_agree_with_all_rows_within_their_errors():
    """Ranks are of the whole gallery: those of a part of it would be better."""
    image = cloud(1200, 6)
    prediction = image + 2 * cloud(1200, 6, 1)
    whole, part = (embedding_metrics(prediction, image, limit=limit) for limit in (None, 400))
    assert part["estimated"] == {"queries": 400, "kernel_rows": 200}
    assert "estimated" not in whole
    for key, error in part["errors"].items():
        assert abs(lookup(part, key) - lookup(whole, key)) < 4 * error + 0.02 * (key == "cs_divergence")
        assert error < 60 if key == "kernel_distance" else error < 0.05
    fewer = embedding_metrics(prediction[:400], image[:400], limit=None)
    ranks = [found["text_to_image"]["median_rank"] for found in (fewer, part, whole)]
    assert ranks[0] < 0.5 * ranks[2]
    assert ranks[1] == pytest.approx(ranks[2], rel=0.25)
    assert part["frechet_distance"] == whole["frechet_distance"]
