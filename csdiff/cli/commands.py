"""The subcommands, one entry each; their modules are imported only when a command is called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand. The paths are `package.module:name`.

    Attributes:
        config: Dataclass of its options, in a module that imports no model library: `--help` answers at once.
        function: Called with an instance of `config`; what it prints goes to stderr. What it returns (a dataclass,
            dict, list or None) is the result, which `--json` writes to stdout; `problems` in it make the exit code 2.
        help: One line for `csdiff --help`.
        group: Heading in `csdiff --help` under which it stands.
        examples: Command lines for the help.
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


def import_object(path: str):
    """The object at `package.module:name`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
