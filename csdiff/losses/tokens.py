"""The token-level Cauchy-Schwarz term: each pair's tokens are two sets of points."""

import math

import torch
from torch import Tensor

from csdiff.losses.arguments import Bandwidth, NonFiniteRows, check_block_size, check_same_width, resolve_bandwidth
from csdiff.losses.autograd import apart_from_autocast
from csdiff.losses.process_group import gather_rows, global_sum, raise_together
from csdiff.losses.tiles import compute_dtype, factor_dtype, multiply, unit_rows

# Kernel values evaluated at once when no block size is given.
KERNELS_AT_ONCE = 2**18
# `(b, n, D)` and their mask `(b, n)`.
Tokens = tuple[Tensor, Tensor]


def token_cauchy_schwarz_divergence(
    x_tokens: Tensor,
    y_tokens: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    *,
    bandwidth: Bandwidth = 0.5,
    diagonal: bool = True,
    normalize: bool = False,
    block_size: int | None = None,
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    r"""Mean over pairs of the Cauchy-Schwarz divergence between the tokens of x and those of y.

    `mean_b D(x_tokens[b, x_mask[b]], y_tokens[b, y_mask[b]])`, `D` as in `cauchy_schwarz_divergence`

    Pairs are evaluated in chunks, value and gradient at once, so that memory beyond the gradient does not grow with B.
    Masked tokens have no influence, whatever they hold, and no gradient.

    Args:
        x_tokens: `(B, L, D)`.
        y_tokens: `(B, V, D)`; L need not be V.
        x_mask: `(B, L)` boolean, True where there is a token; all by default.
        y_mask: `(B, V)` boolean.
        bandwidth: as for `cauchy_schwarz_divergence`; one for all pairs. Rules look at all tokens, pooled.
        diagonal: whether the within-set means include a token's pair with itself.
        normalize: divide each token by its length first; a zero token stays zero.
        block_size: pairs b evaluated at once; None takes as many as make 2^18 kernel values.
        group: a process group whose processes hold shares of the pairs, of any size. Every process returns the mean
            over all pairs; the gradient is `W` times that of the local pairs, see `cauchy_schwarz_divergence`. Each
            process sends a few numbers (a rule for the bandwidth sends the tokens too).

    Returns:
        A scalar, float64 if an input is, else float32, with the precision of `cauchy_schwarz_divergence`.

    Raises:
        ValueError: shapes that do not fit, a mask that is not boolean, a row whose mask is empty (named), tokens that
            are not finite, a bandwidth that is not > 0, `diagonal=False` with a single token.

    Source:
        Yin et al., "CS-Aligner", arXiv 2502.17028, section on token-level alignment.
    """
    error = None
    try:
        x_mask = _check("x_tokens", x_tokens, "x_mask", x_mask, diagonal)
        y_mask = _check("y_tokens", y_tokens, "y_mask", y_mask, diagonal)
        check_same_width(x_tokens=x_tokens, y_tokens=y_tokens)
        if len(x_tokens) != len(y_tokens):
            shapes = f"{tuple(x_tokens.shape)} and {tuple(y_tokens.shape)}"
            raise ValueError(f"x_tokens and y_tokens must be pairs, with the same B; found shapes {shapes}")
        check_block_size(block_size)
    except ValueError as found:
        error = found
    raise_together(error, group, x_tokens.device if isinstance(x_tokens, Tensor) else torch.device("cpu"))
    dtype = compute_dtype(x_tokens.dtype, y_tokens.dtype)
    prepare = unit_rows if normalize else Tensor.to
    pooled = []
    if isinstance(bandwidth, str):
        pooled = [prepare(t.detach()[mask], dtype) for t, mask in ((x_tokens, x_mask), (y_tokens, y_mask))]
    widths = resolve_bandwidth(bandwidth, *(gather_rows("tokens", rows, group)[0] for rows in pooled))
    factor = factor_dtype(x_tokens, y_tokens)

    def divergences(*chunk: Tensor) -> Tensor:
        sides = []
        for tokens, mask in zip(chunk[:2], chunk[2:], strict=True):
            # What masked tokens hold may be anything; zeros have no gradient.
            sides.append((prepare(tokens.masked_fill(~mask[..., None], 0), dtype), mask))
        centre = sum(rows.detach().sum(1) / mask.sum(1, keepdim=True) for rows, mask in sides)[:, None] / 2
        # Rounded once, so that squared norms and products are those of the same points.
        x, y = (((rows - centre).to(factor).to(dtype), mask) for rows, mask in sides)
        xx, yy, xy = (_log_mean_kernels(*pair, widths, diagonal, factor) for pair in ((x, x), (y, y), (x, y)))
        found = xx + yy - 2 * xy
        return (found.clamp_min(0) if diagonal else found).sum()

    at_once = block_size or max(1, KERNELS_AT_ONCE // max(x_tokens.shape[1], y_tokens.shape[1]) ** 2)
    total = torch.zeros((), dtype=dtype, device=x_tokens.device)
    for chunk in zip(*(t.split(at_once) for t in (x_tokens, y_tokens, x_mask, y_mask)), strict=True):
        total = total + apart_from_autocast(divergences, *chunk)
    return global_sum(total, group) / global_sum(torch.full_like(total, len(x_tokens)), group).detach()


def _log_mean_kernels(
    left: Tokens, right: Tokens, widths: tuple[float, ...], diagonal: bool, factor: torch.dtype
) -> Tensor:
    """`log V` of each pair of token sets, `(b,)`; within one set where left is right."""
    (x, x_mask), (y, y_mask) = left, right
    squares = x.square().sum(dim=2)[:, :, None] + y.square().sum(dim=2)[:, None, :]
    distance = squares - 2 * (x @ y.mT if factor == x.dtype else _Product.apply(x, y, factor))
    pair = x_mask[:, :, None] & y_mask[:, None, :]
    if left is right:
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        distance = distance.masked_fill(itself, 0)
        pair = pair if diagonal else pair & ~itself
    exponents = [(distance / (-2 * width**2)).masked_fill(~pair, -math.inf).flatten(1) for width in widths]
    counts = pair.flatten(1).sum(dim=1) * len(widths)
    return torch.cat(exponents, dim=1).logsumexp(dim=1) - counts.to(x.dtype).log()


class _Product(torch.autograd.Function):
    """`x y^T` of batches in the dtype of their factors, with sums and gradients in float32."""

    @staticmethod
    def forward(ctx, x, y, factor):
        x, y = x.to(factor), y.to(factor)
        ctx.save_for_backward(x, y)
        return multiply(x, y.mT)

    @staticmethod
    def backward(ctx, grad):
        x, y = ctx.saved_tensors
        grad = grad.to(x.dtype)
        return multiply(grad, y), multiply(grad.mT, x), None


def _check(name: str, tokens: Tensor, mask_name: str, mask: Tensor | None, diagonal: bool) -> Tensor:
    """The mask of tokens that are fit for use, or a ValueError."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.numel() == 0:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be a tensor of shape (B, tokens, D), none of them 0; found {found}")
    if not tokens.is_floating_point():
        raise ValueError(f"{name} must be floating point; found dtype {tokens.dtype}")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:2]:
        raise ValueError(
            f"{mask_name} must be boolean, True for a token, of shape {tuple(tokens.shape[:2])}; found dtype "
            f"{mask.dtype} and shape {tuple(mask.shape)}"
        )
    least = 1 if diagonal else 2
    short = (mask.sum(dim=1) < least).nonzero().flatten().tolist()
    if short:
        rule = "at least one token" if diagonal else "at least two tokens with diagonal=False"
        raise ValueError(f"{mask_name} must leave {rule} in every row; rows {short[:8]} have {least - 1} or none")
    bad = (~torch.isfinite(tokens.detach()).all(dim=2) & mask).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteRows(f"{name} must be finite; rows {bad[:8]} hold NaN or infinite tokens")
    return mask
