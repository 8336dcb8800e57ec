"""The command line: options from one definition, one-sentence errors, help without heavy imports."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import yaml

from csdiff import cli
from csdiff.cli.commands import Command
from csdiff.cli.parser import parse_command
from csdiff.errors import CSDiffError
from csdiff.files import plain
from csdiff.options import NonEmpty, PositiveInt, check_options, option_types
from csdiff.resources import assets_dir


@dataclass
class Inner:
    """Nested."""

    width: PositiveInt = 4
    """How wide."""


@dataclass
class Options:
    """Options for the tests."""

    prompt: list[str] = field(default_factory=list)
    """Texts."""
    num_images: int = 1
    """How many."""
    guidance: float | None = None
    """How strong."""
    name: NonEmpty = "x"
    """Whose."""
    bandwidths: list[PositiveInt] = field(default_factory=list)
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, object] = field(default_factory=dict)
    """More."""
    path: str = ""
    grid: bool = True
    check: bool = False


POSITIONAL = Command("", "", "", "", (), positional="path")


def parse(*arguments: str) -> Options:
    return cli.parse(Options, arguments, "test")


def sentence(*arguments: str) -> str:
    """The one that refuses these arguments."""
    with pytest.raises(CSDiffError) as error:
        parse_command(Options, arguments, "test", POSITIONAL)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def csdiff(capsys):
    """`csdiff ARGUMENTS` in this process: exit code, stdout and stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        return stop.value.code, *capsys.readouterr()

    return run


def test_defaults_and_nested_values():
    assert parse() == Options()
    assert parse("--inner.width", "7", "--guidance", "2.5").inner == Inner(7)


def test_dashes_and_underscores_are_one_spelling():
    assert parse("--num-images", "3").num_images == parse("--num_images=3").num_images == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [(["3", "4"], [3, 4]), (["3", "--bandwidths=4"], [3, 4]), (["[3, 4]"], [3, 4]), (["[]"], [])],
)
def test_lists_of_numbers(words, expected):
    assert parse("--bandwidths", *words, "--num_images", "2").bandwidths == expected


@pytest.mark.parametrize(
    "text", ["a: b", "[1, 2]", "yes", "3", '"quoted"', "null", "{x}", "# no", "ü☃", "🐟 fish", " "]
)
def test_prompts_are_text_whatever_they_look_like(text):
    assert parse("--prompt", text, f"--prompt={text}", "--prompt", "plain").prompt == [text, text, "plain"]


def test_yaml_then_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(yaml.safe_dump({"num_images": 5, "inner": {"width": 9}, "extra": {"depth": 2}, "prompt": ["x"]}))
    options = parse("--config", str(path), "--num_images", "6", "--extra.rate", "0.5")
    assert (options.num_images, options.inner.width, options.prompt) == (6, 9, ["x"])
    assert options.extra == {"depth": 2, "rate": 0.5}


BAD = {
    "unknown": (["--num_image", "3"], ["num_image", "num_images"]),
    "near": (["--promt", "x"], ["promt", "did you mean prompt?"]),
    "not a number": (["--num_images", "many"], ["whole number", "--num_images", "many"]),
    "union": (["--guidance", "x"], ["number or null", "--guidance", "x"]),
    "nested": (["--inner.width", "1.5"], ["whole number", "--inner.width", "1.5"]),
    "no value": (["--prompt"], ["--prompt"]),
    "loose word": (["a", "3"], ["3: expected", "--name value"]),
    "folder": (["--config", "/"], ["--config", "a folder"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_options_are_one_sentence(arguments, words):
    said = sentence(*arguments)
    assert [word for word in words if word not in said] == []


@pytest.mark.parametrize("changes", [{"inner": Inner(0)}, {"num_images": "x"}, {"guidance": "x"}, {"name": " "}])
def test_python_has_the_checks_of_the_command_line(changes):
    check_options(Options())
    (name,) = changes
    with pytest.raises(CSDiffError, match=f"--{name}"):
        check_options(Options(**changes))


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    return "\n".join(lines + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, levels)])


BROKEN = {
    "unknown key": ("unknown_key: 1", "unknown_key"),
    "unknown nested key": ("inner: {unknown_key: 1}", "unknown_key"),
    "indentation": ("guidance: 1\nprompt:\n  - x\n num_images: 2\n", "line 4"),
    "list": ("- 1\n- 2\n", "- 1"),
    "not text": (b"\xff\xfe", "UTF-8"),
    "alias bomb": (bomb(30), "aliases"),
}


@pytest.mark.parametrize(("content", "word"), BROKEN.values(), ids=BROKEN)
def test_broken_yaml_is_one_sentence(tmp_path, content, word):
    path = tmp_path / "options.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert word in sentence("--config", str(path))


@pytest.mark.parametrize("command", sorted(cli.COMMANDS))
def test_help_names_every_option_and_imports_no_model_library(command):
    code = (
        "import sys, json, io, contextlib\n"
        "from csdiff import cli\n"
        "text = io.StringIO()\n"
        "with contextlib.redirect_stdout(text):\n"
        f"    code = 0\n    try: cli.main([{command!r}, '--help'])\n    except SystemExit as stop: code = stop.code\n"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'accelerate', 'datasets') if m in sys.modules]\n"
        "print(json.dumps([code, heavy, text.getvalue()]))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    exit_code, heavy, text = json.loads(output)
    assert exit_code == 0
    assert heavy == []
    for name in option_types(resolve_name(cli.COMMANDS[command].config)):
        assert f"--{name}" in text
    code = ("type:", "Literal[", "PositiveInt", "default: )", "default: ,", "customizes")
    assert [word for word in code if word in " ".join(text.split())] == []
    name = cli.COMMANDS[command].positional
    assert name is None or f"left out: csdiff {command} {name.upper()}." in " ".join(text.split())
    assert (command == "app") == ("--json" not in text)


