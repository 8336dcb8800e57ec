"""The objectives by name."""

from .cs_aligner import CSAlignerLoss
from .objective import Objective

OBJECTIVES: dict[str, type[Objective]] = {"cs_aligner": CSAlignerLoss}


def build_objective(name: str, **options) -> Objective:
    """The objective `name` with the options its constructor takes."""
    if name not in OBJECTIVES:
        raise ValueError(f"unknown objective {name!r}; the objectives are {', '.join(sorted(OBJECTIVES))}")
    return OBJECTIVES[name](**options)
