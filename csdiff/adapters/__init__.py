"""Maps from text embeddings into the distribution of image embeddings, one file a method."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["Adapter"],
        "diffusion": ["DiffusionAdapter"],
        "linear": ["LinearAdapter", "PairedMoments"],
        "lora": ["LoRAAdapter"],
        "mlp": ["MLPAdapter"],
        "registry": ["ADAPTERS", "AutoAdapter", "build_adapter"],
        "transformer": ["TRANSFORMER_PRESETS", "TransformerAdapter"],
    },
)
