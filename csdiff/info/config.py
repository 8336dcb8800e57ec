"""Options of `csdiff info`."""

from dataclasses import dataclass


@dataclass
class InfoConfig:
    """Tells what is in a folder: an adapter, a store, a training run, a checkpoint, a pipeline or an encoder."""

    path: str = ""
    """The folder, or a safetensors file."""
    check: bool = False
    """Also read everything: compare checksums, load weights, look for values that are not finite."""
