"""InfoNCE against plain cross entropy, and at its limits."""

import math

import pytest
import reference
import torch
from reference import TOLERANCE, assert_agree, value_and_gradients

from csdiff.losses import info_nce


def pairs(n=41, dim=24, noise=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    y = x + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64)
    return x.float().double(), y.float().double()


# Rows are taken as they are by default: their logits reach several hundred.
@pytest.mark.parametrize("options", [{"temperature": 0.07, "normalize": True}, {"temperature": 0.1}], ids=str)
@pytest.mark.parametrize("two_sided", [True, False])
@pytest.mark.parametrize("block_size", [None, 1, 7, 16, 41, 1000])
def test_any_block_size(block_size, two_sided, options, dtype):
    x, y = pairs()
    options = {**options, "two_sided": two_sided}
    expected = value_and_gradients(reference.info_nce, x, y, **options)
    found = value_and_gradients(info_nce, x, y, dtype=dtype, block_size=block_size, **options)
    assert found[0].dtype == dtype
    assert_agree(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 1.0, 100.0])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_learnable_temperature(noise, temperature, dtype):
    x, y = pairs(noise=noise)
    t = torch.tensor(temperature, dtype=torch.float32).double()

    def loss(function, a, b, scale):
        return function(a, b, temperature=scale, normalize=True)

    expected = value_and_gradients(lambda *args: loss(reference.info_nce, *args), x, y, t)
    found = value_and_gradients(lambda *args: loss(info_nce, *args), x, y, t, dtype=dtype)
    assert_agree(found, expected, TOLERANCE[dtype])


def test_a_single_pair_costs_nothing():
    x, y = pairs(1)
    value, gradients = value_and_gradients(info_nce, x, y, temperature=0.07, normalize=True)
    assert value == 0
    assert all((g == 0).all() for g in gradients)


def test_pairs_all_alike_cost_the_log_of_their_number():
    x = torch.ones(20, 5, dtype=torch.float64)
    expected = torch.tensor(math.log(20), dtype=torch.float64)
    torch.testing.assert_close(info_nce(x, x, temperature=0.07), expected)


def test_a_loss_far_below_rounding_keeps_its_digits():
    # Two orthogonal pairs: log(1 + exp(-1 / t)) each.
    x = torch.eye(2)
    found = info_nce(x, x, temperature=0.025)
    assert float(found) == pytest.approx(math.exp(-40), rel=1e-5)
