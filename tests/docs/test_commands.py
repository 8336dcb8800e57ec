"""The commands and the Python of the pages: every option is one of ours, and what is quick runs as it stands."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from pkgutil import resolve_name

import pytest
from pages import PAGES, code_blocks

from csdiff import cli
from csdiff.cli.parser import parse_command
from csdiff.options import option_types

SCRIPTS = {"generate.py": "generate", "train_adapter.py": "train"}
SLOW = ("train", "embed", "evaluate", "app")
# Folders that the code of a page makes.
WRITTEN = re.compile(r"""(?:--output(?:_dir)?[ =]|(?:save_pretrained|write_store|Path)\(\s*["'])([\w./-]+)""")
# What stands there once the quick part of a page was followed.
MADE = {
    "README.md": ["apple.png", "outputs/a-red-apple-3d-style-0.png", "outputs/a-red-apple-3d-style-0.json"],
    "docs/cli.md": ["my-export/config.json", "my-prior/model_index.json", "csdiff.bash"],
    "docs/quickstart.md": [
        "apple.png",
        "pictures/a-red-apple-3d-style-0.png",
        "pictures/a-smiling-cat-twemoji-style-0.json",
        "pictures/grid.png",
        "pictures/without-adapter/a-red-apple-3d-style-0.png",
    ],
}


def commands(language, code):
    """Those of csdiff in a block, as `csdiff`, the command and its options."""
    found = []
    for line in code.replace("\\\n", " ").splitlines() if language == "bash" else ():
        words = shlex.split(line, comments=True)
        for index, word in enumerate(words):
            script = SCRIPTS.get(Path(word).name)
            if word == "csdiff" or script:
                found.append(["csdiff", *([script] if script else []), *words[index + 1 :]])
                break
    return found


@pytest.mark.parametrize("name", PAGES)
def test_every_command_is_accepted(name, root, checkout):
    for block in code_blocks(root / name):
        for _, command, *options in commands(*block):
            if not command.startswith("-"):
                options = [word for word in options if word != "--print_config"]
                known = cli.COMMANDS[command]
                parse_command(resolve_name(known.config), options, command, known)


@pytest.mark.parametrize("name", MADE)
def test_what_is_quick_runs(name, root, checkout, capsys):
    for language, code in code_blocks(root / name):
        if language == "python":
            exec(compile(code.replace("num_inference_steps=25", "num_inference_steps=2"), name, "exec"), {})
        for words in commands(language, code):
            trained = words[1] in ("info", "generate") and {"my-first-adapter", "runs/mine"} & set(words)
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


def test_no_two_pages_write_into_one_folder(root):
    pages = {}
    for name in PAGES:
        for language, code in code_blocks(root / name):
            if language in ("bash", "python"):
                for folder in WRITTEN.findall(code):
                    pages.setdefault(folder, set()).add(name)
    assert {"my-first-adapter", "my-pictures", "my-mlp", "my-held-out"} <= set(pages)
    assert {folder: names for folder, names in pages.items() if len(names) > 1} == {}


def test_the_script_of_the_readme_draws_with_its_defaults(checkout):
    command = [sys.executable, "generate.py", "--prompt", "a red apple, 3d style", "--output", "outputs"]
    subprocess.run(command, check=True)
    assert (checkout / "outputs/a-red-apple-3d-style-0.png").is_file()


def test_the_page_of_training_leads_from_pictures_to_a_picture(root, checkout):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = [block for block in code_blocks(root / "docs/train.md") if block[0] in ("python", "bash")]
    assert [language for language, _ in found] == ["python", "bash", "bash", "bash", "bash"]
    for language, code in found:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        subprocess.run(command, check=True, env={**os.environ, "PATH": path}, timeout=300)
    lines = [json.loads(line) for line in (checkout / "my-adapter/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [60]
    assert list((checkout / "my-drawings").glob("*.png"))


def test_the_page_of_the_command_line_names_every_command(root):
    page = (root / "docs/cli.md").read_text("utf-8")
    assert [name for name in cli.COMMANDS if f"`csdiff {name}`" not in page] == []


@pytest.mark.parametrize("page", ["docs/cli.md", "docs/evaluation.md", "docs/store.md"])
def test_no_option_in_the_text_is_unknown(page, root):
    known = {"help", "version", "print_completion", "print_config", "config", "json", "no_grid", "num-images", "name"}
    known |= {"module"}
    for command in cli.COMMANDS.values():
        known |= set(option_types(resolve_name(command.config)))
    assert set(re.findall(r"--([a-zA-Z][\w.-]*)", (root / page).read_text("utf-8"))) <= known
