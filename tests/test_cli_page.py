"""The commands of docs/cli.md run as they stand."""

import re
import shlex

import pytest

from csdiff import cli
from csdiff.options import option_types

SLOW = ("train", "embed", "evaluate", "app")


@pytest.fixture
def page(root):
    return (root / "docs" / "cli.md").read_text(encoding="utf-8")


@pytest.fixture
def checkout(root, tmp_path, monkeypatch):
    """A folder that looks like the checkout, so that what commands write stays out of it."""
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(root / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_blocks_run(page, checkout, capsys):
    blocks = re.findall(r"```(bash|python)\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) > 6
    for language, code in blocks:
        if language == "python":
            exec(compile(code, "docs/cli.md", "exec"), {})
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            file = words[words.index(">") + 1] if ">" in words else None
            assert words[1] not in SLOW
            with pytest.raises(SystemExit) as stop:
                cli.main(words[1 : words.index(">")] if file else words[1:])
            captured = capsys.readouterr()
            assert stop.value.code == 0, f"{line}\n{captured.err}"
            assert captured.out
            if file:
                (checkout / file).write_text(captured.out)


def test_every_command_stands_there(page):
    for name in cli.COMMANDS:
        assert f"`csdiff {name}`" in page


def test_options_named_there_exist(page):
    known = {"help", "version", "print_completion", "print_config", "config", "json", "no_grid", "num-images", "name"}
    known |= {"module"}
    for command in cli.COMMANDS.values():
        known |= set(option_types(cli.import_object(command.config)))
    found = set(re.findall(r"--([a-zA-Z][\w.-]*)", page))
    assert found <= known
