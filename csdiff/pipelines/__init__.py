"""From text embeddings to images: adapters inside unmodified diffusers pipelines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["GenerateConfig"],
        "decoders": ["PRESETS", "DecoderPreset", "DecoderSource", "resolve_decoder"],
        "generate": ["generate", "read_settings"],
        "ip_adapter": ["ip_adapter_arguments", "ip_adapter_image_embeds"],
        "karlo": ["load_karlo"],
        "loading": ["load_adapter"],
        "prior": ["CSDiffPriorPipeline"],
        "scheduler": ["EmbeddingPrior", "OneShotScheduler"],
    },
)
