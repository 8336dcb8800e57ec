"""The token-level Cauchy-Schwarz term: each pair's tokens are two sets of points."""

import math

import torch
from torch import Tensor

from .arguments import NonFiniteRows, check_block_size, check_same_width, without_autocast
from .bandwidth import Bandwidth, as_widths, resolve_bandwidth
from .kernel_sums import NEAR
from .kernel_terms import FLOAT32_REACH, NEARLY_EQUAL, NEARLY_PARALLEL, SMALL_EXPONENT, direct_differences
from .process_group import gather_numbers, gather_rows, raise_together
from .row_set import wide_dtype

# Kernel values evaluated at once when no block size is given.
KERNELS_AT_ONCE = 2**18


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

    Many pairs are evaluated at once; value and gradient come from one pass, and memory beyond the gradient does not
    grow with B. Masked tokens have no influence, whatever they hold, and no gradient. A second derivative works
    without `group`.

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
            process sends two numbers (a rule for the bandwidth sends the tokens too).

    Returns:
        A scalar, float64 if an input is, else float32.

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
        check_same_width(x_tokens, y_tokens, ("x_tokens", "y_tokens"))
        if len(x_tokens) != len(y_tokens):
            shapes = f"{tuple(x_tokens.shape)} and {tuple(y_tokens.shape)}"
            raise ValueError(f"x_tokens and y_tokens must be pairs, with the same B; found shapes {shapes}")
        check_block_size(block_size)
    except ValueError as found:
        error = found
    raise_together(error, group, x_tokens.device if isinstance(x_tokens, Tensor) else torch.device("cpu"))
    with without_autocast(x_tokens.device):
        if isinstance(bandwidth, str):
            sets = ((x_tokens, x_mask), (y_tokens, y_mask))
            pooled = [_unit(t.detach()[m], normalize) for t, m in sets]
            widths = resolve_bandwidth(bandwidth, *(gather_rows("tokens", rows, group)[0] for rows in pooled))
        else:
            widths = as_widths(bandwidth)
        options = (widths, diagonal, normalize, block_size, group, torch.is_grad_enabled())
        value = _TokenDivergence.apply(x_tokens, y_tokens, x_mask, y_mask, options)
    return value.to(_wider(x_tokens.dtype, y_tokens.dtype))


