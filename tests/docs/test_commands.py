"""The commands and the Python of the pages: every option is one of ours, and what is quick runs as it stands."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from pages import code_blocks, pages

from csdiff import cli
from csdiff.options import option_types

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page.relative_to(ROOT).as_posix() for page in pages(ROOT)]
SCRIPTS = {"generate.py": "generate", "train_adapter.py": "train"}
SLOW = ("train", "embed", "evaluate", "app")
# What stands there once the quick part of a page was followed.
MADE = {
    "README.md": ["apple.png", "outputs/a-red-apple-3d-style-0.png", "outputs/a-red-apple-3d-style-0.json"],
    "docs/cli.md": ["my-adapter/config.json", "my-prior/model_index.json", "csdiff.bash"],
    "docs/quickstart.md": [
        "apple.png",
        "pictures/a-red-apple-3d-style-0.png",
        "pictures/a-smiling-cat-twemoji-style-0.json",
        "pictures/grid.png",
        "pictures/without-adapter/a-red-apple-3d-style-0.png",
    ],
}


def commands(language: str, code: str) -> list[list[str]]:
    """Those of csdiff in a block, as `csdiff`, the command and its options."""
    found = []
    for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            if word == "csdiff" or Path(word).name in SCRIPTS:
                found.append(
                    ["csdiff", *([SCRIPTS[Path(word).name]] if word != "csdiff" else []), *words[index + 1 :]]
                )
                break
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_option_is_one_of_ours(name: str, root: Path):
    for block in code_blocks(root / name):
        for _, command, *options in commands(*block):
            if not command.startswith("-"):
                known = {"config", "json", "no_grid", "print_config"}
                known |= set(option_types(cli.import_object(cli.COMMANDS[command].config)))
                assert {word[2:].split("=")[0] for word in options if word.startswith("--")} <= known, options


@pytest.mark.parametrize("name", MADE)
def test_what_is_quick_runs(name: str, root: Path, checkout: Path, capsys: pytest.CaptureFixture):
    for language, code in code_blocks(root / name):
        if language == "python":
            exec(compile(code.replace("num_inference_steps=25", "num_inference_steps=2"), name, "exec"), {})
        for words in commands(language, code):
            trained = words[1] in ("info", "generate") and {"my-adapter", "runs/mine"} & set(words)
            if words[1] in SLOW or trained:
                continue
            file = words[words.index(">") + 1] if ">" in words else None
            words = words[1 : words.index(">")] if file else words[1:]
            if words[0] == "generate" and "--print_config" not in words:
                words += ["--steps", "2", "--progress", "false"]
            with pytest.raises(SystemExit) as stop:
                cli.main(words)
            captured = capsys.readouterr()
            assert stop.value.code == 0, f"{words}\n{captured.err}"
            assert captured.out
            if file:
                Path(file).write_text(captured.out)
    assert [file for file in MADE[name] if not (checkout / file).is_file()] == []


def test_the_script_of_the_readme_draws_with_its_defaults(checkout: Path):
    command = [sys.executable, "generate.py", "--prompt", "a red apple, 3d style", "--output", "outputs"]
    subprocess.run(command, check=True)
    assert (checkout / "outputs/a-red-apple-3d-style-0.png").is_file()


def test_the_page_of_the_command_line_names_every_command_and_no_unknown_option(root: Path):
    page = (root / "docs/cli.md").read_text("utf-8")
    known = {"help", "version", "print_completion", "print_config", "config", "json", "no_grid", "num-images", "name"}
    known |= {"module"}
    for name, command in cli.COMMANDS.items():
        assert f"`csdiff {name}`" in page
        known |= set(option_types(cli.import_object(command.config)))
    assert set(re.findall(r"--([a-zA-Z][\w.-]*)", page)) <= known
