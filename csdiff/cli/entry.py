"""The entry points: `csdiff`, and the scripts that stand for one subcommand."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

import csdiff
from csdiff.cli.commands import COMMANDS, import_object
from csdiff.cli.running import run


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the options of one subcommand and call its function; returns the exit code."""
    command = COMMANDS[name]

    def action() -> None:
        from csdiff.cli.options import parse_command
        from csdiff.cli.results import as_json

        config, json = parse_command(import_object(command.config), arguments, prog)
        _plain_output()
        # stdout is for results: whatever is said on the way is progress.
        with redirect_stdout(sys.stderr):
            result = import_object(command.function)(config)
        if os.environ.get("RANK", "0") != "0":
            return
        if json:
            print(as_json(result))
        elif command.show is not None:
            print(import_object(command.show)(result))
        sys.stdout.flush()

    return run(action, prog)


def _plain_output() -> None:
    """No progress bars of libraries where nobody watches: they fill log files with control characters."""
    if not sys.stderr.isatty():
        for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
            os.environ.setdefault(variable, "1")


def overview() -> str:
    lines = ["usage: csdiff COMMAND [OPTIONS]", "", "CLIP text embeddings into the image-embedding distribution.", ""]
    lines += [f"  {name:<10}{command.help}" for name, command in COMMANDS.items()]
    lines += ["", "`csdiff COMMAND --help` lists the options of a command.", f"csdiff {csdiff.__version__}"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `csdiff`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview())
        sys.exit(0 if arguments else 2)
    if arguments[0] == "--version":
        print(csdiff.__version__)
        sys.exit(0)
    name = arguments[0]
    if name not in COMMANDS:
        print(f"csdiff: expected a command ({', '.join(COMMANDS)}), found {name!r}.", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_command(name, arguments[1:], prog=f"csdiff {name}"))
