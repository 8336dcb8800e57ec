"""Every refusal is a ValueError that names the argument and what was found."""

import numpy as np
import pytest
import torch

from csdiff.losses import (
    NonFiniteRows,
    build_objective,
    cauchy_schwarz_divergence,
    gaussian_cauchy_schwarz,
    info_nce,
    log_mean_kernel,
    squared_mmd,
    token_cauchy_schwarz_divergence,
)

X, Y = torch.randn(5, 4), torch.randn(6, 4)
SET_LOSSES = {
    "cs": lambda x, y, **options: cauchy_schwarz_divergence(x, y, **{"bandwidth": 0.5, **options}),
    "mmd": lambda x, y, **options: squared_mmd(x, y, **{"bandwidth": 0.5, **options}),
}
ALL = {**SET_LOSSES, "info_nce": lambda x, y, **options: info_nce(x, y[: len(x)], temperature=0.1, **options)}


def spoiled(rows, row, value):
    rows = rows.clone()
    rows[row, 1] = value
    return rows


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
@pytest.mark.parametrize(
    ("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "inf")]
)
def test_rows_that_are_not_finite(loss, value, word):
    with pytest.raises(NonFiniteRows, match=rf"x must be finite; row 3 is {word}"):
        loss(spoiled(X, 3, value), Y)
    options = [{}] if loss is ALL["info_nce"] else [{"normalize": True}, {"bandwidth": "median"}]
    for one in options:
        with pytest.raises(ValueError, match=rf"y must be finite; row 2 is {word}"):
            loss(X, spoiled(Y, 2, value), **one)


@pytest.mark.parametrize("loss", ALL.values(), ids=ALL)
def test_shapes(loss):
    with pytest.raises(ValueError, match=r"x must have at least one row; found shape \(0, 4\) \(N = 0\)"):
        loss(X[:0], Y[:0])
    with pytest.raises(ValueError, match=r"same D; found shapes \(5, 4\) and \(5, 3\)"):
        loss(X, Y[:5, :3])
    with pytest.raises(ValueError, match=r"x must have shape \(N, D\) with D > 0; found shape \(4,\)"):
        loss(X[0], Y)
    with pytest.raises(ValueError, match=r"x must be floating point; found dtype torch.int64"):
        loss(X.long(), Y)
    with pytest.raises(ValueError, match=r"x must be a torch.Tensor of shape \(N, D\); found list"):
        loss([[1.0]], Y)
    with pytest.raises(ValueError, match="block_size must be None or an integer >= 1; found 0"):
        loss(X, Y, block_size=0)


@pytest.mark.parametrize("loss", SET_LOSSES.values(), ids=SET_LOSSES)
@pytest.mark.parametrize(
    "bandwidth",
    [
        0,
        -1.0,
        float("nan"),
        float("inf"),
        [0.5, -2],
        [],
        "mean",
        torch.tensor(0.0),
        torch.tensor(0.5, requires_grad=True),
    ],
)
def test_bandwidths(loss, bandwidth):
    with pytest.raises(ValueError, match=r"bandwidth must .*found"):
        loss(X, Y, bandwidth=bandwidth)


@pytest.mark.parametrize("loss", SET_LOSSES.values(), ids=SET_LOSSES)
def test_a_single_row_without_its_diagonal(loss):
    with pytest.raises(ValueError, match="without the diagonal needs at least two rows in x; found N = 1"):
        loss(X[:1], Y, diagonal=False)
    with pytest.raises(ValueError, match="without the diagonal needs at least two rows in y; found N = 1"):
        loss(X, Y[:1], diagonal=False)
    # The cross term has no diagonal.
    assert log_mean_kernel(X[:1], Y, bandwidth=0.5, diagonal=False) < 0


@pytest.mark.parametrize("temperature", [0, -0.1, float("nan"), torch.tensor(-1.0), "hot"])
def test_temperatures(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number > 0; found"):
        info_nce(X, X, temperature=temperature)
    with pytest.raises(ValueError, match="temperature must have one element"):
        info_nce(X, X, temperature=torch.ones(2))


def test_pairs_of_different_number():
    with pytest.raises(
        ValueError, match=r"x and y must be pairs, with the same N; found shapes \(5, 4\) and \(6, 4\)"
    ):
        info_nce(X, Y, temperature=0.1)


def test_rows_too_long_for_float64():
    huge = torch.full((3, 2), 1e200, dtype=torch.float64)
    with pytest.raises(ValueError, match="squared lengths within the range"):
        cauchy_schwarz_divergence(huge, -huge, bandwidth=1.0)


def test_tokens():
    x, y = torch.randn(3, 5, 4), torch.randn(3, 6, 4)
    mask = torch.ones(3, 5, dtype=torch.bool)
    mask[1] = False
    with pytest.raises(ValueError, match=r"x_mask must leave at least one token in every row; rows \[1\]"):
        token_cauchy_schwarz_divergence(x, y, mask)
    with pytest.raises(ValueError, match=r"y_mask must be boolean.*\(3, 6\); found .*\(3, 5\)"):
        token_cauchy_schwarz_divergence(x, y, None, mask)
    with pytest.raises(ValueError, match="x_mask must be boolean"):
        token_cauchy_schwarz_divergence(x, y, mask.long())
    with pytest.raises(ValueError, match="x_tokens and y_tokens must have the same D"):
        token_cauchy_schwarz_divergence(x, y[..., :3])
    with pytest.raises(ValueError, match="the same B"):
        token_cauchy_schwarz_divergence(x[:2], y)
    with pytest.raises(ValueError, match=r"x_tokens must be a tensor of shape \(B, tokens, D\)"):
        token_cauchy_schwarz_divergence(x[0], y)
    mask[1, 0] = True
    with pytest.raises(ValueError, match=r"at least two tokens with diagonal=False in every row; rows \[1\]"):
        token_cauchy_schwarz_divergence(x, y, mask, diagonal=False)
    x[2, 0] = float("nan")
    with pytest.raises(NonFiniteRows, match=r"x_tokens must be finite; rows \[2\]"):
        token_cauchy_schwarz_divergence(x, y)


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), torch.tensor(float("nan")), 0.5])
def test_constants_that_are_no_logarithm_of_a_mean_kernel(value):
    with pytest.raises(ValueError, match=r"within_y must be log V\(y, y\), a finite number <= 0; found"):
        cauchy_schwarz_divergence(X, Y, bandwidth=0.5, within_y=value)
    with pytest.raises(ValueError, match=r"within_y must be log V\(y, y\), one number; found shape \(2,\)"):
        cauchy_schwarz_divergence(X, Y, bandwidth=0.5, within_y=torch.zeros(2))


