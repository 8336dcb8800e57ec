"""The command line: options from one definition, one-sentence errors, help without heavy imports."""

import json
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import yaml

from csdiff import cli
from csdiff.errors import CSDiffError


@dataclass
class Inner:
    """Nested."""

    width: int = 4
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
    inner: Inner = field(default_factory=Inner)
    extra: dict[str, object] = field(default_factory=dict)
    """More."""


def parse(*arguments: str) -> Options:
    return cli.parse(Options, arguments, "test")


def test_defaults_and_nested_values():
    assert parse() == Options()
    assert parse("--inner.width", "7", "--guidance", "2.5").inner == Inner(7)


def test_dashes_and_underscores_are_one_spelling():
    assert parse("--num-images", "3").num_images == parse("--num_images=3").num_images == 3


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


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_image", "3", "--seeed", "1"], ["num_image"]),
        (["--promt", "x"], ["promt", "prompt"]),
        (["--num_images", "many"], ["int", "num_images", "many"]),
        (["--guidance", "x"], ["float or null", "guidance", "x"]),
        (["--inner.width", "1.5"], ["int", "inner.width", "1.5"]),
        (["--prompt"], ["prompt", "end of the command"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_bad_options_are_one_sentence(arguments, words):
    with pytest.raises(CSDiffError) as error:
        parse(*arguments)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("content", ["unknown_key: 1", "inner: {unknown_key: 1}"])
def test_unknown_config_key_is_named(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content)
    with pytest.raises(CSDiffError, match="unknown_key"):
        parse("--config", str(path))


def run_root_script(root, script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(root / script), *arguments], capture_output=True, text=True, cwd=root)


@pytest.mark.parametrize("script", ["generate.py", "train_adapter.py"])
def test_bad_input_exits_with_2_and_no_traceback(root, script):
    result = run_root_script(root, script, "--no_such_option", "1")
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith(f"{script}: ")


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
    for name in cli.option_types(cli.import_object(cli.COMMANDS[command].config)):
        assert f"--{name}" in text


def test_overview_lists_the_commands(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["paint"])
    assert stop.value.code == 2
    assert "paint" in capsys.readouterr().err


def test_a_damaged_file_is_one_line(capsys):
    def action() -> None:
        raise OSError("unet is damaged:\n  download it again")

    assert cli.run(action, "test") == 2
    assert capsys.readouterr().err == "test: unet is damaged: download it again\n"
