"""Metrics of embeddings against cases whose value is known."""

import math

import pytest
import torch
import torch.nn.functional as F

from csdiff.evaluation.baselines import (
    baseline_metrics,
    baseline_predictions,
    cross_fitted_predictions,
)
from csdiff.evaluation.distances import centroid_gap, distribution_gap, frechet_distance, kernel_distance
from csdiff.evaluation.embedding_metrics import (
    cosine_similarities,
    effective_rank,
    embedding_metrics,
    norm_ratios,
)
from csdiff.evaluation.retrieval import image_identities, retrieval


def cloud(n, d, seed=0, shift=0.0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + shift


def test_retrieval_of_the_identity_is_perfect():
    x, ids = cloud(50, 8), torch.arange(50)
    found = retrieval(x, x, ids, ids)
    assert found == {"r@1": 1.0, "r@5": 1.0, "r@10": 1.0, "median_rank": 1.0}


def test_retrieval_against_ranks_counted_by_hand():
    query, gallery, ids = cloud(40, 6), cloud(40, 6, seed=1), torch.arange(40)
    similarity = F.normalize(query, dim=1) @ F.normalize(gallery, dim=1).T
    ranks = (similarity > similarity.diagonal()[:, None]).sum(1) + 1
    found = retrieval(query, gallery, ids, ids)
    for k in (1, 5, 10):
        assert found[f"r@{k}"] == pytest.approx((ranks <= k).double().mean().item())
    assert found["median_rank"] == ranks.double().quantile(0.5)


def test_collapsed_predictions_score_what_guessing_scores():
    gallery, ids = cloud(100, 8), torch.arange(100)
    same = torch.ones(100, 8)
    assert retrieval(gallery, same, ids, ids)["r@10"] == pytest.approx(0.1)
    assert retrieval(gallery, same, ids, ids)["median_rank"] == pytest.approx(50.5)


def test_several_captions_an_image():
    """Two captions an image: text finds its image among images, an image is found by either caption."""
    images = torch.eye(4)
    captions = torch.stack([images[0], images[1], images[1], images[1], images[2], images[2], images[3], images[0]])
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    found = embedding_metrics(captions, images[ids], captions)
    assert found["text_to_image"]["r@1"] == 6 / 8
    # Image 1 is tied between its own two captions and one of image 0; image 0 between its own and one of image 3.
    assert found["image_to_text"]["r@1"] == pytest.approx((1 / 2 + 2 / 3 + 1 + 1) / 4)


def test_ties_between_right_and_wrong_items_are_drawn_without_replacement():
    query = torch.tensor([[1.0, 0.0]])
    gallery = torch.tensor([[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 3)
    ids = torch.tensor([7, 7, 1, 2, 3, 4, 5, 6])
    found = retrieval(query, gallery, torch.tensor([7]), ids, ks=(1, 2, 3, 4))
    for k in (1, 2, 3):
        assert found[f"r@{k}"] == pytest.approx(1 - math.comb(3, k) / math.comb(5, k))
    assert found["r@4"] == 1
    assert found["median_rank"] == 1 + 3 / 3


def test_retrieval_refuses_a_query_without_a_right_item():
    with pytest.raises(ValueError, match="no right item"):
        retrieval(cloud(2, 3), cloud(2, 3), torch.tensor([0, 5]), torch.tensor([0, 1]))


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


def test_distribution_gap_sees_shape_and_not_place():
    x = F.normalize(cloud(400, 5), dim=1)
    assert distribution_gap(x, x) == pytest.approx(0, abs=1e-9)
    assert distribution_gap(x, F.normalize(0.1 * x + torch.eye(5)[0], dim=1)) > 0.1


def test_kernel_distance_against_sums_over_pairs():
    x, y = (F.normalize(cloud(n, 4, seed), dim=1).double() for n, seed in ((7, 0), (5, 1)))

    def mean(a, b, skip):
        pairs = [(1 + a[i] @ b[j]) ** 3 for i in range(len(a)) for j in range(len(b)) if not (skip and i == j)]
        return sum(pairs) / len(pairs)

    expected = 1000 * (mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False))
    assert kernel_distance(3 * x, y) == pytest.approx(expected.item())


def test_kernel_distance_is_unbiased():
    values = [kernel_distance(cloud(20, 6, seed), cloud(20, 6, seed + 1000)) for seed in range(200)]
    mean, error = torch.tensor(values).mean(), torch.tensor(values).std() / 200**0.5
    assert abs(mean) < 4 * error


def test_cosines_leave_captions_of_the_same_picture_out():
    p, image, t = cloud(6, 4), cloud(6, 4, 1), cloud(6, 4, 2)
    ids = torch.tensor([0, 0, 1, 2, 2, 2])
    similarity = F.normalize(p, dim=1) @ F.normalize(t, dim=1).T
    unrelated = similarity[ids[:, None] != ids[None, :]].mean()
    found = cosine_similarities(p, image, t, ids)
    assert found["unpaired"] == pytest.approx(unrelated.item(), abs=1e-6)
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


def test_identities_number_equal_rows():
    rows = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1.0, 2.0], [0.0, 0.0]])
    assert image_identities(rows).tolist() == [0, 1, 0, 2]


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


def test_cross_fitting_of_a_linear_map_agrees_with_a_fit_to_more_data():
    text = cloud(300, 6)
    image = text @ cloud(6, 6, 3) + 2
    fitted = baseline_predictions(text, image, text)["ridge"]
    crossed = cross_fitted_predictions(text, image, torch.arange(300))["ridge"]
    assert F.cosine_similarity(fitted, crossed).min() > 0.999


@pytest.mark.parametrize(
    ("prediction", "image", "expected"), [((4, 3), (5, 3), "one shape"), ((4, 3), None, "2 diff")]
)
def test_refuses_what_cannot_be_measured(prediction, image, expected):
    real = torch.ones(4, 3) if image is None else torch.randn(image)
    with pytest.raises(ValueError, match=expected):
        embedding_metrics(torch.randn(prediction), real)
