"""The page in the browser: pictures from prompts, blends, and a look inside adapters and stores."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__, submod_attrs={"config": ["AppConfig"], "server": ["serve"]}
)
