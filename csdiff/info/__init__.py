"""What is in an adapter, a store, a training run, a pipeline or an encoder folder."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"config": ["InfoConfig"], "inspection": ["inspect_path"], "text": ["as_text"]},
)
