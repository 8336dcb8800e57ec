"""Training of adapters: configuration, task, loop, checkpoints, validation."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"config": ["TrainConfig"], "train": ["TrainResult", "train"]},
)
