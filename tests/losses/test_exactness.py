"""Value and gradient against plain float64 formulas: to 2e-4 in float32, to 1e-9 in float64."""

import math
from functools import partial

import pytest
import reference
import torch
from reference import TOLERANCE, assert_agree, draw, two_sets, value_and_gradients

from csdiff.losses import cauchy_schwarz_divergence, info_nce, log_mean_kernel, token_cauchy_schwarz_divergence

TOKENS = draw(6, 9, 16), (draw(6, 13, 16, seed=1) + 0.3).float().double()
X_MASK, Y_MASK = draw(6, 9, seed=2) > -0.3, draw(6, 13, seed=3) > -0.3
X_MASK[:, :2] = Y_MASK[:, :2] = True
MASKS = {"x_mask": X_MASK, "y_mask": Y_MASK}
LOSSES = {
    "cs": (cauchy_schwarz_divergence, reference.divergence),
    "info_nce": (info_nce, reference.info_nce),
    "tokens": (token_cauchy_schwarz_divergence, reference.token_divergence),
    "masked tokens": (partial(token_cauchy_schwarz_divergence, **MASKS), partial(reference.token_divergence, **MASKS)),
}


def pairs(noise=1.0):
    x = draw(41, 24)
    return x, (x + noise * draw(41, 24, seed=1)).float().double()


def check(name, x, y, dtype, *, block_size=None, **options):
    loss, formula = LOSSES[name]
    expected = value_and_gradients(formula, x, y, **options)
    found = value_and_gradients(loss, x, y, dtype=dtype, block_size=block_size, **options)
    assert found[0].dtype == dtype
    assert_agree(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("cs", {"bandwidth": b, "normalize": b < 1, "diagonal": d}) for b in (3.0, 0.5) for d in (True, False)),
        # Rows are taken as they are by default: their logits reach several hundred.
        *(("info_nce", {"temperature": 0.1, "two_sided": s}) for s in (True, False)),
        *(("info_nce", {"temperature": 0.07, "normalize": True, "two_sided": s}) for s in (True, False)),
        *(
            ("masked tokens", {"bandwidth": b, "normalize": True, "diagonal": d})
            for b in (0.1, 1.0, 5.0, (0.3, 1.0))
            for d in (True, False)
        ),
        ("tokens", {"bandwidth": 2.0}),
    ],
    ids=str,
)
@pytest.mark.parametrize("block_size", [None, 1, 4, 16, 41, 53, 1000])
def test_any_block_size(name, block_size, options, dtype):
    problem = {"cs": two_sets(), "info_nce": pairs()}.get(name, TOKENS)
    check(name, *problem, dtype, block_size=block_size, **options)


@pytest.mark.parametrize("bandwidth", [0.1, 0.2, 0.5, 1.5, 4.0, 20.0, (0.3, 0.5, 1.0), (0.1, 5.0)])
def test_narrow_wide_and_mixed_bandwidths(bandwidth, dtype):
    options = {"normalize": True, "block_size": 32, "diagonal": not isinstance(bandwidth, tuple)}
    check("cs", *two_sets(120, 90), dtype, bandwidth=bandwidth, **options)


def test_few_and_duplicated_rows(dtype):
    for sizes in ((1, 1), (1, 20), (20, 1), (2, 3)):
        check("cs", *two_sets(*sizes), dtype, bandwidth=4.0)
    x, y = two_sets()
    x[10:30] = x[30:50]
    y[:5] = x[:5]
    for diagonal in (True, False):
        check("cs", x, y, dtype, bandwidth=1.0, diagonal=diagonal, block_size=9)
    # Clusters far apart within each set.
    x[20:] += 10.0
    y[20:] += 10.0
    check("cs", x.float().double(), y.float().double(), dtype, bandwidth=2.0, block_size=8)


def test_far_apart_and_duplicated_tokens(dtype):
    x, y = TOKENS[0], (TOKENS[1] + 20).float().double()
    y[:, 3:6] = y[:, :3]
    check("masked tokens", x, y, dtype, bandwidth=1.0)


