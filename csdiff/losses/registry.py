"""The objectives by name."""

import inspect

import torch

from .cs_aligner import CSAlignerLoss
from .distribution import CauchySchwarzLoss, CoralLoss, KernelKLLoss, MMDLoss, SinkhornLoss
from .objective import Objective
from .pairs import InfoNCELoss, UniformAlignLoss
from .regression import EclipseLoss, ProjectionLoss

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
}


def objective_options(name: str) -> dict[str, object]:
    """The options of the objective `name` with their defaults; all of them are fit for JSON."""
    options: dict[str, object] = {}
    for cls in objective_class(name).__mro__:
        if "__init__" in vars(cls) and issubclass(cls, Objective):
            for parameter in inspect.signature(cls.__init__).parameters.values():
                if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "group":
                    options.setdefault(parameter.name, parameter.default)
    return options


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
