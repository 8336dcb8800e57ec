"""Rows that live on several processes: gathering them, and what each process owes the gradient.

Every process of a group evaluates the same global loss on its share of rows. DDP averages gradients over the `W`
processes, so the gradient handed back for the local rows is `W` times the derivative of the global loss by them: its
average is then the gradient one process would find for the whole batch. Gathering sends each process's rows, padded to
the longest share, once to every other process; no gradient is sent.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Share(NamedTuple):
    """Where the local rows stand among those of all `world` processes: rows `start` to `stop` of `total`."""

    start: int
    stop: int
    total: int
    world: int


def gather_rows(name: str, local: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Share]:
    """The rows of all processes in rank order, without gradient, and the local share; shares may differ in length.

    Raises:
        ValueError: on every process, when the processes disagree on the width or the dtype of the rows.
    """
    local = local.detach()
    if group is None:
        return local, Share(0, len(local), len(local), 1)
    world, rank = dist.get_world_size(group), dist.get_rank(group)
    # The length travels with all that has to agree, so that every process raises together.
    tail = [*local.shape[1:], _DTYPES.index(local.dtype) if local.dtype in _DTYPES else -1]
    header = torch.tensor([len(local), *tail], dtype=torch.int64, device=local.device)
    headers = gather_numbers(header, group).tolist()
    if any(other[1:] != headers[0][1:] for other in headers):
        found = [(*other[:-1], str(_DTYPES[other[-1]])) for other in headers]
        raise ValueError(f"{name} must have the same D and dtype on every process; found (N, ..., D, dtype) {found}")
    counts = [other[0] for other in headers]
    padded = local.new_zeros((max(counts), *local.shape[1:]))
    padded[: len(local)] = local
    parts = _all(padded, group)
    start = sum(counts[:rank])
    rows = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])
    return rows, Share(start, start + counts[rank], sum(counts), world)


_DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool]


def gather_numbers(values: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """`values` of every process stacked along a new first dimension."""
    return values[None] if group is None else torch.stack(_all(values, group))


def _all(values: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, values.contiguous(), group=group)
    return parts


def raise_together(error: ValueError | None, group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Raise `error` here, and on the processes that have none a ValueError too: nobody waits for one that has left."""
    found = torch.tensor(0 if error is None else 1, device=device)
    failed = gather_numbers(found, group).nonzero().flatten().tolist()
    if error is not None:
        raise error
    if failed:
        raise ValueError(f"the processes {failed} of the group found bad input; see their messages")


def global_rows(name: str, local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows of all processes, differentiable: for losses that every process evaluates whole.

    The gradient that reaches the gathered rows is the same on every process; each keeps its own part, times `W`.
    """
    if group is None:
        return local
    rows, share = gather_rows(name, local, group)
    own = rows[share.start : share.stop] + share.world * (local - local.detach())
    return torch.cat([rows[: share.start], own, rows[share.stop :]])


def global_sum(local: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over processes of a local tensor, differentiable, with `W` times its gradient: for sums over rows."""
    if group is None:
        return local
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    return total + dist.get_world_size(group) * (local - local.detach())
