"""Value and gradient of the kernel sums against plain float64 formulas: to 2e-4 in float32, to 1e-9 in float64."""

import pytest
import reference
import torch
from reference import TOLERANCE, assert_agree, value_and_gradients

from csdiff.losses import cauchy_schwarz_divergence, log_mean_kernel


def two_sets(n=53, m=38, dim=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    y = 0.8 * torch.randn(m, dim, generator=generator, dtype=torch.float64) + 0.2
    # Values that float32 holds exactly, so that both dtypes see the same problem.
    return x.float().double(), y.float().double()


def check(x, y, dtype, *, block_size=None, floor=0.0, **options):
    x, y = x.to(dtype), y.to(dtype)
    expected = value_and_gradients(reference.divergence, x.double(), y.double(), **options)
    found = value_and_gradients(cauchy_schwarz_divergence, x, y, dtype=dtype, block_size=block_size, **options)
    assert found[0].dtype == dtype
    assert_agree(found, expected, TOLERANCE[dtype], floor)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("block_size", [None, 1, 16, 53, 1000])
def test_any_block_size(block_size, diagonal, normalize, dtype):
    x, y = two_sets()
    check(
        x, y, dtype, bandwidth=0.5 if normalize else 3.0, diagonal=diagonal, normalize=normalize, block_size=block_size
    )


@pytest.mark.parametrize("bandwidth", [0.1, 0.2, 0.5, 1.5, 4.0, 20.0, (0.3, 0.5, 1.0), (0.1, 5.0)])
def test_narrow_wide_and_mixed_bandwidths(bandwidth, dtype):
    x, y = two_sets(120, 90)
    check(x, y, dtype, bandwidth=bandwidth, normalize=True, block_size=32, diagonal=not isinstance(bandwidth, tuple))


def test_few_and_duplicated_rows(dtype):
    for sizes in ((1, 1), (1, 20), (20, 1), (2, 3)):
        check(*two_sets(*sizes), dtype, bandwidth=4.0)
    x, y = two_sets()
    x[10:30] = x[30:50]
    y[:5] = x[:5]
    for diagonal in (True, False):
        check(x, y, dtype, bandwidth=1.0, diagonal=diagonal, block_size=9)
    # Clusters far apart within each set.
    x[20:] += 10.0
    y[20:] += 10.0
    check(x.float().double(), y.float().double(), dtype, bandwidth=2.0, block_size=8)


@pytest.mark.parametrize("distance", [30.0, 1e2, 1e3])
def test_sets_so_far_apart_that_the_kernel_underflows(distance, dtype):
    x, y = two_sets()
    y = (y + distance).float().double()
    assert torch.exp(-reference.squared_distances(x, y).min() / 2) == 0
    if dtype == torch.float64:
        check(x, y, dtype, bandwidth=1.0, block_size=16)
    # In float32 rounding decides which pair is the nearest, but not where the sets pull each other.
    found = value_and_gradients(cauchy_schwarz_divergence, x, y, dtype=dtype, bandwidth=1.0, block_size=16)
    right = value_and_gradients(reference.divergence, x, y, bandwidth=1.0)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=2e-4)
    for one, other in zip(found[1], right[1], strict=True):
        torch.testing.assert_close(one.sum(dim=0).double(), other.sum(dim=0), rtol=2e-4, atol=0)


@pytest.mark.parametrize("bandwidth", [0.1, 0.5, 5.0, "median", "silverman"])
def test_identical_sets_give_zero_and_no_gradient(bandwidth, dtype):
    x = two_sets()[0].to(dtype)
    value, (gradient, _) = value_and_gradients(
        cauchy_schwarz_divergence, x, x.clone(), dtype=dtype, bandwidth=bandwidth, normalize=True, block_size=20
    )
    assert 0 <= value <= 1e-5
    assert gradient.abs().max() <= 1e-5


@pytest.mark.parametrize("diagonal", [True, False])
def test_each_term_alone(diagonal, dtype):
    x, y = two_sets()
    for widths in ((2.0,), (0.5, 3.0)):
        own = value_and_gradients(log_mean_kernel, x, dtype=dtype, bandwidth=widths, diagonal=diagonal, block_size=11)
        right = value_and_gradients(reference.log_mean_kernel_within, x, widths=widths, exclude_own=not diagonal)
        assert_agree(own, right, TOLERANCE[dtype])
        cross = value_and_gradients(log_mean_kernel, x, y, dtype=dtype, bandwidth=widths, block_size=11)
        right = value_and_gradients(reference.log_mean_kernel, x, y, widths=widths)
        assert_agree(cross, right, TOLERANCE[dtype])


def test_frozen_target_term_can_be_passed_in():
    x, y = two_sets()
    options = {"bandwidth": 0.5, "normalize": True}
    whole = value_and_gradients(lambda a: cauchy_schwarz_divergence(a, y, **options), x)
    known = log_mean_kernel(y, **options)
    given = value_and_gradients(lambda a: cauchy_schwarz_divergence(a, y, within_y=known, **options), x)
    assert_agree(given, whole, 1e-12)
    with pytest.raises(ValueError, match="within_y"):
        cauchy_schwarz_divergence(x, y.clone().requires_grad_(), within_y=known, **options)


def test_the_gradient_of_one_side_alone_and_of_one_tensor_on_both():
    x, y = two_sets()
    _, both = value_and_gradients(cauchy_schwarz_divergence, x, y, bandwidth=3.0)
    _, (only_x,) = value_and_gradients(lambda a: cauchy_schwarz_divergence(a, y, bandwidth=3.0), x)
    _, (only_y,) = value_and_gradients(lambda b: cauchy_schwarz_divergence(x, b, bandwidth=3.0), y)
    torch.testing.assert_close((only_x, only_y), both, rtol=1e-10, atol=1e-14)
    _, (twice,) = value_and_gradients(lambda a: log_mean_kernel(a, a, bandwidth=3.0), x)
    _, (within,) = value_and_gradients(log_mean_kernel, x, bandwidth=3.0)
    torch.testing.assert_close(twice, within, rtol=1e-9, atol=1e-14)


def test_a_zero_row_keeps_everything_finite_under_normalize():
    x, y = two_sets()
    x[3] = 0
    value, gradients = value_and_gradients(cauchy_schwarz_divergence, x, y, bandwidth=0.5, normalize=True)
    assert torch.isfinite(value)
    assert all(torch.isfinite(g).all() for g in gradients)
    assert (gradients[0][3] == 0).all()