def _check(name: str, tokens: Tensor, mask_name: str, mask: Tensor | None, diagonal: bool) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.numel() == 0:
        found = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{name} must be a tensor of shape (B, tokens, D), none of them 0; found {found}")
    if not tokens.is_floating_point():
        raise ValueError(f"{name} must be floating point; found dtype {tokens.dtype}")
    if mask is None:
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    if mask.dtype != torch.bool:
        raise ValueError(f"{mask_name} must be boolean, True for a token; found dtype {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"{mask_name} must have shape {tuple(tokens.shape[:2])}; found shape {tuple(mask.shape)}")
    least = 1 if diagonal else 2
    short = (mask.sum(dim=1) < least).nonzero().flatten().tolist()
    if short:
        rule = "at least one token" if diagonal else "at least two tokens with diagonal=False"
        raise ValueError(f"{mask_name} must leave {rule} in every row; rows {short[:8]} have {least - 1} or none")
    # The sum is finite when all tokens are; what masked ones hold is looked at only otherwise.
    bad = []
    if not bool(tokens.detach().sum(dtype=_wider(tokens.dtype)).isfinite()):
        bad = (~torch.isfinite(tokens).all(dim=2) & mask).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise NonFiniteRows(f"{name} must be finite; rows {bad[:8]} hold NaN or infinite tokens")
    return mask


def _wider(*dtypes: torch.dtype) -> torch.dtype:
    wider = torch.float32
    for dtype in dtypes:
        wider = torch.promote_types(wider, dtype)
    return wider


def _unit(tokens: Tensor, normalize: bool) -> Tensor:
    tokens = tokens.to(_wider(tokens.dtype))
    if not normalize:
        return tokens
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    return tokens / torch.where(norm > 0, norm, 1)


class _TokenDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, x_mask, y_mask, options):
        widths, diagonal, normalize, block_size, group, with_gradient = options
        needs = tuple(with_gradient and needed for needed in ctx.needs_input_grad[:2])
        block = block_size or max(1, KERNELS_AT_ONCE // max(x.shape[1], y.shape[1]) ** 2)
        sides = ((x, x_mask, needs[0]), (y, y_mask, needs[1]))
        grads = [torch.empty_like(t, dtype=_wider(t.dtype)) if needed else None for t, _, needed in sides]
        values = []
        for start in range(0, len(x), block):
            part = slice(start, start + block)
            chunk = _Chunk([(t[part], mask[part], needed) for t, mask, needed in sides], widths, diagonal, normalize)
            values.append(chunk.divergence)
            for whole, found in zip(grads, chunk.gradients, strict=True):
                if whole is not None:
                    whole[part] = found
        total = torch.stack([torch.cat(values).sum(), torch.tensor(len(x), dtype=values[0].dtype, device=x.device)])
        shares = gather_numbers(total, group)
        value, count = shares.sum(dim=0)
        for grad in grads:
            if grad is not None:
                grad.mul_(len(shares) / float(count))
        ctx.options = options
        ctx.save_for_backward(x, y, x_mask, y_mask, *grads)
        return value / count

    @staticmethod
    def backward(ctx, grad):
        x, y, x_mask, y_mask, *grads = ctx.saved_tensors
        if torch.is_grad_enabled():
            return *_differentiable_backward(ctx, x, y, x_mask, y_mask, grad), None, None, None
        found = (
            None if g is None else (g * grad.to(g.dtype)).to(like.dtype) for g, like in zip(grads, (x, y), strict=True)
        )
        return *found, None, None, None


def _differentiable_backward(ctx, x, y, x_mask, y_mask, grad) -> tuple[Tensor | None, Tensor | None]:
    """The gradient as a function that can be differentiated again (`create_graph=True`), by the plain formula."""
    widths, diagonal, normalize, _, group, _ = ctx.options
    if group is not None:
        raise RuntimeError("a second derivative with group= is not available; take it in one process, with group=None")

    def log_mean(a, b, a_mask, b_mask, own):
        square = a.square().sum(2)[:, :, None] + b.square().sum(2)[:, None, :] - 2 * a @ b.mT
        pair = a_mask[:, :, None] & b_mask[:, None, :]
        if own:
            itself = torch.eye(a.shape[1], dtype=torch.bool, device=a.device)
            square = square.masked_fill(itself, 0)
            pair = pair if diagonal else pair & ~itself
        exponents = [(-square / (2 * w**2)).masked_fill(~pair, -math.inf).flatten(1) for w in widths]
        return torch.cat(exponents, dim=1).logsumexp(dim=1) - (pair.flatten(1).sum(dim=1) * len(widths)).log()

    with torch.enable_grad():
        a, b = (_unit(t.double().masked_fill(~m[..., None], 0), normalize) for t, m in ((x, x_mask), (y, y_mask)))
        within = log_mean(a, a, x_mask, x_mask, True) + log_mean(b, b, y_mask, y_mask, True)
        value = (within - 2 * log_mean(a, b, x_mask, y_mask, False)).mean()
        inputs = [t for t, needed in zip((x, y), ctx.needs_input_grad, strict=False) if needed]
        found = list(torch.autograd.grad(value * grad, inputs, create_graph=True))
    return tuple(found.pop(0) if needed else None for needed in ctx.needs_input_grad[:2])


def _cleared(values: Tensor, mask: Tensor | None) -> Tensor:
    """`values` with zeros where the mask is False."""
    if mask is None:
        return values
    return values.masked_fill(~mask.reshape(mask.shape + (1,) * (values.dim() - 2)), 0)


class _Chunk:
    """The divergences of some pairs, `(b,)`, and their gradients by the tokens."""

    def __init__(self, sides, widths, diagonal: bool, normalize: bool):
        self.widths, self.diagonal, self.normalize = widths, diagonal, normalize
        wide = wide_dtype(sides[0][0].device)
        given = _wider(*(tokens.dtype for tokens, _, _ in sides))
        self._evaluate(sides, given)
        # Near tokens ask for float64 here, too.
        doubtful = not self.small and (self.near or float(self.divergence.min()) < NEARLY_EQUAL)
        if given != wide and (doubtful or self.reach > FLOAT32_REACH or self.nearly_parallel):
            self._evaluate(sides, wide, given)

    def _evaluate(self, sides, dtype: torch.dtype, given: torch.dtype | None = None) -> None:
        masks = [None if bool(mask.all()) else mask for _, mask, _ in sides]
        tokens = [_cleared(t.to(dtype), mask) for (t, _, _), mask in zip(sides, masks, strict=True)]
        units = [_unit(t, self.normalize) for t in tokens]
        counts = [mask.sum(dim=1)[:, None, None].to(dtype) for _, mask, _ in sides]
        # Distances do not change with the origin; between the two sets of a pair it costs the fewest digits.
        centre = sum(unit.sum(dim=1, keepdim=True) / n for unit, n in zip(units, counts, strict=True)) / 2
        points = [unit - centre for unit in units]
        squares = [torch.linalg.vector_norm(p, dim=2).square_() for p in points]
        squares = [_cleared(square, mask) for square, mask in zip(squares, masks, strict=True)]
        scales = [1 / (2 * width**2) for width in self.widths]
        self.base = min(scales)
        self.ratios = [scale / self.base for scale in scales]
        farthest = torch.maximum(*(square.amax(dim=1) for square in squares))
        self.nearly_parallel = self.normalize and float(farthest.min()) < NEARLY_PARALLEL
        self.reach = max(scales) * float(farthest.max())
        self.direct = direct_differences(self.reach, dtype, given or dtype)
        self.small, self.near = 4 * self.reach < SMALL_EXPONENT, False

        grads = [torch.zeros_like(p) if needed else None for p, (_, _, needed) in zip(points, sides, strict=True)]
        row_weights = [0, 0]
        self.divergence = 0
        for i, j, factor in ((0, 0, 1), (1, 1, 1), (0, 1, -2)):
            needed = grads[i] is not None or grads[j] is not None
            value, weight = self._term(points, squares, masks, i, j, needed)
            self.divergence = self.divergence + factor * value
            # Each token of a set stands on both sides of its pairs.
            for side, other in ((i, j), (j, i)) if i != j else ((i, i),):
                if grads[side] is not None:
                    own = weight if side == i else weight.mT
                    factors = {"alpha": 2 * factor * self.base * (2 if i == j else 1)}
                    grads[side].baddbmm_(own, points[other], **factors)
                    row_weights[side] = row_weights[side] + own.sum(dim=2, keepdim=True) * factors["alpha"]
        if self.diagonal:
            self.divergence = self.divergence.clamp_min(0)
        self.gradients = []
        for side, grad in enumerate(grads):
            if grad is not None:
                grad = self._lead_back(
                    grad.addcmul_(row_weights[side], points[side], value=-1), units[side], tokens[side]
                )
                grad = _cleared(grad, masks[side])
            self.gradients.append(grad)

    def _term(self, points, squares, masks, i: int, j: int, with_weight: bool) -> tuple[Tensor, Tensor | None]:
        """`log V` of sides i and j `(b,)` and the kernels over their sum `(b, n_i, n_j)`, for the gradient."""
        if self.direct:
            exponent = torch.cdist(points[i], points[j], compute_mode="donot_use_mm_for_euclid_dist")
            exponent = exponent.square_().mul_(-self.base)
        else:
            factors = {"beta": -self.base, "alpha": 2 * self.base}
            exponent = torch.baddbmm(squares[j][:, None, :], points[i], points[j].mT, **factors)
            exponent.sub_(self.base * squares[i][:, :, None]).clamp_(max=0)
        sizes = []
        for side, view in ((i, (slice(None), slice(None), None)), (j, (slice(None), None, slice(None)))):
            if masks[side] is not None:
                exponent.masked_fill_(~masks[side][view], -math.inf)
            whole = squares[side].new_full((len(exponent),), squares[side].shape[1])
            sizes.append((whole if masks[side] is None else masks[side].sum(dim=1)).to(wide_dtype(exponent.device)))
        count, ones = sizes[0] * sizes[1], torch.zeros_like(sizes[0])
        if i == j:
            # A token's pair with itself has kernel 1 and no gradient.
            exponent.diagonal(dim1=1, dim2=2).fill_(-math.inf)
            ones, count = (sizes[0], count) if self.diagonal else (ones, count - sizes[0])
        shift = torch.zeros_like(ones, dtype=exponent.dtype)
        if not self.small:
            shift = exponent.amax(dim=(1, 2))
            self.near |= float(shift.max()) > -NEAR * self.reach / max(self.ratios)
            shift = torch.where(shift.isfinite(), shift, 0)

        value, weight = 0, 0
        for ratio in self.ratios:
            scaled = exponent if len(self.ratios) == 1 else exponent * ratio
            if self.small:
                # Beside kernels close to 1 it is their distance from 1 that counts.
                counted = torch.expm1(scaled).masked_fill_(scaled.isneginf(), 0)
                term = torch.exp(scaled) if with_weight else counted
            else:
                counted = term = scaled.sub_(shift[:, None, None]).exp_()
            value = value + counted.sum(dim=2).sum(dim=1, dtype=count.dtype)
            if with_weight:
                weight = term if len(self.ratios) == 1 else weight + term * ratio
        value = value / len(self.ratios)
        if self.small:
            log_mean, total = torch.log1p(value / count), value + count
        else:
            log_mean = torch.logaddexp(value.log() + shift, ones.log()) - count.log()
            # Not from the logarithm, whose digits are spent on a large shift.
            total = value + torch.where(ones > 0, ones * torch.exp(-shift.to(ones.dtype)), 0)
        if not with_weight:
            return log_mean, None
        scale = 1 / (total * len(self.ratios))
        return log_mean, weight.mul_(scale.to(weight.dtype)[:, None, None])

    def _lead_back(self, grad: Tensor, unit: Tensor, tokens: Tensor) -> Tensor:
        if not self.normalize:
            return grad
        norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
        return (grad - unit * (grad * unit).sum(dim=-1, keepdim=True)) / torch.where(norm > 0, norm, math.inf)
