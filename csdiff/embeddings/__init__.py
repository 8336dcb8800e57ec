"""Embeddings: the encoders that make them and the store that keeps them."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["EmbedConfig"],
        "encoders": ["find_encoder", "resolve_encoder"],
        "extraction": ["EmbedReport", "embed"],
        "fingerprint": ["check_same_encoder", "compare_encoders", "weights_sha256"],
        "image_encoder": ["ImageEncoder", "ImageEncoding", "load_image_encoder"],
        "loader": ["ImageGroups", "StoreBatches"],
        "statistics": ["EmbeddingStatistics"],
        "store": ["EmbeddingStore", "is_store"],
        "text_encoder": [
            "CaptionTokenizer",
            "TextEncoder",
            "TextEncoding",
            "load_caption_tokenizer",
            "load_text_encoder",
        ],
        "writer": ["StoreWriter", "write_store"],
    },
)
