"""The adapters by name, and loading any of them from a folder. Names alone are known without importing torch."""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from csdiff.errors import CSDiffError, did_you_mean

if TYPE_CHECKING:
    from csdiff.adapters.base import Adapter

# One line an adapter: this makes it known to training, loading, the command line and the shared tests.
PLACES = {
    "mlp": "mlp:MLPAdapter",
    "transformer": "transformer:TransformerAdapter",
    "linear": "linear:LinearAdapter",
    "lora": "lora:LoRAAdapter",
    "diffusion": "diffusion:DiffusionAdapter",
}
CLASS_NAMES = {place.partition(":")[2]: name for name, place in PLACES.items()}
"""Names by the class that `config.json` states."""


class _Adapters(Mapping[str, "type[Adapter]"]):
    def __getitem__(self, name: str) -> type[Adapter]:
        module, _, cls = PLACES[name].partition(":")
        return getattr(importlib.import_module(f"csdiff.adapters.{module}"), cls)

    def __iter__(self) -> Iterator[str]:
        return iter(PLACES)

    def __len__(self) -> int:
        return len(PLACES)


ADAPTERS = _Adapters()
"""Adapter classes by name; a class is imported when it is asked for."""


def build_adapter(name: str, *, embedding_dim: int, text_dim: int | None = None, **options: Any) -> Adapter:
    """Builds the adapter `name` with the given dimensions; `options` are the other arguments of its class
    (and `preset` for the transformer).

    Raises:
        CSDiffError: An unknown name or option (the known ones are listed), or a value the class refuses.
    """
    if name not in PLACES:
        raise CSDiffError(f"Unknown adapter {name!r}; known: {', '.join(PLACES)}.")
    cls = ADAPTERS[name]
    known = list(inspect.signature(cls.__init__).parameters)[1:]
    preset = options.pop("preset", None) if hasattr(cls, "from_preset") else None
    unknown = sorted(set(options) - set(known))
    if unknown:
        near = did_you_mean(unknown[0], known) or "."
        raise CSDiffError(f"Adapter {name!r} has no option {unknown[0]!r}; known: {', '.join(known)}{near}")
    options.update(embedding_dim=embedding_dim, text_dim=text_dim)
    return cls(**options) if preset is None else cls.from_preset(preset, **options)


class AutoAdapter:
    """Loads an adapter of any kind; the class comes from `config.json`."""

    @staticmethod
    def from_pretrained(pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Adapter:
        """Loads the adapter in a folder, or in a Hub repository by its id; see `Adapter.from_pretrained`.

        Raises:
            CSDiffError: As `Adapter.from_pretrained`, and when the config names a class that is not an adapter here.
        """
        from csdiff.adapters import folder

        path = folder.locate(pretrained_model_name_or_path, kwargs)
        found = folder.read_config(path)["_class_name"]
        if found not in CLASS_NAMES:
            raise CSDiffError(
                f"{path / folder.CONFIG} is the config of {found}, expected one of {', '.join(CLASS_NAMES)}; "
                "give the folder of a csdiff adapter."
            )
        return ADAPTERS[CLASS_NAMES[found]].from_pretrained(path, **kwargs)
