"""Adapters out of training runs: as a folder of their own, or as a complete diffusers pipeline."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={"config": ["ExportConfig"], "exporting": ["ExportResult", "export"]},
)
