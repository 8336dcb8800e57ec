"""From text embeddings to images: adapters inside unmodified diffusers pipelines."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["GenerateConfig"],
        "decoders": ["PRESETS", "DecoderSource", "resolve_decoder"],
        "generate": ["generate", "read_settings"],
        "loading": ["ip_adapter_arguments", "ip_adapter_image_embeds", "load_adapter", "load_karlo"],
        "prior": ["CSDiffPriorPipeline"],
        "scheduler": ["EmbeddingPrior", "OneShotScheduler"],
    },
)
