"""The adapters by name, and loading any of them from a folder."""

import inspect
import os
from collections.abc import Iterable
from typing import Any

from csdiff.adapters import folder
from csdiff.adapters.base import Adapter
from csdiff.adapters.diffusion import DiffusionAdapter
from csdiff.adapters.linear import LinearAdapter
from csdiff.adapters.lora import LoRAAdapter
from csdiff.adapters.mlp import MLPAdapter
from csdiff.adapters.transformer import TransformerAdapter
from csdiff.errors import CSDiffError, did_you_mean

# This makes an adapter known to training, loading, the command line and the shared tests.
ADAPTERS: dict[str, type[Adapter]] = {
    "mlp": MLPAdapter,
    "transformer": TransformerAdapter,
    "linear": LinearAdapter,
    "lora": LoRAAdapter,
    "diffusion": DiffusionAdapter,
}


def check_adapter_options(name: str, options: Iterable[str]) -> None:
    """Raises a CSDiffError for an option that the adapter `name` does not have, with the known ones."""
    cls = ADAPTERS[name]
    known = [*list(inspect.signature(cls.__init__).parameters)[1:], *["preset"] * hasattr(cls, "from_preset")]
    if unknown := sorted(set(options) - set(known)):
        near = did_you_mean(unknown[0], known) or "."
        raise CSDiffError(f"Adapter {name!r} has no option {unknown[0]!r}; known: {', '.join(known)}{near}")


def build_adapter(name: str, *, embedding_dim: int, text_dim: int | None = None, **options: Any) -> Adapter:
    """Builds the adapter `name` with the given dimensions; `options` are the other arguments of its class
    (and `preset` for the transformer).

    Raises:
        CSDiffError: An unknown name or option (the known ones are listed), or a value the class refuses.
    """
    if name not in ADAPTERS:
        raise CSDiffError(f"Unknown adapter {name!r}; known: {', '.join(ADAPTERS)}.")
    check_adapter_options(name, options)
    cls, preset = ADAPTERS[name], options.pop("preset", None)
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
        path = folder.locate(pretrained_model_name_or_path, kwargs)
        found, classes = folder.read_config(path)["_class_name"], {cls.__name__: cls for cls in ADAPTERS.values()}
        if found not in classes:
            raise CSDiffError(
                f"{path / folder.CONFIG} is the config of {found}, expected one of {', '.join(classes)}; "
                "give the folder of a csdiff adapter."
            )
        return classes[found].from_pretrained(path, **kwargs)
