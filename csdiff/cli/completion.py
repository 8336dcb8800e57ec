"""Completion scripts for shells: made once from the options, so that a press of Tab starts no Python."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from dataclasses import dataclass

from csdiff.adapters.registry import PLACES as ADAPTER_NAMES
from csdiff.cli.commands import COMMANDS, import_object
from csdiff.cli.entry import SHELLS
from csdiff.cli.options import build_parser, option_types
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import PRESETS

# Names that options take besides folders; the registries themselves need torch, a test compares them.
OBJECTIVE_NAMES = (
    "cs_aligner", "cs", "info_nce", "mse", "eclipse", "mmd", "sinkhorn", "coral", "kl", "uniform_align", "diffusion",
)  # fmt: skip
NAMES = {
    ("train", "adapter"): ADAPTER_NAMES,
    ("train", "image_adapter"): ADAPTER_NAMES,
    ("train", "objective"): OBJECTIVE_NAMES,
    ("train", "resume"): ("auto", "never"),
    ("generate", "adapter"): ("none",),
    ("export", "checkpoint"): ("best", "latest"),
    ("export", "decoder"): ("tiny", "kandinsky22"),
    ("generate", "decoder"): tuple(PRESETS),
    ("generate", "dtype"): ("auto", "float32", "float16", "bfloat16"),
    ("evaluate", "decoder"): tuple(PRESETS),
    ("evaluate", "extractors"): ("efficientnet-lite0", "inception", "tiny-clip"),
    ("evaluate", "clip"): ("tiny-clip",),
    ("embed", "text_encoder"): ("tiny-clip",),
    ("embed", "image_encoder"): ("tiny-clip",),
}
# Of these, names are all there is.
CLOSED = {("train", "adapter"), ("train", "image_adapter"), ("train", "objective"), ("generate", "dtype")}
TEXTS = {"prompt", "negative_prompt", "device"}


@dataclass(frozen=True)
class Option:
    """An option as completion sees it.

    Attributes:
        name: Without dashes.
        help: Its first sentence.
        values: What to offer.
        paths: Whether files and folders are offered too.
        flag: Whether it takes no value.
    """

    name: str
    help: str
    values: tuple[str, ...] = ()
    paths: bool = False
    flag: bool = False


def script(shell: str) -> str:
    """The completion script of a shell.

    Raises:
        CSDiffError: No such shell.
    """
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    if shell not in makers:
        raise CSDiffError(f"--print_completion: expected one of {', '.join(SHELLS)}, found {shell!r}.")
    return makers[shell]()


def options(command: str) -> Iterator[Option]:
    """The options of a subcommand."""
    config_class = import_object(COMMANDS[command].config)
    parser = build_parser(config_class, command)
    texts = {action.dest: str(action.help or "") for action in parser._actions}
    yield Option("help", "Show the options.", flag=True)
    yield Option("config", _sentence(texts["config"]), paths=True)
    known = option_types(config_class)
    if "json" not in known:
        yield Option("json", _sentence(texts["json"]), flag=True)
    for name, annotation in known.items():
        if dataclasses.is_dataclass(annotation):
            continue
        values = NAMES.get((command, name)) or _values(annotation)
        paths = "str" in _type_names(annotation) and name not in TEXTS and (command, name) not in CLOSED
        yield Option(name, _sentence(texts.get(name, "")), values, paths)


def _values(annotation: object) -> tuple[str, ...]:
    if annotation is bool:
        return ("true", "false")
    if typing.get_origin(annotation) is typing.Literal:
        return tuple(map(str, typing.get_args(annotation)))
    return tuple(value for part in typing.get_args(annotation) for value in _values(part))


def _type_names(annotation: object) -> set[str]:
    return {getattr(annotation, "__name__", "")} | {
        getattr(part, "__name__", "") for part in typing.get_args(annotation)
    }


def _sentence(text: str) -> str:
    text = " ".join(text.split()).split(". ")[0].split("; ")[0].split(" (type:")[0].rstrip(".")
    return text if len(text) <= 72 else text[:71].rsplit(" ", 1)[0] + " ..."


def _bash() -> str:
    cases, names = [], []
    for command in COMMANDS:
        own = list(options(command))
        names.append(f'        {command}) words="{" ".join("--" + option.name for option in own)}" ;;')
        for option in own:
            if option.values:
                cases.append(f'        {command}.--{option.name}) words="{" ".join(option.values)}" ;;')
            elif not option.flag:
                cases.append(f"        {command}.--{option.name}) return ;;")
    first = " ".join([*COMMANDS, "--help", "--version", "--print_completion"])
    return f"""# bash completion for csdiff, made by `csdiff --print_completion bash`
