"""Alignment losses: the Cauchy-Schwarz divergence, InfoNCE, their sum, and the baselines they are compared with.

Tensors in, scalar out, computed in float32 or better whatever the input; nothing here knows of models or files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["NonFiniteRows", "resolve_bandwidth"],
        "cauchy_schwarz": [
            "cauchy_schwarz_divergence",
            "gaussian_cauchy_schwarz",
            "log_mean_kernel",
            "squared_mmd",
        ],
        "contrastive": ["info_nce"],
        "objectives": [
            "OBJECTIVES",
            "CSAlignerLoss",
            "Objective",
            "ObjectiveOutput",
            "build_objective",
            "objective_options",
        ],
        "tokens": ["token_cauchy_schwarz_divergence"],
    },
)
