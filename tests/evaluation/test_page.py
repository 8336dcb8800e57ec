"""The code of docs/evaluation.md runs, and the keys it names are there."""

import re


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
        key = key.replace(".*", "").replace(".WIDTH", "")
        value = scores["text_to_image"] if key.startswith("r@") else scores
        for part in key.split("."):
            value = value[part]
