"""The subcommands, one entry each, and the entry points that call them: exit codes, signals, stdout and stderr."""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pkgutil import resolve_name

import csdiff
from csdiff.errors import CSDiffError, did_you_mean
from csdiff.files import plain

DONE, DEFECT, BAD_INPUT, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143


@dataclass(frozen=True)
class Command:
    """A subcommand. The paths are `package.module:name`.

    Attributes:
        config: Dataclass of its options, in a module that imports no model library: `--help` answers at once.
        function: Called with an instance of `config`; what it prints goes to stderr. What it returns (a dataclass,
            dict, list or None) is the result, which `--json` writes to stdout; `problems` in it make the exit code 2.
        help: One line for `csdiff --help`, under the heading `group`; `examples` are for its own help.
        show: Makes the text for stdout from the result, without `--json`; by default the places that it names.
        positional: An option that may be given without its name.
        first: Options that the help shows first.
        answers: Whether the function returns a result.
    """

    config: str
    function: str
    help: str
    group: str
    examples: tuple[str, ...]
    show: str | None = None
    positional: str | None = None
    first: tuple[str, ...] = ()
    answers: bool = True


MAKE, USE, LOOK = "Make an adapter", "Use it", "See what it is worth"

COMMANDS = {
    "embed": Command(
        "csdiff.embeddings.config:EmbedConfig",
        "csdiff.embeddings:embed",
        "captions and images to an embedding store",
        MAKE,
        (
            "csdiff embed --source my-images --output my-store",
            "csdiff embed --source my-images --output my-store --text_states --dtype float32",
        ),
    ),
    "train": Command(
        "csdiff.training.config:TrainConfig",
        "csdiff.training:train",
        "an embedding store to an adapter",
        MAKE,
        (
            "csdiff train --config configs/tiny.yaml",
            "csdiff train --data.train my-store --output_dir runs/mine --max_steps 500",
        ),
        first=(
            "data.train", "data.validation", "output_dir", "adapter", "objective", "objective_options", "max_steps",
            "batch_size", "learning_rate", "seed", "resume", "export",
        ),
    ),
    "generate": Command(
        "csdiff.pipelines.config:GenerateConfig",
        "csdiff.pipelines:generate",
        "prompts to images",
        USE,
        (
            'csdiff generate --prompt "a red apple, 3d style"',
            'csdiff generate --prompt "a cat" --prompt "a dog" --num_images 4 --adapter runs/mine --output images',
        ),
    ),
    "evaluate": Command(
        "csdiff.evaluation.config:EvaluateConfig",
        "csdiff.evaluation:evaluate",
        "how good an adapter is, in numbers",
        LOOK,
        (
            "csdiff evaluate --adapter runs/mine --data held-out-store --json scores.json --report scores.html",
            "csdiff evaluate --data held-out-store --compare runs/a runs/b runs/c",
            "csdiff evaluate --adapter runs/mine --decoder tiny --pictures held-out.parquet --num_images 2",
        ),
        "csdiff.evaluation.report:as_text",
    ),
    "export": Command(
        "csdiff.cli.export:ExportConfig",
        "csdiff.cli.export:export",
        "an adapter of a training run to a folder of its own, a pipeline, or the hub",
        USE,
        (
            "csdiff export runs/mine --checkpoint best --output my-adapter",
            "csdiff export runs/mine --format prior --dtype fp16 --output my-prior",
        ),
        positional="source",
    ),
    "app": Command(
        "csdiff.app.config:AppConfig",
        "csdiff.app:serve",
        "a page in the browser: images, blends, a look inside adapters and stores",
        USE,
        ("csdiff app", "csdiff app --adapter runs/mine --port 8000"),
        answers=False,
    ),
    "info": Command(
        "csdiff.cli.info:InfoConfig",
        "csdiff.cli.info:inspect_path",
        "what is in an adapter, store, training run, pipeline or encoder folder",
        LOOK,
        ("csdiff info runs/mine", "csdiff info my-store --check", "csdiff info assets/decoder --json"),
        "csdiff.cli.info:as_text",
        "path",
    ),
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `csdiff`."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    name = arguments[0] if arguments else ""
    if name in COMMANDS:
        sys.exit(run_command(name, arguments[1:], prog=f"csdiff {name}"))
    if not arguments:
        print(overview(), file=sys.stderr)
        sys.exit(BAD_INPUT)
    sys.exit(run(lambda: _general(arguments), "csdiff"))


def run_command(name: str, arguments: Sequence[str], prog: str) -> int:
    """Parse the options of one command and call its function; returns the exit code."""
    command = COMMANDS[name]

    def action() -> None:
        from csdiff.cli.parser import parse_command

        config, as_json = parse_command(resolve_name(command.config), arguments, prog, command)
        if not sys.stderr.isatty():
            # No progress bars where nobody watches: they fill log files with control characters.
            if hasattr(config, "progress"):
                config.progress = False
            for variable in ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS"):
                os.environ.setdefault(variable, "1")
        # stdout is for results: whatever is said on the way is progress.
        with redirect_stdout(sys.stderr):
            result = resolve_name(command.function)(config)
        if os.environ.get("RANK", "0") == "0":
            _write(result, as_json, resolve_name(command.show) if command.show else places)

    return run(action, prog)


def _write(result: object, as_json: bool, show: Callable[[object], str]) -> None:
    text = json.dumps(plain(result), indent=2, ensure_ascii=False, allow_nan=False) if as_json else show(result)
    if text:
        print(text, flush=True)
    if problems := result.get("problems") if isinstance(result, Mapping) else getattr(result, "problems", None):
        raise CSDiffError(f"{len(problems)} problem{'s' * (len(problems) > 1)} found, listed above.")


def places(result: object) -> str:
    """The text of a result: the paths that it is a list of, else the folder and the address it names, a line each."""
    if isinstance(result, list):
        return "\n".join(map(str, result))
    found = (getattr(result, name, None) for name in ("adapter_dir", "output", "url"))
    return "\n".join(str(place) for place in found if place)


def _general(arguments: Sequence[str]) -> None:
    """What is asked of `csdiff` itself."""
    option, _, value = arguments[0].replace("-", "_").partition("=")
    if option in ("_h", "__help", "help"):
        print(overview())
    elif option in ("__version", "version"):
        print(csdiff.__version__)
    elif option == "__print_completion":
        from csdiff.cli.parser import completion_script

        print(completion_script(value or next(iter(arguments[1:]), "")))
    else:
        hint = did_you_mean(arguments[0], COMMANDS) or "; `csdiff --help` tells more."
        raise CSDiffError(f"Expected a command ({', '.join(COMMANDS)}), found {arguments[0]!r}{hint}")


def overview() -> str:
    """The text of `csdiff --help`."""
    lines = ["usage: csdiff COMMAND [OPTIONS]", "", "CLIP text embeddings into the image-embedding distribution."]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [f"  {name:<10}{c.help}" for name, c in COMMANDS.items() if c.group == group]
    lines += ["", "Examples:", *(f"  {command.examples[0]}" for command in COMMANDS.values())]
    return "\n".join(lines) + _CLOSING


_CLOSING = """

Options:
  --help                    this text; `csdiff COMMAND --help` lists the options of a command
  --version                 the version alone
  --print_completion SHELL  a script that completes commands and options (bash, zsh, tcsh)

Results go to stdout (as JSON with --json), everything else to stderr.
Exit codes: 0 done, 2 bad input, 130 Ctrl-C, 143 SIGTERM, 1 a defect."""


def run(action: Callable[[], object], prog: str) -> int:
    """Run `action` and return the exit code.

    0: done. 2: bad input, one sentence on stderr. 130: Ctrl-C, 143: SIGTERM, one line on stderr; what was being
    written is removed. 1: a defect, with its traceback.
    """
    try:
        with suppress(ValueError):  # Signals belong to the main thread; elsewhere they keep their meaning.
            signal.signal(signal.SIGTERM, _terminate)
        action()
    except BrokenPipeError:
        # The reader of our output has gone; stop without a second complaint at interpreter exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DEFECT
    except (CSDiffError, OSError) as error:
        # Of the operating system: a file that is missing, damaged or not ours to write.
        return _complain(prog, error, BAD_INPUT)
    except _Terminated:
        return _complain(prog, "terminated", TERMINATED)
    except KeyboardInterrupt:
        return _complain(prog, "interrupted", INTERRUPTED)
    except Exception:
        traceback.print_exc()
        return _complain(prog, "stopped by a defect; please report it with the lines above", DEFECT)
    return DONE


class _Terminated(BaseException):
    """SIGTERM, as an exception: files that are being written are cleaned up on the way out."""


def _terminate(number, frame):
    raise _Terminated


def _complain(prog: str, message: object, code: int) -> int:
    # One line above whatever a progress bar has left on the terminal.
    start = "\n" if code in (INTERRUPTED, TERMINATED) and sys.stderr.isatty() else ""
    print(f"{start}{prog}: {' '.join(str(message).split())}", file=sys.stderr)
    return code
