"""The code of the adapters page runs, from top to bottom."""

import re


def test_code_on_the_page_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / "adapters.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    namespace: dict = {}
    for block in blocks:
        exec(block, namespace)
    assert (tmp_path / "my-adapter" / "README.md").exists()
