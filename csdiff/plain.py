"""Results as plain values, ready for JSON."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping


def plain(value: object) -> object:
    """Dataclasses, paths, arrays and tensors as what JSON has; null stands for numbers that are not finite."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # numpy scalars and arrays, torch tensors
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
