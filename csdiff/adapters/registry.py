"""The adapters by name, and loading any of them from a folder."""

import inspect
import os
from typing import Any

from csdiff.adapters import folder, hub
from csdiff.adapters.base import Adapter
from csdiff.adapters.diffusion import DiffusionAdapter
from csdiff.adapters.linear import LinearAdapter
from csdiff.adapters.lora import LoRAAdapter
from csdiff.adapters.mlp import MLPAdapter
from csdiff.adapters.transformer import TransformerAdapter
from csdiff.errors import CSDiffError

ADAPTERS: dict[str, type[Adapter]] = {
    "mlp": MLPAdapter,
    "transformer": TransformerAdapter,
    "linear": LinearAdapter,
    "lora": LoRAAdapter,
    "diffusion": DiffusionAdapter,
}
"""Adapter classes by name. Adding one here makes it known to training, loading and the shared tests."""


def build_adapter(name: str, *, embedding_dim: int, text_dim: int | None = None, **options: Any) -> Adapter:
    """Builds the adapter `name` with the given dimensions; `options` are the other arguments of its class
    (and `preset` for the transformer).

    Raises:
        CSDiffError: An unknown name or option (the known ones are listed), or a value the class refuses.
    """
    if name not in ADAPTERS:
        raise CSDiffError(f"Unknown adapter {name!r}; known: {', '.join(ADAPTERS)}.")
    cls = ADAPTERS[name]
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    preset = options.pop("preset", None) if cls is TransformerAdapter else None
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise CSDiffError(f"Adapter {name!r} has no option {unknown[0]!r}; known: {', '.join(known)}.")
    options.update(embedding_dim=embedding_dim, text_dim=text_dim)
    return cls(**options) if preset is None else cls.from_preset(preset, **options)


class AutoAdapter:
    """Loads an adapter of any kind; the class comes from `config.json`."""

    def __init__(self):
        raise CSDiffError("AutoAdapter is not constructed; call AutoAdapter.from_pretrained(folder or Hub id).")

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Adapter:
        """Loads the adapter in a folder, or in a Hub repository by its id; see `Adapter.from_pretrained`.

        Raises:
            CSDiffError: As `Adapter.from_pretrained`, and when the config names a class that is not an adapter here.
        """
        where = {name: kwargs.pop(name) for name in ("subfolder", *hub.OPTIONS) if name in kwargs}
        path = hub.locate(pretrained_model_name_or_path, **where)
        found = folder.read_config(path)["_class_name"]
        by_class = {cls.__name__: cls for cls in ADAPTERS.values()}
        if found not in by_class:
            raise CSDiffError(
                f"{path / folder.CONFIG} is the config of {found}, expected one of {', '.join(by_class)}; "
                "give the folder of a csdiff adapter."
            )
        return by_class[found].from_pretrained(path, **kwargs)
