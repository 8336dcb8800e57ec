"""What commands leave on stdout: a line or two for people and pipes, or JSON."""

from __future__ import annotations

import json
from pathlib import Path

from csdiff.plain import plain


def as_json(result: object) -> str:
    """A result as one JSON document."""
    return json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False)


def lines(result: list[Path]) -> str:
    """One path a line."""
    return "\n".join(map(str, result))


def output_folder(result) -> str:
    """The folder that an `EmbedReport` names."""
    return str(result.output)


def adapter_folder(result) -> str:
    """The folder that a `TrainResult` names."""
    return str(result.adapter_dir)
