"""Half precision, autocast, second derivatives, and the sizes of what is kept in memory."""

import pytest
import reference
import torch
from reference import assert_agree, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from csdiff.losses import (
    CSAlignerLoss,
    cauchy_schwarz_divergence,
    info_nce,
    random_feature_cauchy_schwarz,
    token_cauchy_schwarz_divergence,
)
from csdiff.losses.kernel_sums import KernelTiles, Points, kernel_sums
from csdiff.losses.products import Products

LOSSES = {
    "cs": lambda x, y: cauchy_schwarz_divergence(x, y, bandwidth=0.5, normalize=True, block_size=16),
    "info_nce": lambda x, y: info_nce(x, y, temperature=0.07, normalize=True, block_size=16),
    "tokens": lambda x, y: token_cauchy_schwarz_divergence(
        x.reshape(8, 5, 24), y.reshape(8, 5, 24), bandwidth=0.5, normalize=True
    ),
    "random_features": lambda x, y: random_feature_cauchy_schwarz(x, y, bandwidth=0.5, normalize=True),
    "cs_aligner": lambda x, y: (
        CSAlignerLoss(source_weight=0.5, regression_weight=1.0)(x, y, source_text=y.detach()).loss
    ),
}


def two_sets():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(40, 24, generator=generator), torch.randn(40, 24, generator=generator) + 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    x, y = (t.to(dtype) for t in two_sets())
    value, gradients = value_and_gradients(LOSSES[name], x, y, dtype=dtype)
    assert value.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients)
    expected, right = value_and_gradients(LOSSES[name], x.float(), y.float(), dtype=torch.float32)
    # The gradient is rounded to the dtype of the input; bfloat16 products, where there are any, keep three digits.
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)
    for one, other in zip(gradients, right, strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    x, y = two_sets()
    expected = value_and_gradients(LOSSES[name], x, y, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = value_and_gradients(LOSSES[name], x, y, dtype=torch.float32)
    assert_agree(found, expected, 0)


def test_bfloat16_factors_give_the_sums_of_the_rounded_points():
    x, _ = two_sets()
    x = torch.nn.functional.normalize(x, dim=1)
    products = Products(x.device, bfloat16=True)
    rows = products.factor(x)
    torch.testing.assert_close(rows.double(), x.bfloat16().double(), rtol=0, atol=0)
    points = Points(rows, rows.float().square().sum(dim=1))
    tiles = KernelTiles((0.5,), products, torch.float32, 1.0, small=False)
    with products.active():
        sums = kernel_sums(points, points, tiles, block=16, own=0, row_gradient=True)
    exact = rows.double()
    kernel = torch.exp(-2 * torch.cdist(exact, exact).square()).fill_diagonal_(0)
    torch.testing.assert_close(sums.log_sum(), kernel.sum().log(), rtol=1e-5, atol=1e-5)
    pull = (sums.row_mix - sums.row_weight[:, None] * rows) * torch.exp(torch.tensor(sums.shift))
    expected = kernel @ exact - kernel.sum(dim=1, keepdim=True) * exact
    assert (pull - expected).norm() <= 0.01 * expected.norm()


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_second_derivative_of_the_divergence(normalize, diagonal):
    x, y = (t[:6, :3].double().requires_grad_() for t in two_sets())
    assert torch.autograd.gradgradcheck(
        lambda a, b: cauchy_schwarz_divergence(
            a, b, bandwidth=(0.6, 1.5), normalize=normalize, diagonal=diagonal, block_size=4
        ),
        (x, y),
    )


@pytest.mark.parametrize("two_sided", [True, False])
def test_second_derivative_of_info_nce(two_sided):
    x, y = (t[:6, :3].double().requires_grad_() for t in two_sets())
    t = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(
        lambda a, b, s: info_nce(a, b, temperature=s, normalize=True, two_sided=two_sided, block_size=4), (x, y, t)
    )


def test_create_graph_gives_the_same_first_derivative():
    x, y = two_sets()
    expected = value_and_gradients(LOSSES["cs"], x, y)
    x, y = x.double().requires_grad_(), y.double()
    (gradient,) = torch.autograd.grad(LOSSES["cs"](x, y), x, create_graph=True)
    torch.testing.assert_close(gradient.detach(), expected[1][0], rtol=1e-9, atol=1e-14)


def test_backward_twice_through_a_kept_graph():
    x, y = two_sets()
    x.requires_grad_()
    loss = LOSSES["cs"](x, y)
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, x)
    torch.testing.assert_close(second, 3 * first)


class Sizes(TorchDispatchMode):
    """Records the number of entries of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            # Expanded views hold no memory of their own.
            if isinstance(one, torch.Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("name", ["cs", "info_nce", "random_features"])
def test_no_matrix_of_all_pairs_is_made(name):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(900, 8, generator=generator, requires_grad=True) for _ in range(2))
    losses = {
        "cs": lambda: cauchy_schwarz_divergence(x, y, bandwidth=0.5, block_size=50),
        "info_nce": lambda: info_nce(x, y, temperature=1.0, block_size=50),
        "random_features": lambda: random_feature_cauchy_schwarz(x, y, num_features=16, block_size=50),
    }
    with Sizes() as sizes:
        losses[name]().backward()
    assert sizes.largest <= 900 * 8


def test_values_alone_compute_no_gradient():
    x, y = two_sets()
    with torch.no_grad(), Sizes():
        value = cauchy_schwarz_divergence(x.requires_grad_(), y, bandwidth=0.5)
    assert not value.requires_grad
    torch.testing.assert_close(value.double(), reference.divergence(x.detach(), y, bandwidth=0.5), rtol=1e-5, atol=0)