@pytest.mark.parametrize(
    ("error", "code", "last"),
    [
        (OSError("unet is damaged:\n  download it again"), 2, "test: unet is damaged: download it again"),
        (RuntimeError("two plus two is five"), 1, "test: stopped by a defect; please report it with the lines above"),
    ],
)
def test_errors_by_their_exit_code(capsys, error, code, last):
    def action() -> None:
        raise error

    assert cli.run(action, "test") == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1] == last
    assert ("Traceback" in said) == (code == 1)


def test_overview_says_what_a_newcomer_asks(csdiff):
    code, text, _ = csdiff("--help")
    assert code == 0
    for words in ("Make an adapter:", "Examples:", "--print_completion", "Exit codes", *cli.COMMANDS):
        assert words in text
    assert max(map(len, text.splitlines())) < 120
    for command in cli.COMMANDS.values():
        assert sum(command.help in line for line in text.splitlines()) == 1


def test_examples_of_the_help_are_accepted(checkout):
    for name, command in cli.COMMANDS.items():
        for example in command.examples:
            program, called, *words = shlex.split(example)
            assert (program, called) == ("csdiff", name)
            parse_command(resolve_name(command.config), words, name, command)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a b", "--check"], Options(path="a b", check=True)),
        (["--check", "a"], Options(path="a", check=True)),
        (["--check", "false", "--no-grid", "--path", "3"], Options(path="3", grid=False)),
        (["--grid", "true", "x: y"], Options(path="x: y")),
    ],
)
def test_switches_and_the_positional_option(arguments, expected):
    assert parse_command(Options, arguments, "test", POSITIONAL) == (expected, False)
    assert parse_command(Options, [*arguments, "--json"], "test", POSITIONAL) == (expected, True)


def test_results_as_json():
    result = {"inner": Inner(3), "path": Path("a/b"), "gap": float("nan"), "norms": np.arange(2), 5: (True, None)}
    assert plain(result) == {"inner": {"width": 3}, "path": "a/b", "gap": None, "norms": [0, 1], "5": [True, None]}


def test_problems_in_a_result_make_exit_code_2(tmp_path, csdiff):
    (tmp_path / "csdiff.json").write_text('{"format": 1, "kind": "adapter"}')
    code, out, said = csdiff("info", str(tmp_path), "--json")
    assert (code, json.loads(out)["kind"]) == (2, "adapter")
    assert said.startswith("csdiff info: ")
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(csdiff, shell):
    code, script, _ = csdiff("--print_completion", shell)
    assert code == 0
    assert all(word in script for word in (*cli.COMMANDS, "data.unpaired_text", "num_images"))


def test_the_help_of_train_begins_with_what_most_need(csdiff):
    _, text, _ = csdiff("train", "--help")
    assert text.index("--data.train ") < text.index("--resume ") < text.index("--optimizer.beta1 ")
    assert text.count("  --data.train TRAIN") == 1


WRONG = {
    "paint": "paint",
    "trian": "did you mean train?",
    "genrate --prompt x": "did you mean generate?",
    "info": "csdiff info PATH",
    "app --json": "json: expected a known option",
    "train --config tiny.yaml --max_steps 0": "--max_steps: expected a whole number >0, found 0",
    "generate ridge": "did you mean --adapter ridge?",
    "evaluate data": "did you mean --data data?",
    "--print_completion korn": "korn",
}


@pytest.mark.parametrize("command", WRONG)
def test_what_cannot_be_meant(csdiff, monkeypatch, command):
    monkeypatch.chdir(assets_dir())
    code, out, said = csdiff(*command.split())
    assert (code, out) == (2, "")
    assert WRONG[command] in said


@pytest.mark.parametrize("script", ["generate.py", "train_adapter.py"])
def test_bad_input_exits_with_2_and_no_traceback(root, script):
    command = [sys.executable, str(root / script), "--no_such_option", "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"{script}: ")
