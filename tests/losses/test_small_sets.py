"""Small sets go another way than large ones: the same values and gradients, and only where it is safe."""

import pytest
import reference
import torch
from reference import assert_agree, value_and_gradients

from csdiff.losses import cauchy_schwarz_divergence, info_nce, log_mean_kernel
from csdiff.losses.kernel_terms import KernelOptions
from csdiff.losses.small_sets import KERNEL_ROWS, small_divergence, small_info_nce

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}


def two_sets(n, m, dim=24, gap=0.2):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(rows, dim, generator=generator) for rows in (n, m))
    return x.double(), (y + gap).double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("sizes", [(5, 9), (200, 120)])
def test_divergence(sizes, diagonal, normalize, dtype):
    x, y = two_sets(*sizes, gap=0.6)
    options = {"bandwidth": 0.5 if normalize else 3.0, "diagonal": diagonal, "normalize": normalize}
    assert small_divergence(x.to(dtype), y.to(dtype), KernelOptions(**options), None) is not None
    expected = value_and_gradients(reference.divergence, x, y, **options)
    found = value_and_gradients(cauchy_schwarz_divergence, x, y, dtype=dtype, **options)
    assert found[0].dtype == dtype
    assert_agree(found, expected, TOLERANCE[dtype])
    constant = log_mean_kernel(y.to(dtype), **options)
    given = value_and_gradients(
        lambda a: cauchy_schwarz_divergence(a, y.to(dtype), within_y=constant, **options), x, dtype=dtype
    )
    assert_agree(given, (expected[0], expected[1][:1]), TOLERANCE[dtype])
    _, (only_y,) = value_and_gradients(lambda b: cauchy_schwarz_divergence(x.to(dtype), b, **options), y, dtype=dtype)
    assert (only_y.double() - expected[1][1]).norm() <= TOLERANCE[dtype] * expected[1][1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("n", [2, 300])
def test_info_nce(n, normalize, two_sided, dtype):
    x, y = two_sets(n, n)
    y, t = x + y, torch.tensor(0.25 if normalize else 8.0, dtype=torch.float64)
    assert small_info_nce(x.to(dtype), y.to(dtype), t, two_sided, normalize) is not None

    def loss(function):
        return lambda a, b, s: function(a, b, temperature=s, normalize=normalize, two_sided=two_sided)

    expected = value_and_gradients(loss(reference.info_nce), x, y, t)
    found = value_and_gradients(loss(info_nce), x, y, t, dtype=dtype)
    assert found[0].dtype == dtype
    assert_agree(found, expected, TOLERANCE[dtype])
    fixed = value_and_gradients(
        lambda a, b: info_nce(a, b, temperature=float(t), normalize=normalize, two_sided=two_sided), x, y, dtype=dtype
    )
    assert_agree(fixed, (expected[0], expected[1][:2]), TOLERANCE[dtype])


def test_what_is_not_plain_is_left_to_the_blocks():
    x, y = two_sets(150, 160, dim=64)
    x, y = x.float(), y.float()
    spoiled = x.clone()
    spoiled[3, 1] = float("nan")
    twins = y.clone()
    twins[:5] = x[:5] + 1e-4
    for a, b, bandwidth, normalize in (
        (x, y, 0.01, False),
        (x, y, 1000.0, False),
        (x, y, "median", False),
        (x, y, (1.0, 2.0), False),
        (spoiled, y, 8.0, False),
        (x, twins, 8.0, False),
        (x + 1000, y + 1000, 1e-2, True),
        (x, torch.cat([y] * 4)[:KERNEL_ROWS], 8.0, False),
        (x, torch.zeros_like(y), 0.5, True),
    ):
        assert small_divergence(a, b, KernelOptions(bandwidth, normalize=normalize), None) is None
    assert small_divergence(x, y, KernelOptions(8.0), None) is not None
    assert small_divergence(x, y, KernelOptions(8.0, block_size=9), None) is None
    assert small_info_nce(x, x, 0.07, True, False) is None
    assert small_info_nce(spoiled, x, 10.0, True, False) is None
    assert small_info_nce(torch.zeros_like(x), x, 1.0, True, True) is None


def test_backward_twice_and_under_no_grad():
    x, y = two_sets(6, 6)
    for loss in (
        lambda a: cauchy_schwarz_divergence(a, y, bandwidth=3.0),
        lambda a: info_nce(a, y, temperature=5.0),
    ):
        leaf = x.clone().requires_grad_()
        value = loss(leaf)
        (first,) = torch.autograd.grad(value, leaf, retain_graph=True)
        (second,) = torch.autograd.grad(3 * value, leaf, retain_graph=True)
        torch.testing.assert_close(second, 3 * first)
        (again,) = torch.autograd.grad(value, leaf, create_graph=True)
        torch.testing.assert_close(again.detach(), first, rtol=1e-9, atol=1e-14)
        with torch.no_grad():
            assert not loss(leaf).requires_grad
