"""What is trained for: the objective of a configuration, checked before any data is opened."""

import torch.distributed as dist
from torch import Tensor, nn

from csdiff.adapters.registry import ADAPTERS
from csdiff.errors import CSDiffError
from csdiff.losses.objectives import OBJECTIVES, ObjectiveOutput, build_objective, objective_options
from csdiff.losses.process_group import global_sum
from csdiff.training.config import TrainConfig
from csdiff.training.data import wants_tokens

DIFFUSION = "diffusion"


def check_names(config: TrainConfig) -> None:
    """Refuse unknown adapters and objectives, and those that do not go together, before any data is opened."""
    objectives = {*OBJECTIVES, DIFFUSION}
    for option, known in (("adapter", ADAPTERS), ("image_adapter", ADAPTERS), ("objective", objectives)):
        name = getattr(config, option)
        if name is not None and name not in known:
            raise CSDiffError(f"--{option} {name}: expected one of {', '.join(sorted(known))}.")
    if ADAPTERS[config.adapter].one_shot is (config.objective == DIFFUSION):
        raise CSDiffError(
            f"--adapter {config.adapter} and --objective {config.objective} do not go together: {DIFFUSION} goes with "
            f"{DIFFUSION} only."
        )
    if config.objective == DIFFUSION and config.objective_options:
        raise CSDiffError(f"--objective_options: {DIFFUSION} takes none, found {sorted(config.objective_options)}.")
    if config.batch_size < 2 and config.objective not in ("mse", DIFFUSION):
        raise CSDiffError(f"--batch_size {config.batch_size}: {config.objective} compares pairs, expected at least 2.")
    able = sorted(name for name, objective in OBJECTIVES.items() if objective.uses_unpaired)
    for name in ("unpaired_text", "unpaired_image"):
        if getattr(config.data, name) is not None and config.objective not in able:
            raise CSDiffError(
                f"--data.{name}: {config.objective} has no term for unpaired data; use {', '.join(able)}, or leave it "
                "out."
            )


def all_objective_options(config: TrainConfig) -> dict:
    """Every option of the objective with the value that the run trains with: as given, else its default."""
    if config.objective == DIFFUSION:
        return {}
    options = {**objective_options(config.objective), **config.objective_options}
    # Without tokens the term is left out, whatever its default weight.
    return options | ({"token_weight": 0.0} if "token_weight" in options and not wants_tokens(config) else {})


def make_objective(config: TrainConfig, group: dist.ProcessGroup | None) -> nn.Module:
    """The objective, for the process group that shares the batch; CSDiffError for options that it does not take."""
    if config.objective == DIFFUSION:
        return DenoisingObjective(group)
    try:
        return build_objective(config.objective, **all_objective_options(config), group=group)
    except (ValueError, TypeError) as error:
        raise CSDiffError(f"--objective_options: {error}") from error


class DenoisingObjective(nn.Module):
    """The objective of the diffusion prior, the slow baseline: mean of `(f(x_s, s, text) - x0)^2` over the batch."""

    uses_unpaired = uses_tokens = uses_source_text = False

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.group = group

    def forward(self, error: Tensor) -> ObjectiveOutput:
        """Errors (B,) of the local rows, which the adapter computes, to the mean over all processes."""
        count = global_sum(error.new_tensor(float(len(error))), self.group)
        loss = global_sum(error.sum(), self.group) / count
        return ObjectiveOutput(loss, {"denoising": loss.detach()})
