"""Maps from text embeddings into the distribution of image embeddings, one file a method."""

import lazy_loader

from csdiff.adapters.registry import PLACES

_NAMES = {module: [cls] for module, cls in (place.split(":") for place in PLACES.values())}
_NAMES["transformer"].append("TRANSFORMER_PRESETS")
_NAMES["linear"].append("PairedMoments")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        **_NAMES,
        "base": ["Adapter"],
        "registry": ["ADAPTERS", "AutoAdapter", "build_adapter"],
    },
)
