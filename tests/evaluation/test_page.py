"""The code of docs/evaluation.md runs, its commands are valid, and the keys it names are there."""

import re
import shlex

from csdiff.cli import COMMANDS, import_object, parse


def test_the_page_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (root / "docs/evaluation.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    scores = names["scores"]
    assert scores["centroid_gap"] < 0.1 < scores["baselines"]["raw_text"]["centroid_gap"]
    table = page[page.index("| key in the JSON") : page.index("The same keys stand under")]
    named = [key for line in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    for key in named:
        parts = key.replace(".*", "").replace(".WIDTH", "").split(".")
        if parts[0].startswith("r@"):
            parts = ["text_to_image", *parts]
        value = scores
        for part in parts:
            value = value[part]


def test_every_command_of_the_page_is_valid(root):
    page = (root / "docs/evaluation.md").read_text()
    lines = [line for block in re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL) for line in block.splitlines()]
    assert len(lines) == 10
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        parse(import_object(COMMANDS[command].config), arguments, command)
    options = import_object(COMMANDS["evaluate"].config).__dataclass_fields__
    assert set(re.findall(r"--(\w+)", page)) <= {*options, "source"}