@pytest.mark.parametrize("distance", [30.0, 1e2, 1e3])
def test_sets_so_far_apart_that_the_kernel_underflows(distance, dtype):
    x, y = two_sets()
    y = (y + distance).float().double()
    assert torch.exp(-reference.squared_distances(x, y).min() / 2) == 0
    if dtype == torch.float64:
        check("cs", x, y, dtype, bandwidth=1.0, block_size=16)
    # In float32 rounding decides which pair is the nearest, but not where the sets pull each other.
    found = value_and_gradients(cauchy_schwarz_divergence, x, y, dtype=dtype, bandwidth=1.0, block_size=16)
    right = value_and_gradients(reference.divergence, x, y, bandwidth=1.0)
    assert float(found[0]) == pytest.approx(float(right[0]), rel=2e-4)
    for one, other in zip(found[1], right[1], strict=True):
        torch.testing.assert_close(one.sum(dim=0).double(), other.sum(dim=0), rtol=2e-4, atol=0)


@pytest.mark.parametrize("bandwidth", [0.1, 0.5, 5.0, "median", "silverman"])
def test_identical_sets_give_zero_and_no_gradient(bandwidth, dtype):
    for loss, rows, options in (
        (cauchy_schwarz_divergence, two_sets()[0], {"block_size": 20}),
        (token_cauchy_schwarz_divergence, TOKENS[0], {}),
    ):
        value, (gradient, _) = value_and_gradients(
            loss, rows, rows, dtype=dtype, bandwidth=bandwidth, normalize=True, **options
        )
        assert 0 <= value <= 1e-5
        assert gradient.abs().max() <= 1e-5


@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("widths", [(2.0,), (0.5, 3.0)])
def test_each_term_alone(widths, diagonal, dtype):
    x, y = two_sets()
    options = {"dtype": dtype, "bandwidth": widths, "block_size": 11}
    own = value_and_gradients(log_mean_kernel, x, diagonal=diagonal, **options)
    right = value_and_gradients(lambda a: reference.log_mean_kernel(a, a, widths, exclude_own=not diagonal), x)
    assert_agree(own, right, TOLERANCE[dtype])
    cross = value_and_gradients(log_mean_kernel, x, y, diagonal=diagonal, **options)
    assert_agree(cross, value_and_gradients(reference.log_mean_kernel, x, y, widths=widths), TOLERANCE[dtype])


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


@pytest.mark.parametrize("temperature", [0.005, 0.01, 0.07, 1.0, 100.0])
@pytest.mark.parametrize("noise", [0.5, 3.0])
def test_learnable_temperature(noise, temperature, dtype):
    problem = *pairs(noise=noise), torch.tensor(temperature).double()
    found, expected = (
        value_and_gradients(lambda a, b, t: loss(a, b, temperature=t, normalize=True), *problem, dtype=d)  # noqa: B023
        for loss, d in ((info_nce, dtype), (reference.info_nce, torch.float64))
    )
    assert_agree(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("x", "temperature", "expected"),
    [
        (draw(1, 24), 0.07, 0),
        (torch.ones(20, 5), 0.07, math.log(20)),
        # Two orthogonal pairs: log(1 + exp(-1 / t)) each, far below rounding.
        (torch.eye(2), 0.025, math.exp(-40)),
    ],
    ids=["a single pair", "all alike", "tiny"],
)
def test_info_nce_in_closed_form(x, temperature, expected):
    value, gradients = value_and_gradients(info_nce, x, x, dtype=torch.float32, temperature=temperature)
    assert float(value) == pytest.approx(expected, rel=1e-5, abs=0)
    if expected == 0:
        assert all((g == 0).all() for g in gradients)


def test_what_masked_tokens_hold_does_not_matter():
    def solve(x, y):
        options = {"bandwidth": 0.5, "normalize": True, **MASKS}
        return value_and_gradients(lambda a: token_cauchy_schwarz_divergence(a, y, **options), x)

    x, y = TOKENS
    clean = solve(x, y)
    dirty = solve(x.masked_fill(~X_MASK[..., None], float("nan")), y.masked_fill(~Y_MASK[..., None], float("inf")))
    assert_agree(dirty, clean, 0)
    assert (dirty[1][0][~X_MASK] == 0).all()


def test_rule_for_the_bandwidth_pools_all_tokens():
    width = float(torch.pdist(torch.cat([TOKENS[0][X_MASK], TOKENS[1][Y_MASK]])).median())
    by_rule, by_number = (
        token_cauchy_schwarz_divergence(*TOKENS, **MASKS, bandwidth=bandwidth) for bandwidth in ("median", width)
    )
    torch.testing.assert_close(by_rule, by_number)
