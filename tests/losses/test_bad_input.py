"""Every refusal is a ValueError that names the argument and what was found."""

from functools import partial

import pytest
import torch

from csdiff.losses import (
    NonFiniteRows,
    cauchy_schwarz_divergence,
    gaussian_cauchy_schwarz,
    info_nce,
    log_mean_kernel,
    squared_mmd,
    token_cauchy_schwarz_divergence,
)

NAN, INF = float("nan"), float("inf")
X, Y = torch.randn(5, 4), torch.randn(5, 4)
SETS = {"cs": cauchy_schwarz_divergence, "mmd": squared_mmd}


def spoiled(rows, value, *place):
    rows = rows.clone()
    rows[place] = value
    return rows


@pytest.mark.parametrize("loss", [*SETS.values(), info_nce], ids=[*SETS, "info_nce"])
@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        (X[:0], Y[:0], {}, r"x must have at least one row; found shape \(0, 4\) \(N = 0\)"),
        (X, Y[:, :3], {}, r"same D; found shapes \(5, 4\) and \(5, 3\)"),
        (X[0], Y, {}, r"x must have shape \(N, D\) with D > 0; found shape \(4,\)"),
        (X.long(), Y, {}, r"x must be floating point; found dtype torch.int64"),
        ([[1.0]], Y, {}, r"x must be a torch.Tensor of shape \(N, D\); found list"),
        (X, Y, {"block_size": 0}, "block_size must be None or an integer >= 1; found 0"),
        (spoiled(X, NAN, 3, 1), Y, {}, "x must be finite; row 3 is NaN"),
        (spoiled(X, -INF, 3, 1), Y, {}, "x must be finite; row 3 is infinite"),
        (X, spoiled(Y, INF, 2, 1), {}, "y must be finite; row 2 is infinite"),
        (X, spoiled(Y, NAN, 2, 1), {"normalize": True}, "y must be finite; row 2 is NaN"),
    ],
)
def test_rows(loss, x, y, options, message):
    with pytest.raises(NonFiniteRows if "finite" in message else ValueError, match=message):
        loss(x, y, **options)


@pytest.mark.parametrize("loss", SETS.values(), ids=SETS)
@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        *((X, Y, {"bandwidth": b}, "bandwidth must .*found") for b in (0, -1.0, NAN, INF, [0.5, -2], [], "mean")),
        (X, Y, {"bandwidth": torch.tensor(0.0)}, "bandwidth must .*found"),
        (X, Y, {"bandwidth": torch.tensor(0.5, requires_grad=True)}, "must not require a gradient"),
        (X, spoiled(Y, NAN, 2, 1), {"bandwidth": "median"}, "y must be finite; row 2 is NaN"),
        (X[:1], Y, {"diagonal": False}, "without the diagonal needs at least two rows in x; found N = 1"),
        (X, Y[:1], {"diagonal": False}, "without the diagonal needs at least two rows in y; found N = 1"),
        (X.double() * 1e200, Y.double() * -1e200, {}, "squared lengths within the range"),
    ],
)
def test_sets(loss, x, y, options, message):
    with pytest.raises(ValueError, match=message):
        loss(x, y, **options)


def test_the_cross_term_has_no_diagonal():
    assert log_mean_kernel(X[:1], Y, bandwidth=0.5, diagonal=False) < 0


gaussians = gaussian_cauchy_schwarz
tokens = partial(token_cauchy_schwarz_divergence, torch.randn(3, 5, 4))
T, MASK = torch.randn(3, 6, 4), torch.ones(3, 5, dtype=torch.bool)
EYE = {"mean_x": torch.zeros(2), "cov_x": torch.eye(2), "mean_y": torch.zeros(2), "cov_y": torch.eye(2)}


@pytest.mark.parametrize(
    ("refuse", "message"),
    [
        *(
            (partial(info_nce, X, Y, temperature=t), "temperature must be a finite number > 0; found")
            for t in (0, -0.1, NAN, torch.tensor(-1.0), "hot")
        ),
        (partial(info_nce, X, Y, temperature=torch.ones(2)), "temperature must have one element"),
        (partial(info_nce, X, Y[:4]), r"must be pairs, with the same N; found shapes \(5, 4\) and \(4, 4\)"),
        *(
            (partial(cauchy_schwarz_divergence, X, Y, within_y=v), r"log V\(y, y\), a finite number <= 0; found")
            for v in (NAN, -INF, torch.tensor(NAN), 0.5)
        ),
        (partial(cauchy_schwarz_divergence, X, Y, within_y=torch.zeros(2)), r"one number; found shape \(2,\)"),
        (partial(tokens, T, spoiled(MASK, False, 1)), r"x_mask must leave at least one token .* rows \[1\]"),
        (partial(tokens, T, None, MASK), r"y_mask must be boolean.*\(3, 6\); found .*\(3, 5\)"),
        (partial(tokens, T, MASK.long()), "x_mask must be boolean"),
        (partial(tokens, T[..., :3]), "x_tokens and y_tokens must have the same D"),
        (partial(tokens, T[:2]), "the same B"),
        (partial(tokens, T[0]), r"y_tokens must be a tensor of shape \(B, tokens, D\)"),
        (
            partial(tokens, T, spoiled(MASK, False, 1, slice(1, None)), diagonal=False),
            r"at least two tokens with diagonal=False in every row; rows \[1\]",
        ),
        (partial(tokens, spoiled(T, NAN, 2, 0)), r"y_tokens must be finite; rows \[2\]"),
        (partial(gaussians, **{**EYE, "mean_y": torch.zeros(3)}), r"\(d,\).*found \(2,\), \(2, 2\), \(3,"),
        (partial(gaussians, **{**EYE, "cov_y": -torch.eye(2)}), "cov_y must be positive definite"),
        (partial(gaussians, **EYE, bandwidth=0), "bandwidth must be a finite number > 0"),
        (partial(gaussians, **{**EYE, "mean_x": torch.tensor([0, NAN])}), "mean_x must be finite; row 1"),
        (partial(gaussians, **{**EYE, "cov_y": torch.eye(2) * INF}), "cov_y must be finite; row 0"),
    ],
)
def test_each_function(refuse, message):
    with pytest.raises(ValueError, match=message):
        refuse()
