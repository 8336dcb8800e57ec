"""Types of options that check themselves: on the command line, in YAML and in Python alike.

A field of a configuration dataclass says what it takes by its type; what a type cannot say crosses two options, and is
checked by hand where the configuration is used.
"""

from __future__ import annotations

import dataclasses
import os
import re
import types
import typing
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import (  # noqa: F401  for the configurations
    ClosedUnitInterval,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    restricted_number_type,
    restricted_string_type,
)

from csdiff.errors import CSDiffError, did_you_mean
from csdiff.kinds import kind_of

Decay = restricted_number_type("Decay", float, [(">=", 0), ("<", 1)], docstring="A number from 0 to below 1.")
Seed = restricted_number_type("Seed", int, [(">=", 0), ("<", 2**63)], docstring="A whole number from 0 to 2^63 - 1.")
Steps = restricted_number_type("Steps", int, [(">=", 1), ("<=", 1000)], docstring="A whole number from 1 to 1000.")
Port = restricted_number_type("Port", int, [(">=", 0), ("<=", 65535)], docstring="A whole number from 0 to 65535.")
NonEmpty = restricted_string_type("NonEmpty", r"^.*\S.*$", docstring="Text that is not blank.")
# Any text; jsonargparse wants two types to have two patterns.
Place = restricted_string_type("Place", r"(?s)^.*$", docstring="A path.")
NameOrPlace = restricted_string_type("NameOrPlace", r"(?s).*", docstring="A name or a path.")


def option_types(config_class: type, prefix: str = "") -> dict[str, Any]:
    """Dotted option names of a configuration dataclass and their annotations; sections stand before their options."""
    annotations: dict[str, Any] = {}
    for name, annotation in typing.get_type_hints(config_class).items():
        annotations[prefix + name] = annotation
        if dataclasses.is_dataclass(annotation):
            annotations |= option_types(annotation, f"{prefix}{name}.")
    return annotations


def check_options(config: Any) -> None:
    """Check every field of a configuration dataclass against its type, those of nested dataclasses too.

    What the command line has parsed are instances of the types above: they become plain numbers and texts, in place,
    and so do paths.

    Raises:
        CSDiffError: naming the option, what it takes and what was found.
    """
    _make_plain(config)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(type(config))
    try:
        parser.parse_object(dataclasses.asdict(config))
    except (ArgumentError, TypeError, ValueError) as error:
        raise CSDiffError(explain(type(config), str(error))) from error


def _make_plain(config: Any) -> None:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            _make_plain(value)
        elif isinstance(value, os.PathLike):
            setattr(config, field.name, os.fspath(value))
        elif isinstance(value, (int, float, str)) and type(value) not in (bool, int, float, str):
            setattr(config, field.name, next(kind(value) for kind in (int, float, str) if isinstance(value, kind)))


def explain(config_class: type, message: str) -> str:
    """What jsonargparse complains of, with the option first and, for a value, what the option takes."""
    message, known = " ".join(message.split()), option_types(config_class)
    if bare := re.search(r"unrecognized arguments: ([^-]\S*)", message):
        cure = _option_for(bare[1], known) or "; quote a value that has spaces."
        return f"{bare[1]}: expected options (--name value) and nothing between them{cure}"
    if unknown := re.search(r"unrecognized arguments: -+([\w.]+)|Option '([\w.]+)'", message):
        found = unknown[1] or unknown[2]
        return f"{found}: expected a known option{did_you_mean(found, known) or '; --help lists them.'}"
    key = re.search(r'[Kk]ey "([\w.]+)"', message)
    if key is None or key[1] not in known:
        return message.removeprefix("argument ")
    if dataclasses.is_dataclass(known[key[1]]):
        first = next(name for name in known if name.startswith(f"{key[1]}."))
        return f"--{key[1]}: expected one of its options (--help lists them); did you mean --{first}?"
    # Of a union each member complains; the last word is the value.
    found = re.search(r"(?:[Gg]ot value|Given value): ((?:(?!Given value).)*)$", message)
    found = found or re.search(
        r"Not of type \w+: (.*?) (?:does not|not a)|(?:literal for|convert) .*?: (.*)$", message
    )
    value = "" if found is None else f", found {next(filter(None, found.groups()))}"
    return f"--{key[1]}: expected {describe(known[key[1]])}{value}."


def _option_for(place: str, known: dict[str, Any]) -> str:
    """The option that takes a place, as the end of a sentence; nothing where there is no such option or place."""
    adapter = kind_of(Path(place)) in ("run", "checkpoint", "adapter")
    names = [name for name in ("data.train", "source", "adapter" if adapter else "data") if name in known]
    return f"; did you mean --{names[0]} {place}?" if names and Path(place).exists() else ""


def describe(annotation: Any) -> str:
    """An annotation in words: `PositiveInt | None` is "a whole number >0 or null"."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(describe, typing.get_args(annotation)))
    if annotation is type(None):
        return "null"
    if hasattr(annotation, "_restrictions") or hasattr(annotation, "_regex"):
        text = (
            annotation.__doc__.removesuffix(".")
            .replace("int restricted to be", "a whole number")
            .replace("float restricted to be", "a number")
        )
        return text[:1].lower() + text[1:]
    if typing.get_origin(annotation) is list:
        return f"a list of: {describe(typing.get_args(annotation)[0])}"
    annotation = typing.get_origin(annotation) or annotation
    plain = {dict: "names with values", int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))
