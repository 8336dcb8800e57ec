"""A parser from the fields of a configuration dataclass; jsonargparse parses, documents and complains."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Literal, NoReturn, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, set_parsing_settings

from csdiff.cli.commands import COMMANDS, Command
from csdiff.errors import CSDiffError
from csdiff.options import describe, explain, option_types
from csdiff.resources import recipes

# The comments under the fields are the help texts.
set_parsing_settings(docstring_parse_attribute_docstrings=True)

# Anchors of a YAML file may be used so often; nested ones grow without bound when they are expanded.
_MOST_ALIASES = 100
# `--compare A B C`; not for prompts, whose words would each become one if the quotes were forgotten.
_SEVERAL = {"compare", "extractors", "bandwidths", "picture_baselines"}


class _Parser(ArgumentParser):
    """Says what is wrong in one sentence, without the usage text in front of it."""

    config_class: type

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise CSDiffError(explain(self.config_class, message))

    def parse_path(self, path, *args, **kwargs):
        try:
            events = yaml.parse(Path(path).read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
            aliases = sum(isinstance(event, yaml.AliasEvent) for event in events)
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())
            raise CSDiffError(f"{path}: expected YAML in UTF-8, found something else ({reason}).") from None
        if aliases > _MOST_ALIASES:
            raise CSDiffError(f"{path}: expected at most {_MOST_ALIASES} YAML aliases, found {aliases}.")
        return super().parse_path(path, *args, **kwargs)


class _HelpFormatter(DefaultHelpFormatter):
    """Says in words what an option takes, and leaves the lines of examples as they are."""

    def __init__(self, prog: str, max_help_position: int = 6, **options):
        super().__init__(prog, max_help_position=max_help_position, **options)

    def _get_type_str(self, action) -> str | None:
        annotation = getattr(action, "_typehint", None)
        if annotation in (bool, str, str | None) or get_origin(annotation) is Literal:
            return None  # any text, or the values that stand beside the name
        return describe(annotation).removesuffix(" or null") if annotation else super()._get_type_str(action)

    def _get_help_string(self, action) -> str:
        text = super()._get_help_string(action).replace("type: ", "").replace(", default: ", "; default: ")
        if action.default in (None, "", [], {}):
            text = text.replace("; default: %(default)s", "").replace(" (default: %(default)s)", "")
        return text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if text.startswith("examples:") else super()._fill_text(text, width, indent)


def build_parser(config_class: type, prog: str, command: Command | None = None) -> ArgumentParser:
    """A parser whose options, defaults, help and checks are the fields of `config_class`; `prog` is its name."""
    positional = command.positional if command else None
    parser = _Parser(
        prog=prog,
        usage=" ".join([prog, *([positional.upper()] if positional else []), "[OPTIONS]"]),
        description=config_class.__doc__,
        allow_abbrev=False,
        formatter_class=_HelpFormatter,
    )
    parser.config_class = config_class
    parser.add_argument("--config", action="config", help="YAML file with any of the options below.")
    # A command may name a file for its JSON instead, or have no result.
    if "json" not in option_types(config_class) and (command is None or command.answers):
        parser.add_argument("--json", action="store_true", help="Write the result to stdout as JSON.")
    parser.add_class_arguments(config_class)
    first = command.first if command else ()
    actions = {action.dest: action for action in parser._actions}
    dump = parser._option_string_actions["--print_config"]
    dump.help, dump.metavar = "Print the configuration that results, and stop.", ""
    if positional:
        named = actions[positional]
        named.help = f"{named.help or ''} The name may be left out: {prog} {positional.upper()}."
    for group in parser._action_groups:
        # jsonargparse heads them with the docstring, which is the description above, too.
        group.title = "further options" if group.title == parser.description.rstrip(".") else group.title
        group._group_actions = [
            a for a in group._group_actions if a.dest not in first and type(a).__name__ != "_ActionConfigLoad"
        ]
    if first:
        most_used = parser.add_argument_group("most used")
        most_used._group_actions = [actions[name] for name in first]
        parser._action_groups.insert(0, parser._action_groups.pop())
    if command:
        parser.epilog = "\n".join(["examples:", *(f"  {example}" for example in command.examples)])
    return parser


def normalize(config_class: type, arguments: Sequence[str], positional: str | None = None) -> list[str]:
    """The command line as jsonargparse wants it: every option as `--name=value`.

    `--num-images` means `--num_images`; `--grid` alone means `--grid=true` and `--no-grid` the opposite. A prompt is
    text, whatever it looks like: `--prompt "3: [a]"` must not be read as YAML, so repeated texts are gathered as text.
    Of other lists the parts are gathered: `--bandwidths 0.5 1` is `--bandwidths [0.5,1]`.
    """
    known = option_types(config_class)
    gathered: dict[str, list[str]] = {}
    rest: list[str] = []
    pending = list(reversed(arguments))
    while pending:
        argument = pending.pop()
        if not argument.startswith("--") or argument == "--":
            if positional and not argument.startswith("-"):
                argument, positional = f"--{positional}={argument}", None
            rest.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        name = name.replace("-", "_")
        kind, following = known.get(name), pending[-1] if pending else "--"
        if equals or (kind is None and name in ("json", "help", "print_config")):
            pass
        elif kind is None and name.startswith("no_") and known.get(name[3:]) is bool:
            name, equals, value = name[3:], "=", "false"
        elif kind is bool and following.lower() not in ("true", "false"):
            equals, value = "=", "true"
        elif pending and (kind == list[str] or not following.startswith("--")):
            equals, value = "=", pending.pop()
        if get_origin(kind) is not list:
            rest.append(f"--{name}{equals}{value}")
            continue
        if not equals:
            raise CSDiffError(f"--{name}: expected {describe(get_args(kind)[0])}, found the end of the command.")
        gathered.setdefault(name, []).append(value)
        while name in _SEVERAL and pending and not pending[-1].startswith("-"):
            gathered[name].append(pending.pop())
    for name, values in gathered.items():
        listed = json.dumps(values, ensure_ascii=False)
        if known[name] != list[str]:
            listed = f"[{','.join(value.strip('[] ') for value in values)}]"
        rest.append(f"--{name}={listed}")
    return rest


def parse_command(config_class: type, arguments: Sequence[str], prog: str, command: Command | None = None):
    """Options from YAML and command line as an instance of `config_class`, and whether `--json` is given.

    Raises:
        CSDiffError: for an unknown option or config key, or a value that its type refuses.
    """
    parser = build_parser(config_class, prog, command)
    words = normalize(config_class, arguments, command.positional if command else None)
    values = parser.parse_args([f"--config={_find_config(w[9:])}" if w.startswith("--config=") else w for w in words])
    values.pop("config", None)
    as_json = "json" not in option_types(config_class) and values.pop("json", False)
    return config_class(**vars(parser.instantiate(values))), as_json


def _find_config(name: str) -> Path:
    """The YAML file of a name, here or among the recipes that ship with csdiff."""
    path = Path(name).expanduser()
    shipped = recipes() if path.parent in (Path(), Path("configs")) else {}
    found = path if path.exists() else shipped.get(path.name)
    if found is None or not found.is_file():
        what = "a folder" if path.is_dir() else "nothing"
        cure = f"check the path{', or name one of ' * bool(shipped)}{', '.join(shipped)}"
        raise CSDiffError(f"--config: expected a YAML file, found {what} at {name}; {cure}.")
    return found


def parse(config_class: type, arguments: Sequence[str], prog: str):
    """As `parse_command`, the options alone."""
    return parse_command(config_class, arguments, prog)[0]


def completion_script(shell: str) -> str:
    """The script with which a shell completes commands and options, as shtab writes it.

    Raises:
        CSDiffError: shtab does not know the shell.
    """
    parser = ArgumentParser(prog="csdiff")
    subcommands = parser.add_subcommands()
    for name, command in COMMANDS.items():
        subcommands.add_subcommand(name, build_parser(resolve_name(command.config), name), help=command.help)
    try:
        return parser.get_completion_script(f"shtab-{shell}")
    except ValueError as error:
        raise CSDiffError(f"--print_completion: expected bash, zsh or tcsh, found {shell!r}.") from error
