"""The command line: options from one definition, one-sentence errors, help without heavy imports."""

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml

from csdiff import cli
from csdiff.cli.options import parse_command
from csdiff.cli.results import as_json
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


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (
            b"guidance: 1\nprompt:\n  - x\n num_images: 2\n",
            "YAML in line 4 of {}, .* error: did not find expected key.$",
        ),
        (b"guidance: [1\n", "YAML in line 2 of {}, found a syntax error: did not find expected"),
        (b"a: b: c\n", "YAML in line 1 of {}, found a syntax error: mapping values are not allowed"),
        (b"- 1\n- 2\n", "options .name: value. in {}, found '- 1 - 2'"),
        (b"", "options .name: value. in {}, found an empty file"),
        (b"\xff\xfe", "YAML in {}, found a file that is not UTF-8"),
    ],
)
def test_broken_yaml_is_one_sentence_with_file_and_line(tmp_path, content, words):
    path = tmp_path / "options.yaml"
    path.write_bytes(content)
    with pytest.raises(CSDiffError, match=words.format(path)) as error:
        parse("--config", str(path))
    assert "\n" not in str(error.value)


def test_help_says_what_an_option_takes_and_its_default(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run_command("export", ["--help"], "csdiff export")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--dtype float32|float16|bfloat16|fp32|fp16|bf16 Number format" in text
    assert "--overwrite true|false Replace an adapter or pipeline folder that is there; never" in text
    assert (
        "--decoder DECODER Kandinsky decoder of a pipeline: preset, folder or hub repository. (default: tiny)" in text
    )
    assert text.count("Takes an adapter out of a training run") == 1


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
    # what the parser's library would add for itself
    assert not [
        word
        for word in ("(type: ", "Literal[", "default: null", "+ [", "Path to a configuration file")
        if word in text
    ]


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


def test_a_defect_has_a_traceback_and_exit_code_1(capsys):
    def action() -> None:
        raise RuntimeError("two plus two is five")

    assert cli.run(action, "test") == 1
    assert "Traceback" in capsys.readouterr().err


def test_overview_says_what_a_newcomer_asks(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    text = capsys.readouterr().out
    for words in ("Make an adapter:", "Examples:", "--print_completion", "Exit codes", *cli.COMMANDS):
        assert words in text
    assert max(map(len, text.splitlines())) < 120
    for command in cli.COMMANDS.values():
        assert sum(command.help in line for line in text.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [(["trian"], "'train'"), (["genrate", "--prompt", "x"], "'generate'"), (["--verson"], "'--version'")],
)
def test_a_near_command_is_suggested(capsys, arguments, suggestion):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert f"did you mean {suggestion}?" in captured.err
    assert captured.out == ""


def test_examples_of_the_help_are_accepted():
    for name, command in cli.COMMANDS.items():
        for example in command.examples:
            words = shlex.split(example)
            assert words[:2] == ["csdiff", name]
            config_class = cli.import_object(command.config)
            known = {"--config", "--json", *(f"--{option}" for option in cli.option_types(config_class))}
            assert {word.split("=")[0] for word in words if word.startswith("--")} <= known, example


@dataclass
class Switches:
    """Switches and a positional option."""

    path: str = ""
    grid: bool = True
    check: bool = False


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["a b", "--check"], Switches("a b", check=True)),
        (["--check", "a"], Switches("a", check=True)),
        (["--check", "false", "--no-grid", "--path", "3"], Switches("3", grid=False)),
        (["--grid", "true", "x: y"], Switches("x: y")),
    ],
)
def test_switches_and_the_positional_option(arguments, expected):
    assert parse_command(Switches, arguments, "test", "path") == (expected, False)
    assert parse_command(Switches, [*arguments, "--json"], "test", "path") == (expected, True)


def test_a_second_positional_is_refused():
    with pytest.raises(CSDiffError, match="found 'b'"):
        parse_command(Switches, ["a", "b"], "test", "path")


def test_results_as_json():
    result = {"inner": Inner(3), "path": Path("a/b"), "gap": float("nan"), "norms": np.arange(2), 5: (True, None)}
    assert json.loads(as_json(result)) == {
        "inner": {"width": 3}, "path": "a/b", "gap": None, "norms": [0, 1], "5": [True, None],
    }  # fmt: skip


def test_problems_in_a_result_make_exit_code_2(tmp_path, capsys):
    (tmp_path / "csdiff.json").write_text('{"format": 1, "kind": "adapter"}')
    assert cli.run_command("info", [str(tmp_path), "--json"], "csdiff info") == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["kind"] == "adapter"
    assert captured.err.startswith("csdiff info: ")
    assert len(captured.err.splitlines()) == 1


def test_names_that_completion_offers_are_those_there_are():
    from csdiff.cli.completion import NAMES, OBJECTIVE_NAMES
    from csdiff.losses import OBJECTIVES

    assert set(OBJECTIVE_NAMES) == {*OBJECTIVES, "diffusion"}
    for command, name in NAMES:
        assert name in cli.option_types(cli.import_object(cli.COMMANDS[command].config)), (command, name)


def complete_in_bash(script: Path, *words: str) -> set[str]:
    """What bash offers for the last of `words`."""
    code = 'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _csdiff; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", code, "bash", str(script), *words], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return set(done.stdout.split())


def test_bash_completes(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print_completion", "bash"])
    assert stop.value.code == 0
    script = tmp_path / "csdiff.bash"
    script.write_text(capsys.readouterr().out)
    assert complete_in_bash(script, "csdiff", "") >= set(cli.COMMANDS)
    assert complete_in_bash(script, "csdiff", "tr") == {"train"}
    assert complete_in_bash(script, "csdiff", "train", "--data.unp") == {
        "--data.unpaired_text", "--data.unpaired_image", "--data.unpaired_batch_size",
    }  # fmt: skip
    assert complete_in_bash(script, "csdiff", "generate", "--num-im") == {"--num_images"}
    assert complete_in_bash(script, "csdiff", "train", "--objective", "cs") == {"cs", "cs_aligner"}
    assert complete_in_bash(script, "csdiff", "train", "--mixed_precision", "=", "b") == {"bf16"}
    assert complete_in_bash(script, "csdiff", "generate", "--grid", "") == {"true", "false"}
    assert complete_in_bash(script, "csdiff", "generate", "--output", "") == set()


@pytest.mark.parametrize(("shell", "start"), [("zsh", "#compdef csdiff\n"), ("fish", "# fish completion")])
def test_other_shells_are_told_every_option(capsys, shell, start):
    with pytest.raises(SystemExit):
        cli.main([f"--print-completion={shell}"])
    script = capsys.readouterr().out
    assert script.startswith(start)
    assert all(option in script for option in ("data.unpaired_text", "num_images", "print_completion"))


def test_unknown_shell(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print_completion", "tcsh"])
    assert stop.value.code == 2
    assert "bash, zsh, fish" in capsys.readouterr().err
