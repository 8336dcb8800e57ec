"""The objective of the diffusion prior, the slow baseline: the denoising error that the adapter computes itself."""

import torch.distributed as dist
from torch import Tensor, nn

from csdiff.losses.objective import ObjectiveOutput
from csdiff.losses.process_group import global_sum

DIFFUSION = "diffusion"


class DenoisingObjective(nn.Module):
    """Mean of `(f(x_s, s, text) - x0)^2` over the global batch, from errors by row.

    Args:
        group: Process group that shares the batch, or None.
    """

    uses_unpaired = uses_tokens = uses_source_text = False

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.group = group

    def forward(self, error: Tensor) -> ObjectiveOutput:
        """Errors (B,) of the local rows to the global mean; DDP's averaging makes its gradient the global one."""
        count = global_sum(error.new_tensor(float(len(error))), self.group)
        loss = global_sum(error.sum(), self.group) / count
        return ObjectiveOutput(loss, {"denoising": loss.detach()})
