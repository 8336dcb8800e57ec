"""The code that the README shows runs as it stands, from the root of the checkout."""

import re
import shlex
import subprocess
import sys

import pytest

from csdiff.resources import assets_dir

README = assets_dir().parent / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
PYTHON = [code for language, code in BLOCKS if language == "python"]
COMMANDS = [line for language, code in BLOCKS if language == "bash" for line in code.splitlines() if line.strip()]


@pytest.fixture
def checkout(tmp_path, monkeypatch, root):
    """A folder that looks like the checkout, so that what the code writes stays out of it."""
    for name in ("assets", "configs", "csdiff", "generate.py", "train_adapter.py"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_python_block_runs(code, checkout):
    exec(compile(code, "README.md", "exec"), {})
    assert ("save(" not in code) or list(checkout.glob("*.png"))


def test_generate_command_runs(checkout):
    (command,) = (line for line in COMMANDS if "generate.py" in line)
    words = shlex.split(command.replace(".venv/bin/python", sys.executable))
    subprocess.run(words, check=True, cwd=checkout)
    pictures = list((checkout / "outputs").glob("*.png"))
    assert len(pictures) == 1
    assert pictures[0].with_suffix(".json").is_file()


def test_options_of_other_commands_exist():
    """What is too slow or needs a hub is at least parsed: every option it names is one we have."""
    from csdiff import cli
    from csdiff.options import option_types

    for line in COMMANDS:
        words = shlex.split(line.split("#")[0])
        names = [word[2:].split("=")[0] for word in words if word.startswith("--")]
        if words[:1] == ["csdiff"]:
            command = words[1]
        elif "train_adapter.py" in words:
            command = "train"
        else:
            continue
        known = {"config", *option_types(cli.import_object(cli.COMMANDS[command].config))}
        assert set(names) <= known, line


def test_linked_files_exist(root):
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (root / link).exists()]
    assert not missing
