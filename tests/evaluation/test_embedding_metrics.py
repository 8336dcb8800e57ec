"""Metrics of embeddings against cases whose value is known."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import cloud, directions

from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_metrics, baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.distances import (
    centroid_gap,
    distribution_gap,
    frechet_distance,
    frechet_extrapolated,
    kernel_distance,
    mmd_test,
)
from csdiff.evaluation.embedding_metrics import (
    cosine_similarities,
    effective_rank,
    embedding_metrics,
    group_agreement,
    held_out_metrics,
    linear_separability,
    norm_ratios,
    real_metrics,
)
from csdiff.evaluation.metrics import lookup
from csdiff.evaluation.picture_metrics import cmmd
from csdiff.evaluation.retrieval import image_identities, retrieval_ranks


def test_retrieval_against_ranks_counted_by_hand():
    query, gallery, ids = cloud(40, 6), cloud(40, 6, seed=1), torch.arange(40)
    similarity = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    ranks = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
    found = retrieval_ranks(query, gallery, ids, ids).summary()
    for k in (1, 5, 10):
        assert found[f"r@{k}"] == pytest.approx((ranks <= k).double().mean().item())
    assert found["median_rank"] == ranks.double().quantile(0.5)


def test_collapsed_predictions_score_what_guessing_scores():
    ids = torch.arange(100)
    found = retrieval_ranks(cloud(100, 8), torch.ones(100, 8), ids, ids).summary()
    assert (found["r@10"], found["median_rank"]) == (pytest.approx(0.1), pytest.approx(50.5))


def test_several_captions_an_image():
    """Two captions an image: text finds its image among images, an image is found by either caption."""
    images = torch.eye(4)
    captions = torch.stack([images[0], images[1], images[1], images[1], images[2], images[2], images[3], images[0]])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    assert image_identities(images[ids]).equal(ids)
    found = embedding_metrics(captions, images[ids], captions)
    assert found["text_to_image"]["r@1"] == 6 / 8
    # Image 1 is tied between its own two captions and one of image 0; image 0 between its own and one of image 3.
    assert found["image_to_text"]["r@1"] == pytest.approx((1 / 2 + 2 / 3 + 1 + 1) / 4)


def test_ties_between_right_and_wrong_items_are_drawn_without_replacement():
    gallery = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 3)
    ids = torch.tensor([7, 7, 1, 2, 3, 4, 5, 6])
    found = retrieval_ranks(gallery[:1], gallery, ids[:1], ids)
    for k in (1, 2, 3):
        assert found.hits(k).item() == pytest.approx(1 - math.comb(3, k) / math.comb(5, k))
    assert (found.hits(4), found.expected()) == (1, 1 + 3 / 3)


def test_centroid_gap_of_opposite_points():
    x = torch.tensor([[3.0, 0.0]] * 4)
    assert centroid_gap(x, -x) == pytest.approx(2)
    assert centroid_gap(x, 7 * x) == pytest.approx(0)


@pytest.mark.parametrize(("n", "m", "d"), [(200, 150, 6), (5, 9, 12), (30, 4, 12)])
def test_frechet_distance_against_the_matrix_square_root(n, m, d):
    x, y = cloud(n, d), cloud(m, d, seed=1, shift=0.5)
    u, v = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    s1, s2 = torch.cov(u.T), torch.cov(v.T)
    # The eigenvalues of S1 S2 are those of a positive matrix: their roots sum to the trace of the root.
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    gap = s1.trace() + s2.trace() - 2 * root
    assert distribution_gap(x, y) == pytest.approx(gap.item(), rel=1e-4)
    mean = (u.mean(0) - v.mean(0)).square().sum()
    assert frechet_distance(x, y) == pytest.approx((gap + mean).item(), rel=1e-4)
    assert frechet_distance(x, 2 * x) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("measure", "kernel"),
    [
        (kernel_distance, lambda a, b: 1000 * (1 + a @ b) ** 3),
        (cmmd, lambda a, b: 1000 * torch.exp(-(a - b).square().sum() / 200)),
        (
            lambda x, y: mmd_test(x, y, bandwidth=0.7, permutations=5).squared,
            lambda a, b: torch.exp(-(a - b).square().sum() / (2 * 0.7**2)),
        ),
    ],
)
def test_kernel_distances_against_sums_over_pairs(measure, kernel):
    x, y = (F.normalize(cloud(n, 4, seed), dim=1).double() for n, seed in ((7, 0), (5, 1)))

    def mean(a, b, skip):
        pairs = [kernel(a[i], b[j]) for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert measure(3 * x, y) == pytest.approx(expected.item(), rel=1e-6)


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


def test_extrapolation_removes_the_bias_of_small_samples_and_keeps_a_true_distance():
    biased = frechet_distance(cloud(200, 8), cloud(200, 8, 1))
    assert biased > 0.01
    extrapolated = [frechet_extrapolated(cloud(200, 8, s), cloud(200, 8, s + 99)) for s in range(0, 1000, 100)]
    assert abs(sum(extrapolated) / 10) < 0.2 * biased
    x, y = cloud(2000, 4), cloud(2000, 4, 1, shift=0.7)
    assert frechet_extrapolated(x, y) == pytest.approx(frechet_distance(x, y), rel=0.1)


def test_cosines_leave_captions_of_the_same_picture_out():
    p, image, t = cloud(6, 4), cloud(6, 4, 1), cloud(6, 4, 2)
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    similarity = F.normalize(p, dim=1) @ F.normalize(t, dim=1).T
    found = cosine_similarities(p, image, t, ids)
    assert found["unpaired"] == pytest.approx(similarity[ids[:, None] != ids[None, :]].mean().item(), abs=1e-6)
    assert found["text"] == pytest.approx(similarity.diagonal().mean().item(), abs=1e-6)
    assert cosine_similarities(p, image, cloud(6, 3), ids)["text"] is None


def test_norm_ratios():
    x = cloud(50, 8)
    assert norm_ratios(2 * x, x) == pytest.approx({"mean_ratio": 2, "std_ratio": 2})
    unit = F.normalize(x, dim=1)
    assert norm_ratios(unit, unit) == pytest.approx({"mean_ratio": 1, "std_ratio": 1})


def test_effective_rank_counts_dimensions():
    axes = torch.eye(6).repeat_interleave(50, 0)
    signed = torch.cat([axes, -axes])
    assert effective_rank(signed) == pytest.approx(6)
    assert effective_rank(signed[:, :3][signed[:, :3].norm(dim=1) > 0]) == pytest.approx(3)
    assert effective_rank(torch.ones(10, 6)) == 1


def test_a_gap_between_the_modalities_splits_every_group():
    image, names = directions(6, 10)
    together = group_agreement(image * 2, image, names, names)
    assert together == pytest.approx({"v_measure": 1, "ari": 1}, abs=0.05)
    gap = torch.zeros(12)
    gap[-1] = 40
    apart = group_agreement(image + gap, image, names, names)
    assert apart["v_measure"] < 0.8
    assert apart["ari"] < 0.8
    shuffled = group_agreement(image, image, names, names[::-1])
    assert shuffled["v_measure"] < together["v_measure"]
    with pytest.raises(CSDiffError, match="2 different concepts, found 1"):
        group_agreement(image, image, ["a"] * 60, ["a"] * 60)


def test_baselines_recover_what_they_model():
    text = cloud(300, 6)
    image = text @ cloud(6, 6, 3) + 2
    shifted = text + torch.arange(6.0)
    found = baseline_metrics(text[:200], image[:200], text[200:], image[200:])
    assert found["ridge"]["text_to_image"]["r@1"] == 1
    assert found["ridge"]["cosine"]["paired"] > 0.99
    moved = baseline_metrics(text[:200], shifted[:200], text[200:], shifted[200:])
    assert moved["mean_shift"]["cosine"]["paired"] == pytest.approx(1, abs=1e-4)
    assert moved["raw_text"]["cosine"]["paired"] < 0.5
    assert set(baseline_metrics(text[:200, :4], image[:200], text[200:, :4], image[200:])) == {"ridge"}
    crossed = cross_fitted_predictions(text, image, torch.arange(300))["ridge"]
    assert F.cosine_similarity(baseline_predictions(text, image, text)["ridge"], crossed).min() > 0.999


def test_cross_fitted_rows_are_predicted_from_the_other_pictures():
    """A row's own pair has no part in its prediction: changing it changes the others' predictions only."""
    text, ids = cloud(60, 5), torch.arange(30).repeat_interleave(2)
    image = cloud(30, 5, seed=1)[ids]
    before = cross_fitted_predictions(text, image, ids)
    assert before["raw_text"].equal(text)
    changed = image.clone()
    changed[:2] += 100
    after = cross_fitted_predictions(text, changed, ids)
    for name in ("mean_shift", "ridge"):
        torch.testing.assert_close(after[name][:2], before[name][:2])
        assert (after[name] - before[name]).abs().amax(1).gt(1e-3).sum() >= 40


def test_a_perfect_adapter_gets_what_real_against_real_gets_and_a_gap_shows_everywhere():
    """Predictions drawn as the images are: every metric of distributions is as for other real images."""
    image = cloud(300, 6, 0, 0.5)
    found, apart, real = (
        *(held_out_metrics(cloud(300, 6, 1, shift), image) for shift in (0.5, -0.5)),
        real_metrics(image),
    )
    assert found["kernel_distance"] == pytest.approx(0, abs=40)
    assert real["kernel_distance"] == pytest.approx(0, abs=40)
    assert found["mmd"]["p_value"] > 0.01 > apart["mmd"]["p_value"]
    assert found["separability"] == pytest.approx(0.5, abs=0.1)
    assert apart["separability"] > 0.8
    assert found["frechet_halves"] == pytest.approx(real["frechet_distance"], abs=0.02)
    assert found["cs_divergence_at"]["0.5"] == found["cs_divergence"]
    assert set(real) == set(found) - {"text_to_image", "image_to_text", "cosine"}
    for name in ("centroid_gap", "kernel_distance", "cs_divergence", "frechet_halves", "frechet_extrapolated"):
        assert apart[name] > 5 * abs(real[name])


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


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (lambda: embedding_metrics(cloud(4, 3), cloud(5, 3)), "one shape"),
        (lambda: embedding_metrics(cloud(4, 3), torch.ones(4, 3)), "2 different images"),
        (lambda: kernel_distance(cloud(1, 3), cloud(4, 3)), "at least 2 rows"),
        (
            lambda: retrieval_ranks(cloud(2, 3), cloud(2, 3), torch.tensor([0, 5]), torch.tensor([0, 1])),
            "no right item",
        ),
    ],
)
def test_refuses_what_cannot_be_measured(measure, expected):
    with pytest.raises((ValueError, CSDiffError), match=expected):
        measure()
