"""The entry points: `csdiff`, and the scripts that stand for one subcommand."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout

import csdiff
from csdiff.cli.commands import COMMANDS, import_object
from csdiff.cli.running import run
from csdiff.errors import CSDiffError

SHELLS = ("bash", "zsh", "fish")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `csdiff`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments and arguments[0] in COMMANDS:
        sys.exit(run_command(arguments[0], arguments[1:], prog=f"csdiff {arguments[0]}"))
    if arguments[:1] == ["help"] and len(arguments) == 2 and arguments[1] in COMMANDS:
        sys.exit(run_command(arguments[1], ["--help"], prog=f"csdiff {arguments[1]}"))
    if not arguments:
        print(overview(), file=sys.stderr)
        sys.exit(2)
    sys.exit(run(lambda: _general(arguments), "csdiff"))


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the options of one subcommand and call its function; returns the exit code."""
    command = COMMANDS[name]

    def action() -> None:
        from csdiff.cli.options import parse_command

        config_class = import_object(command.config)
        config, json = parse_command(config_class, arguments, prog, command.positional, command.examples)
        _plain_output(config)
        # stdout is for results: whatever is said on the way is progress.
        with redirect_stdout(sys.stderr):
            result = import_object(command.function)(config)
        if os.environ.get("RANK", "0") == "0":
            _write(command.show, result, json)

    return run(action, prog)


def _write(show: str | None, result: object, json: bool) -> None:
    from csdiff.cli.results import as_json

    text = as_json(result) if json else show and import_object(show)(result)
    if text:
        print(text, flush=True)
    if problems := result.get("problems") if isinstance(result, Mapping) else getattr(result, "problems", None):
        raise CSDiffError(f"{len(problems)} problem{'s' * (len(problems) > 1)} found, listed above.")


def _plain_output(config: object) -> None:
    """No progress bars where nobody watches: they fill log files with control characters."""
    if sys.stderr.isatty():
        return
    if getattr(config, "progress", None) is True:
        config.progress = False
    # the bars of libraries
    for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(variable, "1")


def _general(arguments: Sequence[str]) -> None:
    """What is asked of `csdiff` itself."""
    option, _, value = arguments[0].replace("-", "_").partition("=")
    if option in ("_h", "__help", "help"):
        print(overview())
    elif option == "__version":
        print(csdiff.__version__)
    elif option == "__print_completion":
        from csdiff.cli.completion import script

        print(script(value or next(iter(arguments[1:]), "")), end="")
    else:
        raise CSDiffError(_unknown(arguments[0]))


def _unknown(found: str) -> str:
    what = "option" if found.startswith("-") else "command"
    known = ("--help", "--version", "--print_completion") if what == "option" else tuple(COMMANDS)
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "`csdiff --help` tells more."
    return f"Expected {'an' if what == 'option' else 'a'} {what} ({', '.join(known)}), found {found!r}: {hint}"


def overview() -> str:
    """The text of `csdiff --help`."""
    lines = ["usage: csdiff COMMAND [OPTIONS]", "", "CLIP text embeddings into the image-embedding distribution."]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<10}{c.help}" for name, c in COMMANDS.items() if c.group == group]
    lines += ["", "Examples:"]
    lines += [f"  {command.examples[0]}" for command in COMMANDS.values() if command.examples]
    lines += [
        "",
        "Options:",
        "  --help                    this text; `csdiff COMMAND --help` lists the options of a command",
        "  --version                 the version alone",
        f"  --print_completion SHELL  a script that completes commands and options ({', '.join(SHELLS)})",
        "",
        "Results go to stdout (as JSON with --json), everything else to stderr.",
        "Exit codes: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 a defect.",
    ]
    return "\n".join(lines)
