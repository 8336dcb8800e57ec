"""A set of rows on its way into a loss: gathered, normalised, centred, and its gradient led back."""

import torch
from torch import Tensor

from .arguments import check_finite
from .process_group import gather_rows

BLOCK = 4096


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype for sums of many numbers: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def squared_norms(rows: Tensor) -> Tensor:
    """Squared row norms `(N,)`, summed in the wide dtype."""
    wide = wide_dtype(rows.device)
    if rows.dtype in (torch.float32, torch.float64):
        squares = torch.cat([(block * block).sum(dim=1, dtype=wide) for block in rows.split(BLOCK)])
        if bool(((squares > 1e-30) & (squares < 1e30)).all()):
            return squares
    # Squares may have left the range of the rows' dtype.
    norms = [torch.linalg.vector_norm(block, dim=1, dtype=wide) for block in rows.split(BLOCK)]
    return torch.cat(norms).square_()


class RowSet:
    """All rows of one argument, which of them are local, and the way from a gradient by them back to the argument."""

    def __init__(self, name: str, local: Tensor, *, normalize: bool, group: torch.distributed.ProcessGroup | None):
        self.raw, self.share = gather_rows(name, local, group)
        if self.share.total == 0:
            raise ValueError(f"{name} must have at least one row; found shape {tuple(local.shape)} (N = 0)")
        self.name, self.dtype = name, local.dtype
        self.inverse_norm = None
        if normalize:
            norm = squared_norms(self.raw).sqrt_()
            if not bool(norm.isfinite().all()):
                self.check()
            self.inverse_norm = torch.where(norm > 0, 1 / norm, 0)

    def rows(self, dtype: torch.dtype) -> Tensor:
        """All rows, of unit length if that is wanted; the argument itself where nothing is to be done."""
        if self.inverse_norm is None:
            return self.raw.to(dtype)
        rows = torch.empty(self.raw.shape, dtype=dtype, device=self.raw.device)
        for start in range(0, len(rows), BLOCK):
            part = slice(start, start + BLOCK)
            # Scaled in the wide dtype where that is wanted, or the row's length is out of the range of a narrow one.
            inverse = self.inverse_norm[part, None]
            narrow = torch.promote_types(self.dtype, torch.float32)
            in_range = bool(((inverse > 1e-30) & (inverse < 1e30)).all())
            fits = in_range and dtype == narrow
            torch.mul(self.raw[part], inverse.to(narrow) if fits else inverse, out=rows[part])
        return rows

    def check(self) -> None:
        """Raise ValueError unless all rows, and their squared lengths, are finite."""
        check_finite(self.name, self.raw)
        if not bool(squared_norms(self.raw).isfinite().all()):
            raise ValueError(f"{self.name} must have rows whose squared length is a finite float64; found longer ones")

    def local(self, values: Tensor) -> Tensor:
        """The local part of something that has an entry for each row."""
        return values[self.share.start : self.share.stop]

    def lead_back(self, grad: Tensor, unit: Tensor, part: slice) -> None:
        """Turn a gradient by local unit rows into one by the rows as given, in place; `part` of the local rows."""
        if self.inverse_norm is not None:
            inverse = self.local(self.inverse_norm)[part, None].to(grad.dtype)
            grad.sub_(unit * (grad * unit).sum(dim=1, keepdim=True)).mul_(inverse)
