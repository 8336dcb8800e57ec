"""The Python of docs/store.md runs, and its comments are true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_page_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    [code] = re.findall(r"```python\n(.*?)```", (root / "docs/store.md").read_text(), flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    store = names["store"]
    assert (len(store), store.text_dim, store.image_dim, store.normalized) == (1000, 32, 48, False)
    assert names["batch"]["image_embeds"].shape == (128, 48)


def test_every_option_that_the_page_names_is_one(root: Path):
    from dataclasses import asdict

    from csdiff.embeddings import EmbedConfig

    named = set(re.findall(r"--(\w+)", (root / "docs/store.md").read_text())) - {"module", "config"}
    assert named <= asdict(EmbedConfig()).keys()
