"""The token-level term is the mean of the pairs' own divergences."""

import pytest
import reference
import torch
from reference import TOLERANCE, assert_agree, value_and_gradients

from csdiff.losses import cauchy_schwarz_divergence, token_cauchy_schwarz_divergence


def problem(batch=6, length=9, patches=13, dim=16):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, length, dim, generator=generator, dtype=torch.float64)
    y = torch.randn(batch, patches, dim, generator=generator, dtype=torch.float64) + 0.3
    x_mask = torch.rand(batch, length, generator=generator) > 0.4
    y_mask = torch.rand(batch, patches, generator=generator) > 0.4
    x_mask[:, :2] = y_mask[:, :2] = True
    return x.float().double(), y.float().double(), x_mask, y_mask


def by_loop(x, y, x_mask, y_mask, **options):
    parts = [reference.divergence(a[m], b[n], **options) for a, b, m, n in zip(x, y, x_mask, y_mask, strict=True)]
    return torch.stack(parts).mean()


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("bandwidth", [0.1, 1.0, 5.0, (0.3, 1.0)])
@pytest.mark.parametrize("block_size", [None, 1, 4])
def test_equals_a_loop_over_pairs(block_size, bandwidth, diagonal, dtype):
    x, y, x_mask, y_mask = problem()
    options = {"bandwidth": bandwidth, "diagonal": diagonal, "normalize": True}
    expected = value_and_gradients(lambda a, b: by_loop(a, b, x_mask, y_mask, **options), x, y)
    found = value_and_gradients(
        lambda a, b: token_cauchy_schwarz_divergence(a, b, x_mask, y_mask, block_size=block_size, **options),
        x,
        y,
        dtype=dtype,
    )
    assert_agree(found, expected, TOLERANCE[dtype])


def test_without_masks_all_tokens_count():
    x, y, _, _ = problem()
    parts = [cauchy_schwarz_divergence(a, b, bandwidth=2.0) for a, b in zip(x, y, strict=True)]
    torch.testing.assert_close(token_cauchy_schwarz_divergence(x, y, bandwidth=2.0), torch.stack(parts).mean())


def test_what_masked_tokens_hold_does_not_matter():
    x, y, x_mask, y_mask = problem()
    clean = value_and_gradients(
        lambda a: token_cauchy_schwarz_divergence(a, y, x_mask, y_mask, bandwidth=0.5, normalize=True), x
    )
    x[~x_mask], y[~y_mask] = float("nan"), float("inf")
    dirty = value_and_gradients(
        lambda a: token_cauchy_schwarz_divergence(a, y, x_mask, y_mask, bandwidth=0.5, normalize=True), x
    )
    assert_agree(dirty, clean, 0)
    assert (dirty[1][0][~x_mask] == 0).all()


def test_identical_far_apart_and_duplicated_tokens(dtype):
    x, y, x_mask, y_mask = problem()
    same = token_cauchy_schwarz_divergence(x.to(dtype), x.to(dtype), x_mask, x_mask, bandwidth=1.0)
    assert 0 <= same < 1e-5
    y = y + 20
    y[:, 3:6] = y[:, :3]
    expected = value_and_gradients(lambda a, b: by_loop(a, b, x_mask, y_mask, bandwidth=1.0), x, y)
    found = value_and_gradients(
        lambda a, b: token_cauchy_schwarz_divergence(a, b, x_mask, y_mask, bandwidth=1.0), x, y, dtype=dtype
    )
    assert_agree(found, expected, TOLERANCE[dtype])


def test_rule_for_the_bandwidth_pools_all_tokens():
    x, y, x_mask, y_mask = problem()
    width = float(torch.pdist(torch.cat([x[x_mask], y[y_mask]])).median())
    torch.testing.assert_close(
        token_cauchy_schwarz_divergence(x, y, x_mask, y_mask, bandwidth="median"),
        token_cauchy_schwarz_divergence(x, y, x_mask, y_mask, bandwidth=width),
    )
