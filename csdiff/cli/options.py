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

from csdiff.cli.help import HelpFormatter, tidy
from csdiff.errors import CSDiffError

# The comments under the fields are the help texts.
set_parsing_settings(docstring_parse_attribute_docstrings=True)


class OneLineParser(ArgumentParser):
    """Says what is wrong in one sentence, without the usage text in front of it."""

    config_class: type
    config_file: object = None

    def parse_path(self, path, *args, **kwargs):
        self.config_file = path
        try:
            return super().parse_path(path, *args, **kwargs)
        except UnicodeDecodeError as error:
            raise CSDiffError(f"Expected YAML in {path}, found a file that is not UTF-8 text.") from error

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        raise CSDiffError(self.explain(" ".join(str(message).split())))

    def explain(self, message: str) -> str:
        known_types = option_types(self.config_class)
        if unknown := re.match(r"unrecognized arguments: (\S+)|.*[Oo]ption '([^']+)'$|Option '([^']+)'", message):
            given = next(filter(None, unknown.groups()))
            found = given.split("=")[0].lstrip("-")
            if unknown[1] and not given.startswith("-"):
                return f"Expected options (--name value), found {given!r}; quote a value that has spaces."
            near = difflib.get_close_matches(found, known_types, n=1, cutoff=0.5)
            known = f"did you mean {near[0]!r}?" if near else "--help lists them."
            return f"Expected a known option, found {found!r}: {known}"
        if syntax := re.match(r"Problems parsing config: (.*)", message):
            # YAML's reader names where the passage began, then where it stopped and why.
            reason, *rest = re.split(r' in "<unicode string>", line (\d+), column \d+', syntax[1].strip())
            line = f"line {rest[-2]} of " if rest else ""
            reason = rest[-3].strip() if len(rest) > 2 else reason
            return f"Expected YAML in {line}{self.config_file or '--config'}, found a syntax error: {reason}."
        if unexpected := re.match(r"Unexpected config: ?(.*)", message):
            found = repr(unexpected[1][:60]) if unexpected[1] else "an empty file"
            return f"Expected options (name: value) in {self.config_file or '--config'}, found {found}."
        if bare := re.fullmatch(r"argument (--[\w.]+): expected one argument", message):
            return f"Expected a value after {bare[1]}, found none."
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


def build_parser(config_class: type, prog: str, positional: str | None = None, examples: Sequence[str] = ()):
    """A parser whose options, defaults, help and checks are the fields of `config_class`.

    Args:
        config_class: Dataclass of the options.
        prog: Name in the help.
        positional: Option that may be given without its name.
        examples: Command lines for the help.
    """
    parser = OneLineParser(
        prog=prog,
        usage=" ".join([prog, *([positional.upper()] if positional else []), "[OPTIONS]"]),
        description=config_class.__doc__,
        exit_on_error=True,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    if examples:
        parser.epilog = "\n".join(["examples:", *(f"  {example}" for example in examples)])
    parser.config_class = config_class
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    # A command may name a file for its JSON instead.
    if "json" not in option_types(config_class):
        parser.add_argument("--json", action="store_true", help="Write the result to stdout as JSON.")
    parser.add_class_arguments(config_class)
    tidy(parser)
    return parser


def normalize_arguments(config_class: type, arguments: Sequence[str], positional: str | None = None) -> list[str]:
    """The command line as the parser wants it: every option as `--name=value`.

    `--num-images` means `--num_images`; `--grid` alone means `--grid=true` and `--no-grid` the opposite. A prompt is
    text, whatever it looks like: `--prompt "3: [a]"` must not be read as YAML, so repeated texts are gathered as text.
    """
    known = option_types(config_class)
    repeatable = {name for name, annotation in known.items() if annotation == list[str]}
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    pending = list(reversed(arguments))
    while pending:
        argument = pending.pop()
        if not argument.startswith("--") or argument == "--":
            if positional and not argument.startswith("-"):
                rest.append(f"--{positional}={argument}")
                positional = None
            else:
                rest.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        if name in repeatable:
            if not equals and not pending:
                raise CSDiffError(f"Expected a text after --{name}, found the end of the command.")
            gathered.setdefault(name, []).append(value if equals else pending.pop())
            while name in _SEVERAL and pending and not pending[-1].startswith("-"):
                gathered[name].append(pending.pop())
        elif equals or (name in _FLAGS and name not in known):
            rest.append(f"--{name}{equals}{value}")
        elif name.startswith("no_") and known.get(name[3:]) is bool:
            rest.append(f"--{name[3:]}=false")
        elif known.get(name) is bool and not (pending and pending[-1].lower() in ("true", "false")):
            rest.append(f"--{name}=true")
        elif pending and not pending[-1].startswith("--"):
            rest.append(f"--{name}={pending.pop()}")
        else:
            rest.append(f"--{name}")
    return rest + [f"--{name}={json.dumps(values, ensure_ascii=False)}" for name, values in gathered.items()]


_FLAGS = {"json", "help", "print_config"}
# `--compare A B C`; not for prompts, whose words would each become one if the quotes were forgotten.
_SEVERAL = {"compare", "extractors"}


def parse(config_class: type, arguments: Sequence[str], prog: str):
    """Options from YAML and command line as an instance of `config_class`.

    Raises:
        CSDiffError: for an unknown option or config key, or a value of the wrong type.
    """
    return parse_command(config_class, arguments, prog)[0]


def parse_command(
    config_class: type,
    arguments: Sequence[str],
    prog: str,
    positional: str | None = None,
    examples: Sequence[str] = (),
) -> tuple[object, bool]:
    """As `parse`, and whether `--json` is given."""
    parser = build_parser(config_class, prog, positional, examples)
    values = parser.parse_args(normalize_arguments(config_class, arguments, positional))
    values.pop("config", None)
    as_json = values.pop("json") if "json" not in option_types(config_class) else False
    return config_class(**vars(parser.instantiate(values))), as_json