EYE = {"mean_x": torch.zeros(2), "cov_x": torch.eye(2), "mean_y": torch.zeros(2), "cov_y": torch.eye(2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean_y": torch.zeros(3)}, r"expected mean_x \(d,\).*found \(2,\), \(2, 2\), \(3,\)"),
        ({"cov_y": -torch.eye(2)}, "cov_y must be positive definite"),
        ({"bandwidth": 0}, "bandwidth must be a finite number > 0"),
        ({"mean_x": torch.tensor([0, float("nan")])}, "mean_x must be finite; found nan in 1 of"),
        ({"cov_y": torch.full((2, 2), float("inf"))}, "cov_y must be finite; found inf in 4 of"),
    ],
)
def test_gaussians(change, message):
    with pytest.raises(ValueError, match=message):
        gaussian_cauchy_schwarz(**{**EYE, **change})


def test_numbers_of_numpy_are_numbers():
    for kind in (np.float16, np.float32, np.float64, np.array):
        assert squared_mmd(X, Y, bandwidth=kind(0.5)) == squared_mmd(X, Y, bandwidth=0.5)
    assert squared_mmd(X, Y, bandwidth=np.array([0.5, 1.0])) == squared_mmd(X, Y, bandwidth=(0.5, 1.0))
    assert info_nce(X, X, temperature=np.float32(0.5)) == info_nce(X, X, temperature=0.5)
    assert build_objective("cs_aligner", cs_weight=np.float32(0.5), bandwidth=np.float32(0.5)).cs_weight == 0.5
    assert cauchy_schwarz_divergence(X, Y, bandwidth=0.5, block_size=np.int64(3)) > 0
