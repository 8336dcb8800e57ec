"""The objectives by name."""

from dataclasses import fields

import torch

from csdiff.losses.cs_aligner import CSAlignerLoss
from csdiff.losses.objective import Objective
from csdiff.losses.presets import (
    CauchySchwarzLoss,
    CoralLoss,
    EclipseLoss,
    InfoNCELoss,
    KernelKLLoss,
    MMDLoss,
    ModGapLoss,
    ProjectionLoss,
    SinkhornLoss,
    UniformAlignLoss,
)

OBJECTIVES: dict[str, type[Objective]] = {
    "cs_aligner": CSAlignerLoss,
    "cs": CauchySchwarzLoss,
    "info_nce": InfoNCELoss,
    "mse": ProjectionLoss,
    "eclipse": EclipseLoss,
    "mmd": MMDLoss,
    "sinkhorn": SinkhornLoss,
    "coral": CoralLoss,
    "kl": KernelKLLoss,
    "uniform_align": UniformAlignLoss,
    "modgap": ModGapLoss,
}


def objective_options(name: str) -> dict[str, object]:
    """The options of the objective `name` with their defaults; all of them are fit for JSON."""
    return {option.name: option.default for option in fields(objective_class(name)) if option.name != "group"}


def objective_class(name: str) -> type[Objective]:
    """The class of the objective `name`, or ValueError naming the known ones."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; the objectives are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]


def build_objective(name: str, *, group: torch.distributed.ProcessGroup | None = None, **options: object) -> Objective:
    """The objective `name` with the given options; the others keep their defaults.

    Raises:
        ValueError: an unknown name or option, with the known ones; a value the objective refuses.
    """
    known = objective_options(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown options {unknown} of the objective {name!r}; its options are {', '.join(known)}")
    return objective_class(name)(group=group, **options)
