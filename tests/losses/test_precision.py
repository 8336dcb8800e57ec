"""Half precision, second derivatives, and the sizes of what is kept in memory."""

import pytest
import torch
from reference import two_sets, value_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from csdiff.losses import (
    CSAlignerLoss,
    cauchy_schwarz_divergence,
    contrastive,
    info_nce,
    kernels,
    tiles,
    token_cauchy_schwarz_divergence,
    tokens,
)

LOSSES = {
    "cs": lambda x, y: cauchy_schwarz_divergence(x, y, bandwidth=0.5, normalize=True, block_size=16),
    "info_nce": lambda x, y: info_nce(x, y, temperature=0.07, normalize=True, block_size=16),
    "tokens": lambda x, y: token_cauchy_schwarz_divergence(
        x.reshape(8, 5, 24), y.reshape(8, 5, 24), bandwidth=0.5, normalize=True
    ),
    "cs_aligner": lambda x, y: (
        CSAlignerLoss(source_weight=0.5, regression_weight=1.0)(x, y, source_text=y.detach()).loss
    ),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    x, y = (t.to(dtype) for t in two_sets(40, 40))
    value, gradients = value_and_gradients(LOSSES[name], x, y, dtype=dtype)
    assert value.dtype == torch.float32
    assert all(g.dtype == dtype for g in gradients)
    expected, right = value_and_gradients(LOSSES[name], x.float(), y.float(), dtype=torch.float32)
    # The gradient is rounded to the dtype of the input; bfloat16 products, where there are any, keep three digits.
    torch.testing.assert_close(value, expected, rtol=2e-3, atol=0)
    for one, other in zip(gradients, right, strict=True):
        assert (one.float() - other).norm() <= 0.01 * other.norm()


@pytest.mark.parametrize("name", LOSSES)
def test_a_second_derivative_is_refused_in_plain_words(name):
    x, y = two_sets(40, 40)
    loss = LOSSES[name](x.requires_grad_(), y)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, x, create_graph=True)


@pytest.mark.parametrize("name", ["cs", "info_nce", "tokens"])
def test_bfloat16_inputs_are_multiplied_in_bfloat16_where_a_gpu_does_so(name, monkeypatch):
    factors = []

    def multiply(a, b):
        factors.append((a.dtype, b.dtype))
        return a.float() @ b.float()

    x, y = (t.bfloat16() for t in two_sets(40, 40))
    expected = value_and_gradients(LOSSES[name], x.float(), y.float(), dtype=torch.float32)
    monkeypatch.setattr(tiles, "multiply", multiply)
    monkeypatch.setattr(tokens, "multiply", multiply)
    for module in (kernels, contrastive, tokens):
        monkeypatch.setattr(module, "factor_dtype", lambda *inputs: inputs[0].dtype)
    value, gradients = value_and_gradients(LOSSES[name], x, y, dtype=torch.bfloat16)
    assert set(factors) == {(torch.bfloat16, torch.bfloat16)}
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(float(expected[0]), rel=2e-3)
    for one, other in zip(gradients, expected[1], strict=True):
        assert (one.float() - other).norm() <= 0.02 * other.norm()


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


@pytest.mark.parametrize("name", ["cs", "info_nce"])
def test_no_matrix_of_all_pairs_is_made(name):
    x, y = (rows.requires_grad_() for rows in two_sets(900, 900, 8))
    losses = {
        "cs": lambda: cauchy_schwarz_divergence(x, y, bandwidth=0.5, block_size=50),
        "info_nce": lambda: info_nce(x, y, temperature=1.0, block_size=50),
    }
    with Sizes() as sizes:
        losses[name]().backward()
    assert sizes.largest <= 900 * 8
