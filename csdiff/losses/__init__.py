"""Alignment losses: the Cauchy-Schwarz divergence, InfoNCE, their sum, and the baselines they are compared with.

Tensors in, scalar out, computed in float32 or better whatever the input; nothing here knows of models or files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "arguments": ["NonFiniteRows"],
        "bandwidth": ["resolve_bandwidth"],
        "cauchy_schwarz": ["cauchy_schwarz_divergence", "log_mean_kernel", "squared_mmd"],
        "contrastive": ["info_nce"],
        "gaussian": ["gaussian_cauchy_schwarz"],
        "objective": ["Objective", "ObjectiveOutput"],
        "presets": ["OBJECTIVES", "CSAlignerLoss", "build_objective", "objective_options"],
        "tokens": ["token_cauchy_schwarz_divergence"],
    },
)