_csdiff() {{
    local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    COMPREPLY=()
    if [[ $COMP_CWORD -eq 1 ]]; then
        COMPREPLY=($(compgen -W "{first}" -- "$current"))
        return
    fi
    if [[ ${{COMP_WORDS[1]}} == --print_completion ]]; then
        COMPREPLY=($(compgen -W "{" ".join(SHELLS)}" -- "$current"))
        return
    fi
    # bash cuts --name=value into three words
    if [[ $current == "=" ]]; then
        current=""
    elif [[ $before == "=" ]]; then
        before="${{COMP_WORDS[COMP_CWORD-2]}}"
    fi
    # --num-images is --num_images
    [[ $before == --* ]] && before="--$(printf %s "${{before#--}}" | tr - _)"
    [[ $current == --* ]] && current="--$(printf %s "${{current#--}}" | tr - _)"
    case "${{COMP_WORDS[1]}}.$before" in
{chr(10).join(cases)}
    esac
    if [[ -z $words && $current == -* ]]; then
        case "${{COMP_WORDS[1]}}" in
{chr(10).join("    " + name for name in names)}
        esac
    fi
    # what is left empty is completed as a file by bash itself
    [[ -n $words ]] && COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _csdiff csdiff
"""


def _zsh() -> str:
    commands = "\n".join(f"        {_quoted(f'{name}:{command.help}')}" for name, command in COMMANDS.items())
    cases = []
    for name, command in COMMANDS.items():
        specs = [_zsh_spec(option) for option in options(name)]
        specs.append(_quoted("1:path:_files") if command.positional else _quoted("*:: :"))
        cases.append(
            f"        {name})\n            _arguments \\\n" + " \\\n".join(f"                {s}" for s in specs)
        )
        cases.append("            ;;")
    return f"""#compdef csdiff
# zsh completion for csdiff, made by `csdiff --print_completion zsh`
_csdiff() {{
    local -a commands
    commands=(
{commands}
    )
    if (( CURRENT == 2 )); then
        _describe -t commands command commands
        compadd -- --help --version --print_completion
        return
    fi
    local command=$words[2]
    if [[ $command == --print_completion ]]; then
        compadd -- {" ".join(SHELLS)}
        return
    fi
    shift words
    (( CURRENT-- ))
    case $command in
{chr(10).join(cases)}
    esac
}}
if [[ $funcstack[1] == _csdiff ]]; then
    _csdiff "$@"
else
    compdef _csdiff csdiff
fi
"""


def _zsh_spec(option: Option) -> str:
    text = option.help.replace("[", "(").replace("]", ")").replace(":", "\\:")
    if option.flag:
        return _quoted(f"--{option.name}[{text}]")
    if option.values and option.paths:
        action = f"{{ compadd -- {' '.join(option.values)}; _files }}"
    else:
        action = f"({' '.join(option.values)})" if option.values else "_files" if option.paths else " "
    return _quoted(f"*--{option.name}=[{text}]:{option.name.replace('.', ' ')}:{action}")


def _fish() -> str:
    lines = ["# fish completion for csdiff, made by `csdiff --print_completion fish`", "complete -c csdiff -f"]
    for name, command in COMMANDS.items():
        lines.append(f"complete -c csdiff -n __fish_use_subcommand -a {name} -d {_fish_quoted(command.help)}")
    for option in ("help", "version"):
        lines.append(f"complete -c csdiff -n __fish_use_subcommand -l {option}")
    lines.append(f"complete -c csdiff -n __fish_use_subcommand -l print_completion -x -a '{' '.join(SHELLS)}'")
    for name, command in COMMANDS.items():
        seen = f"complete -c csdiff -n '__fish_seen_subcommand_from {name}'"
        if command.positional:
            lines.append(f"{seen} -F")
        for option in options(name):
            value = "" if option.flag else " -r -F" if option.paths else " -x"
            offered = f" -a '{' '.join(option.values)}'" if option.values else ""
            lines.append(f"{seen} -l {option.name}{value}{offered} -d {_fish_quoted(option.help)}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
