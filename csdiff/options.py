"""Types of options that check themselves: on the command line, in YAML and in Python alike.

A field of a configuration dataclass says what it takes by its type; what a type cannot say crosses two options, and is
checked by hand where the configuration is used.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import (
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
    restricted_string_type,
)

from csdiff.errors import CSDiffError

__all__ = [
    "ClosedUnitInterval",
    "Decay",
    "NonEmpty",
    "NonNegativeFloat",
    "NonNegativeInt",
    "Port",
    "PositiveFloat",
    "PositiveInt",
    "Seed",
    "Steps",
    "check_options",
]

Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)], docstring="A number from 0 to below 1.")
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)], docstring="A whole number from 0 to 2^63 - 1.")
Steps = restricted_number_type("Steps", int, [(">=", 1), ("<=", 1000)], docstring="A whole number from 1 to 1000.")
Port = restricted_number_type("Port", int, [(">=", 0), ("<=", 65535)], docstring="A whole number from 0 to 65535.")
NonEmpty = restricted_string_type("NonEmpty", r"^.*\S.*$", docstring="Text that is not blank.")


def check_options(config: Any) -> None:
    """Check every field of a configuration dataclass against its type, those of nested dataclasses too.

    What the command line has parsed are instances of the types above: they become plain numbers and texts, in place.

    Raises:
        CSDiffError: naming the option, what it takes and what was found.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(config))
    try:
        parser.parse_object(dataclasses.asdict(config))
    except (ArgumentError, TypeError, ValueError) as error:
        raise CSDiffError(" ".join(str(error).split())) from error
    _make_plain(config)


def _make_plain(config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _make_plain(value)
        elif isinstance(value, (int, float, str)) and type(value) not in (bool, int, float, str):
            setattr(config, field.name, next(kind(value) for kind in (int, float, str) if isinstance(value, kind)))
