"""Options from dataclasses: parsing, help, and errors of one sentence."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Sequence

from jsonargparse import ArgumentParser, set_parsing_settings

from csdiff.errors import CSDiffError

# The comments under the fields are the help texts.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class OneLineParser(ArgumentParser):
    """Says what is wrong in one sentence, without the usage text in front of it."""

    config_class: type

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise CSDiffError(self.explain(" ".join(str(message).split())))

    def explain(self, message: str) -> str:
        known_types = option_types(self.config_class)
        if unknown := re.match(r"unrecognized arguments: (\S+)|.*[Oo]ption '([^']+)'$|Option '([^']+)'", message):
            found = next(filter(None, unknown.groups())).split("=")[0].lstrip("-")
            near = difflib.get_close_matches(found, known_types, n=1, cutoff=0.5)
            known = f"did you mean {near[0]!r}?" if near else "--help lists them."
            return f"Expected a known option, found {found!r}: {known}"
        if key := re.search(r'[Kk]ey "([\w.]+)"', message):
            if missing := re.search(r"File does not exist: (.+)", message):
                return f"Expected an existing file for --{key[1]}, found none at {missing[1]}."
            if key[1] in known_types and (
                given := re.search(r"Given value: (.*)|got value (.*?)$|value: (.*?)$", message)
            ):
                found = next(group for group in given.groups() if group)
                return f"Expected {type_name(known_types[key[1]])} for --{key[1]}, found {found}."
        return message


def option_types(config_class: type, prefix: str = "") -> dict[str, object]:
    """Dotted option names of `config_class` and their annotations."""
    annotations: dict[str, object] = {}
    for name, annotation in typing.get_type_hints(config_class).items():
        annotations[prefix + name] = annotation
        if dataclasses.is_dataclass(annotation):
            annotations |= option_types(annotation, f"{prefix}{name}.")
    return annotations


def type_name(annotation: object) -> str:
    """An annotation in words: ``int | None`` is "int or null"."""
    if typing.get_origin(annotation) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(map(type_name, typing.get_args(annotation)))
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation)) if not typing.get_args(annotation) else str(annotation)


def build_parser(config_class: type, prog: str) -> ArgumentParser:
    """A parser whose options, defaults, help and checks are the fields of `config_class`."""
    parser = OneLineParser(prog=prog, description=config_class.__doc__, exit_on_error=True, allow_abbrev=False)
    parser.config_class = config_class
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    parser.add_argument("--json", action="store_true", help="Write the result to stdout as JSON.")
    parser.add_class_arguments(config_class)
    return parser


def normalize_arguments(config_class: type, arguments: Sequence[str]) -> list[str]:
    """Let ``--num-images`` mean ``--num_images``, and gather repeated text options literally.

    A prompt is text, whatever it looks like: ``--prompt "3: [a]"`` must not be read as YAML.
    """
    repeatable = {name for name, annotation in option_types(config_class).items() if annotation == list[str]}
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    pending = iter(arguments)
    for argument in pending:
        if not argument.startswith("--") or argument == "--":
            rest.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name in repeatable:
            value = value if equals else next(pending, None)
            if value is None:
                raise CSDiffError(f"Expected a text after --{name}, found the end of the command.")
            gathered.setdefault(name, []).append(value)
        else:
            rest.append(f"--{name}{equals}{value}")
    return rest + [f"--{name}={json.dumps(values, ensure_ascii=False)}" for name, values in gathered.items()]


def parse(config_class: type, arguments: Sequence[str], prog: str):
    """Options from YAML and command line as an instance of `config_class`.

    Raises:
        CSDiffError: for an unknown option or config key, or a value of the wrong type.
    """
    return parse_command(config_class, arguments, prog)[0]


def parse_command(config_class: type, arguments: Sequence[str], prog: str) -> tuple[object, bool]:
    """As `parse`, and whether `--json` is given."""
    parser = build_parser(config_class, prog)
    values = parser.parse_args(normalize_arguments(config_class, arguments))
    values.pop("config", None)
    as_json = values.pop("json")
    return config_class(**vars(parser.instantiate(values))), as_json
