"""Products of all pairs of rows, tile by tile, and the dtypes they are computed in."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

# The argument out_dtype of matrix products came with torch 2.8.
_FLOAT32_RESULTS = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


def compute_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """float64 if one of them is, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of many numbers: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def factor_dtype(*inputs: Tensor) -> torch.dtype:
    """The dtype in which these inputs are multiplied: bfloat16 ones on a GPU that does so faster as they are."""
    half = inputs[0].device.type == "cuda" and all(one.dtype == torch.bfloat16 for one in inputs)
    if half and torch.cuda.get_device_capability(inputs[0].device) >= (8, 0):
        return torch.bfloat16
    return compute_dtype(*(one.dtype for one in inputs))


def default_block(device: torch.device) -> int:
    """Tiles that stay in the caches of a processor, or fill a GPU."""
    return 1024 if device.type == "cpu" else 4096


def unit_rows(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rows over their lengths, in float32 or better; a zero row stays zero."""
    x = x.to(dtype or compute_dtype(x.dtype))
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, torch.inf)


def tiles(
    a: Tensor,
    b: Tensor,
    *,
    scale: float,
    block: int,
    biases: tuple[Tensor, Tensor] | None = None,
    own: int | None = None,
    upper: bool = False,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and values of the tiles of `scale a_i . b_j`, `a` (N, D), `b` (M, D), in one buffer.

    `biases`, (N,) and (M,), add one number for each row and one for each column. Where a is a part of b, `own` is the
    index in b of its first row: a pair of a row with itself gets -inf. `upper` leaves out the tiles below.
    """
    dtype = compute_dtype(a.dtype)
    buffer = torch.empty(min(block, len(a)) * min(block, len(b)), dtype=dtype, device=a.device)
    for i in range(0, len(a), block):
        for j in range(i if upper else 0, len(b), block):
            rows, cols = slice(i, min(i + block, len(a))), slice(j, min(j + block, len(b)))
            shape = (rows.stop - i, cols.stop - j)
            tile = buffer[: shape[0] * shape[1]].view(shape)
            if biases is not None:
                torch.add(biases[0][rows, None], biases[1][cols], out=tile)
            if a.dtype == dtype:
                tile.addmm_(a[rows], b[cols].T, beta=0 if biases is None else 1, alpha=scale)
            elif biases is None:
                torch.mul(multiply(a[rows], b[cols].T), scale, out=tile)
            else:
                tile.add_(multiply(a[rows], b[cols].T), alpha=scale)
            if own is not None and -shape[0] < own + i - j < shape[1]:
                tile.diagonal(own + i - j).fill_(-math.inf)
            yield rows, cols, tile


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """The product of matrices, or of batches of them, with float32 sums and results for bfloat16 factors."""
    if a.dtype != torch.bfloat16:
        return a @ b
    if a.device.type == "cuda" and _FLOAT32_RESULTS:
        return (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_product(out: Tensor, weight: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """Add `scale weight rows` to `out`."""
    if rows.dtype == out.dtype:
        out.addmm_(weight, rows, alpha=scale)
    else:
        out.add_(multiply(weight.to(rows.dtype), rows), alpha=scale)
