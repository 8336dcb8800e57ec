"""Captions and images: the forms in which people keep them, read as one stream of items."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "images": ["UnreadableImage", "decode_image"],
        "items": ["Item", "Problem", "Source"],
        "opening": ["open_source"],
    },
)
