"""Matrix products with float32 results, from float32 factors or, where hardware is faster with them, bfloat16."""

from contextlib import contextmanager

import torch
from torch import Tensor


def bfloat16_is_faster(device: torch.device) -> bool:
    """Whether the device has matrix instructions for bfloat16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


class Products:
    """The two products of a tile. With `bfloat16`, factors are rounded to it and sums are kept in float32.

    On a processor the rounded factors stay in float32 storage and the multiplication itself runs in bfloat16, because
    its bfloat16 products would round the result too; on a GPU the product takes bfloat16 and returns float32.
    """

    def __init__(self, device: torch.device, *, bfloat16: bool = False):
        self.bfloat16 = bfloat16
        self.storage = torch.bfloat16 if bfloat16 and device.type == "cuda" else None
        self._switch = bfloat16 and device.type == "cpu" and bfloat16_is_faster(device)

    def factor(self, rows: Tensor) -> Tensor:
        """`rows` as the products want them, rounded to bfloat16 if they multiply that."""
        if not self.bfloat16:
            return rows
        rounded = rows.to(torch.bfloat16)
        return rounded if self.storage else rounded.to(rows.dtype)

    def cross(self, a: Tensor, b: Tensor, column: Tensor, scale: float, *, out: Tensor) -> None:
        """`out = scale * a @ b.T + column`, `column` being added to every row."""
        if self.storage:
            torch.mm(a, b.T, out_dtype=torch.float32, out=out)
            out.mul_(scale).add_(column)
        else:
            torch.addmm(column, a, b.T, alpha=scale, out=out)

    def mix(self, total: Tensor, weight: Tensor, rows: Tensor) -> None:
        """`total += weight @ rows`."""
        if self.storage:
            total.add_(torch.mm(weight.to(self.storage), rows, out_dtype=torch.float32))
        else:
            total.addmm_(weight, rows)

    @contextmanager
    def active(self):
        """Run the body with the processor's float32 products done in bfloat16, if these products are."""
        if not self._switch:
            yield
            return
        matmul = torch.backends.mkldnn.matmul
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before
