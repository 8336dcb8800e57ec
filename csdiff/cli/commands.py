"""The subcommands, one entry each; their modules are imported only when a command is called."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand. The paths are `package.module:name`.

    Attributes:
        config: Dataclass of its options: option names, defaults, help texts and checks come from there. Its module
            must import no model library, so that `--help` answers at once.
        function: Called with an instance of `config`. What it returns (a dataclass, dict, list, path or None) is the
            result; `--json`, which every command has, writes it to stdout as JSON.
        help: One line for `csdiff --help`.
        group: Heading in `csdiff --help` under which it stands.
        show: Makes the text for stdout from the result, without `--json`; by default nothing is written there.
            What the function itself prints goes to stderr.
    """

    config: str
    function: str
    help: str
    group: str
    show: str | None = None


MAKE, USE, LOOK = "Make an adapter", "Use it", "Look at what is there"

COMMANDS = {
    "embed": Command(
        "csdiff.embeddings.config:EmbedConfig",
        "csdiff.embeddings:embed",
        "captions and pictures to an embedding store",
        MAKE,
        "csdiff.cli.results:output_folder",
    ),
    "train": Command(
        "csdiff.training.config:TrainConfig",
        "csdiff.training:train",
        "an embedding store to an adapter",
        MAKE,
        "csdiff.cli.results:adapter_folder",
    ),
    "generate": Command(
        "csdiff.pipelines.config:GenerateConfig",
        "csdiff.pipelines:generate",
        "prompts to pictures",
        USE,
        "csdiff.cli.results:lines",
    ),
}


def import_object(path: str):
    """The object at `package.module:name`."""
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)
