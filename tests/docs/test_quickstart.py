"""The quickstart as a newcomer follows it: the commands that draw and the Python run, the others are at least ours."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from pages import code_blocks

from csdiff import cli
from csdiff.options import option_types

PAGE = "docs/quickstart.md"


@pytest.fixture
def commands(root: Path) -> list[list[str]]:
    code = "".join(code for info, code in code_blocks(root / PAGE) if info == "bash")
    return [shlex.split(line) for line in code.splitlines()]


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_drawing_commands_draw(commands: list[list[str]], folder: Path):
    drawing = [words for words in commands if words[1] == "generate" and "my-adapter" not in words]
    assert len(drawing) == 2
    for words in drawing:
        assert cli.run_command("generate", [*words[2:], "--steps", "2", "--progress", "false"], "csdiff generate") == 0
    assert len(list((folder / "pictures").glob("*.png"))) == 3  # two pictures and the grid
    assert len(list((folder / "pictures").glob("*.json"))) == 2
    assert len(list((folder / "pictures/without-adapter").glob("*.png"))) == 1


def test_the_python_runs(root: Path, folder: Path):
    [code] = [code for info, code in code_blocks(root / PAGE) if info == "python"]
    exec(compile(code.replace("num_inference_steps=25", "num_inference_steps=2"), PAGE, "exec"), {})
    assert (folder / "apple.png").is_file()


def test_every_command_is_one_of_ours(commands: list[list[str]]):
    for words in commands:
        assert words[0] == "csdiff"
        command = cli.COMMANDS[words[1]]
        known = {"config", *option_types(cli.import_object(command.config))}
        named = {word[2:] for word in words if word.startswith("--")}
        assert named <= known, words
