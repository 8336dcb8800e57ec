"""Gradients of a loss over a whole batch, with the graph of only a few rows in memory at once.

The objective couples all rows, so smaller batches would be another objective. Instead (Gao et al. 2021, "Scaling deep
contrastive learning batch size under memory limited setup"):

1. every micro-batch is embedded without a graph,
2. the loss of all embeddings is differentiated at the embeddings,
3. every micro-batch is embedded again, with a graph and the same random numbers, and its part of that gradient is
   propagated into the weights.

The result is the gradient of one big batch; memory is that of one micro-batch, and of the embeddings.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, dict]
"""Groups of rows (`pairs`, `unpaired_text`, ...), each a dict of tensors or lists with one entry a row."""


def cached_gradients(
    forward: Callable[[Rows], dict[str, Tensor]],
    micro_batches: list[Rows],
    loss: Callable[[dict[str, Tensor]], Any],
    backward: Callable[[Tensor], None] = torch.Tensor.backward,
    reseed: Callable[[int], None] = lambda index: None,
) -> Any:
    """Add to the gradient of every weight what `loss` of the joined micro-batches gives.

    Args:
        forward: Embeds rows; tensors of one name are joined along dimension 0 over the micro-batches. All of them must
            depend on weights: constants go to the loss directly.
        micro_batches: Parts of the batch, in order.
        loss: Objective of the joined embeddings; its result has a scalar `.loss`.
        backward: Backward of the loss, for example with the loss scale of float16.
        reseed: Sets the random state of a micro-batch by its index, so that both passes draw the same dropout masks.

    Returns:
        What `loss` returned.
    """
    pieces: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for index, rows in enumerate(micro_batches):
            reseed(index)
            for name, value in forward(rows).items():
                pieces.setdefault(name, []).append(value)
    joined = {name: torch.cat(parts).requires_grad_() for name, parts in pieces.items()}
    output = loss(joined)
    backward(output.loss)
    gradients = {}
    for name, value in joined.items():
        gradient = torch.zeros_like(value) if value.grad is None else value.grad
        gradients[name] = iter(gradient.split([len(part) for part in pieces[name]]))
    for index, rows in enumerate(micro_batches):
        reseed(index)
        embedded = forward(rows)
        torch.autograd.backward(list(embedded.values()), [next(gradients[name]) for name in embedded])
    return output


def split(batch: Rows, size: int) -> list[Rows]:
    """Cut every group of rows into micro-batches of at most `size` rows."""
    parts = []
    for group, rows in batch.items():
        count = len(next(iter(rows.values())))
        for start in range(0, count, size):
            parts.append({group: {name: value[start : start + size] for name, value in rows.items()}})
    return parts
