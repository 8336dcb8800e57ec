"""csdiff: CLIP text embeddings into the image-embedding distribution, for unCLIP-style diffusers pipelines."""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["adapters", "embeddings", "evaluation", "losses", "pipelines", "training"],
    submod_attrs={
        "adapters": ["AutoAdapter"],
        "errors": ["CSDiffError"],
        "pipelines": ["CSDiffPriorPipeline", "load_adapter"],
    },
)
__all__ += ["__version__"]
