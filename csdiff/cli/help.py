"""The text of `csdiff COMMAND --help`."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action

from jsonargparse import DefaultHelpFormatter

PRINT_CONFIG = "--print_config"


def tidy(parser) -> None:
    """Names the groups of a parser for readers, and leaves out what only the parser's library cares about."""
    general, options, *_ = [group for group in parser._action_groups if group._group_actions]
    general.title, options.title = "general", "options"
    for action in parser._actions:
        if PRINT_CONFIG in action.option_strings:
            action.metavar = ""
            action.help = "Write the configuration that results, as YAML, and stop."
        elif type(action).__name__ == "_ActionConfigLoad":
            # a file for one group of options: --config does that too
            action.help = SUPPRESS


class HelpFormatter(DefaultHelpFormatter):
    """What an option is for and its default, where it has one; command lines are not wrapped."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action: Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]
        if action.nargs == 0 or PRINT_CONFIG in names:
            return ", ".join(names)
        return f"{', '.join(names)} {self._value(action)}"

    def _value(self, action: Action) -> str:
        kind = (self._get_type_str(action) or "str").removesuffix(" | null")
        if choices := re.search(r"Literal\[(.*?)\]", kind):
            return "|".join(re.findall(r"'(.*?)'", choices[1]))
        known = {"bool": "true|false", "int": "N", "float": "X", "list[float]": "X"}
        return known.get(kind, action.dest.rpartition(".")[2].upper())

    def _get_help_string(self, action: Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or default in (None, SUPPRESS, "", [], {}) or action.nargs == 0:
            return (text[:1].upper() + text[1:]).rstrip(".") + "."
        if isinstance(default, bool):
            default = str(default).lower()
        elif isinstance(default, list):
            default = ", ".join(map(str, default))
        return f"{text} (default: {default})" if text else f"default: {default}"
