"""Problems whose answer is known: single points, Gaussians, invariances, symmetry, signs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csdiff.losses import (
    build_objective,
    cauchy_schwarz_divergence,
    gaussian_cauchy_schwarz,
    info_nce,
    log_mean_kernel,
    resolve_bandwidth,
)

NUMPY = (np.float16, np.float32, np.float64, np.array)
few = settings(max_examples=25, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
dims = st.integers(1, 9)
seeds = st.integers(0, 10_000)
bandwidths = st.floats(0.2, 8.0)


def draw(seed, n, m, dim):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return x, torch.randn(m, dim, generator=generator, dtype=torch.float64) * 1.3 + 0.4


@few
@given(seeds, dims, bandwidths)
def test_two_single_points(seed, dim, bandwidth):
    x, y = draw(seed, 1, 1, dim)
    value = cauchy_schwarz_divergence(x.requires_grad_(), y, bandwidth=bandwidth)
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(value, (x - y).square().sum() / bandwidth**2, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(gradient, 2 * (x - y).detach() / bandwidth**2, rtol=1e-9, atol=1e-13)


@few
@given(seeds, sizes, sizes, dims, bandwidths)
def test_what_does_not_matter(seed, n, m, dim, bandwidth):
    """The sides, the order of rows, a set taken three times, a common rotation, shift and scale."""
    x, y = draw(seed, n, m, dim)
    value = cauchy_schwarz_divergence(x, y, bandwidth=bandwidth)
    assert value >= 0
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    shift = torch.randn(dim, generator=generator, dtype=torch.float64)
    for a, b, scale in (
        (y, x, 1),
        (x[torch.randperm(n, generator=generator)], y, 1),
        (torch.cat([x, x, x]), y, 1),
        (x @ rotation + shift, y @ rotation + shift, 1),
        (7 * x, 7 * y, 7),
    ):
        found = cauchy_schwarz_divergence(a, b, bandwidth=scale * bandwidth, block_size=seed % 5 + 1)
        torch.testing.assert_close(found, value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.07])
def test_the_pull_of_the_divergence_beside_the_push_of_info_nce(temperature):
    # docs/loss.md: with bandwidth^2 = temperature they are opposite row by row, and 2 N times the row's share apart.
    x, y = (torch.nn.functional.normalize(rows, dim=1) for rows in draw(0, 64, 64, 8))
    logits = x @ y.T / temperature
    share = logits.flatten().softmax(dim=0).view(64, 64).sum(dim=1, keepdim=True)
    x.requires_grad_()
    contrast = info_nce(x, y, temperature=temperature, two_sided=False) + (x * y).sum(1).mean() / temperature
    overlap = -2 * log_mean_kernel(x, y, bandwidth=temperature**0.5)
    push, pull = (torch.autograd.grad(loss, x)[0] for loss in (contrast, overlap))
    # On the sphere the part along a row moves nothing.
    push, pull = (g - (g * x).sum(dim=1, keepdim=True) * x for g in (push, pull))
    torch.testing.assert_close(pull, -2 * 64 * share * push, rtol=1e-9, atol=1e-12)
    # The shares are not equal: no weight makes the two cancel in all rows.
    together = (pull + push * (pull.norm() / push.norm())).norm() / pull.norm()
    assert together < 0.5 if temperature == 1 else together > 0.5


def gaussians(seed, dim):
    generator = torch.Generator().manual_seed(seed)
    means = 0.5 * torch.randn(2, dim, generator=generator, dtype=torch.float64)
    factors = torch.randn(2, dim, dim, generator=generator, dtype=torch.float64) * 0.4
    return means, factors @ factors.mT + 0.3 * torch.eye(dim, dtype=torch.float64)


def test_samples_of_two_gaussians_tend_to_the_closed_form():
    means, covs = gaussians(3, 2)
    noise = torch.randn(2, 6000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Samples with exactly the moments asked for: what remains is the error of the shape.
    noise = noise - noise.mean(dim=1, keepdim=True)
    noise = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.mT @ noise / 6000)).mT
    x, y = means[:, None] + noise @ torch.linalg.cholesky(covs).mT
    expected = gaussian_cauchy_schwarz(means[0], covs[0], means[1], covs[1], bandwidth=0.7)
    for diagonal in (True, False):
        found = cauchy_schwarz_divergence(x, y, bandwidth=0.7, diagonal=diagonal)
        torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


@few
@given(seeds, st.integers(1, 4), st.sampled_from([None, 0.7]))
def test_gaussian_closed_form_is_that_of_overlaps(seed, dim, bandwidth):
    # int p q is the density of the difference of two draws at 0; the kernel is one more Gaussian in it.
    (mean_x, mean_y), (cov_x, cov_y) = gaussians(seed, dim)
    smoothing = (bandwidth or 0) ** 2 * torch.eye(dim, dtype=torch.float64)

    def log_overlap(gap, covariance):
        normal = torch.distributions.MultivariateNormal(gap, covariance + smoothing)
        return normal.log_prob(torch.zeros_like(gap))

    within = log_overlap(0 * mean_x, 2 * cov_x) + log_overlap(0 * mean_x, 2 * cov_y)
    expected = within - 2 * log_overlap(mean_x - mean_y, cov_x + cov_y)
    found = gaussian_cauchy_schwarz(mean_x, cov_x, mean_y, cov_y, bandwidth=bandwidth)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert gaussian_cauchy_schwarz(mean_x, cov_x, mean_x, cov_x, bandwidth=bandwidth).abs() < 1e-12


@pytest.mark.parametrize("count", [40, 3000])
def test_median_rule_is_the_median_distance(count):
    x, y = draw(0, count, count, 6)
    pooled = torch.cat([x, y])
    (width,) = resolve_bandwidth("median", x, y)
    # Above 2048 rows a part of them stands for all.
    assert width == pytest.approx(float(torch.pdist(pooled).median()), rel=1e-12 if count == 40 else 0.02)


def test_silverman_rule_by_hand():
    x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]], dtype=torch.float64)
    spread = math.sqrt((1 + 4) / 2)
    assert resolve_bandwidth("silverman", x)[0] == pytest.approx(math.sqrt(2) * spread * 4 ** (-1 / 6))


@pytest.mark.parametrize("rule", ["median", "silverman"])
def test_rules_scale_with_the_data_carry_no_gradient_and_answer_where_all_points_coincide(rule):
    x, y = draw(1, 30, 20, 5)
    assert resolve_bandwidth(rule, 3 * x, 3 * y)[0] == pytest.approx(3 * resolve_bandwidth(rule, x, y)[0])
    x.requires_grad_()
    width = resolve_bandwidth(rule, x, y)[0]
    by_rule = torch.autograd.grad(cauchy_schwarz_divergence(x, y, bandwidth=rule), x)
    by_number = torch.autograd.grad(cauchy_schwarz_divergence(x, y, bandwidth=width), x)
    torch.testing.assert_close(by_rule, by_number)
    same = torch.ones(5, 3)
    assert cauchy_schwarz_divergence(same, same, bandwidth=rule) == 0


def test_numbers_in_every_form():
    x, y = draw(2, 9, 9, 4)
    expected = cauchy_schwarz_divergence(x, y, bandwidth=0.5)
    for form in (torch.tensor(0.5), [0.5], (0.5,), torch.tensor([0.5]), *(n(0.5) for n in NUMPY)):
        assert cauchy_schwarz_divergence(x, y, bandwidth=form, block_size=np.int64(9)) == expected
    for form in (torch.tensor(0.5), *(n(0.5) for n in NUMPY[:3])):
        assert info_nce(x, y, temperature=form) == info_nce(x, y, temperature=0.5)
        assert build_objective("cs_aligner", cs_weight=float(form), bandwidth=form).cs_weight == 0.5
