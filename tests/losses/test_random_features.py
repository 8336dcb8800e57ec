"""The linear-time estimate tends to the exact divergence as the features grow."""

import pytest
import torch
from reference import assert_agree, value_and_gradients

from csdiff.losses import cauchy_schwarz_divergence, random_feature_cauchy_schwarz
from csdiff.losses.random_features import draw_frequencies


def unit_sets(n=300, m=250, dim=24, gap=0.6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    y = torch.randn(m, dim, generator=generator, dtype=torch.float64) + gap
    return torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)


def errors(features, *, orthogonal, bandwidth=0.7, diagonal=True):
    x, y = unit_sets()
    exact = cauchy_schwarz_divergence(x, y, bandwidth=bandwidth, diagonal=diagonal)
    found = [
        random_feature_cauchy_schwarz(
            x, y, bandwidth=bandwidth, num_features=features, orthogonal=orthogonal, seed=seed, diagonal=diagonal
        )
        for seed in range(12)
    ]
    return (torch.stack(found) - exact).square().mean().sqrt() / exact


@pytest.mark.parametrize("diagonal", [True, False])
def test_error_falls_with_the_number_of_features(diagonal):
    few, many = (errors(f, orthogonal=True, diagonal=diagonal) for f in (128, 4096))
    assert many < 0.35 * few
    assert many < 0.02


def test_orthogonal_frequencies_lower_the_error():
    assert errors(512, orthogonal=True) < errors(512, orthogonal=False)


def test_gradient_tends_to_the_exact_one():
    x, y = unit_sets()
    _, exact = value_and_gradients(cauchy_schwarz_divergence, x, y, bandwidth=0.7)
    _, found = value_and_gradients(random_feature_cauchy_schwarz, x, y, bandwidth=0.7, num_features=16384)
    for one, other in zip(found, exact, strict=True):
        assert (one - other).norm() < 0.1 * other.norm()


def test_value_and_gradient_do_not_depend_on_the_block_size():
    x, y = unit_sets()
    options = {"bandwidth": (0.5, 1.0), "num_features": 64, "diagonal": False}
    one = value_and_gradients(random_feature_cauchy_schwarz, x, y, block_size=7, **options)
    assert_agree(one, value_and_gradients(random_feature_cauchy_schwarz, x, y, **options), 1e-10)


def test_gradient_is_that_of_the_value():
    x, y = (t[:4, :3].clone().requires_grad_() for t in unit_sets())
    loss = lambda a, b: random_feature_cauchy_schwarz(a, b, bandwidth=0.9, num_features=12, normalize=True)  # noqa: E731
    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


def test_sets_far_apart_stay_finite():
    x, y = unit_sets()
    value, gradients = value_and_gradients(random_feature_cauchy_schwarz, x, y + 1000, bandwidth=0.5)
    assert torch.isfinite(value)
    assert value > 1
    assert all(torch.isfinite(g).all() for g in gradients)


def test_frequencies_have_the_kernel_as_their_mean():
    frequencies = draw_frequencies(3, 30_000, (0.8,), seed=1)
    point = torch.tensor([0.3, -0.5, 0.9], dtype=torch.float64)
    expected = torch.exp(-point.square().sum() / (2 * 0.8**2))
    torch.testing.assert_close(torch.cos(frequencies @ point).mean(), expected, rtol=0, atol=0.01)


def test_orthogonal_blocks_and_seeds():
    frequencies = draw_frequencies(5, 12, (1.0,))
    for block in frequencies.split(5):
        products = block @ block.T
        torch.testing.assert_close(products, products.diagonal().diag(), rtol=0, atol=1e-10)
    assert torch.equal(frequencies, draw_frequencies(5, 12, (1.0,)))
    assert not torch.equal(frequencies, draw_frequencies(5, 12, (1.0,), seed=1))
