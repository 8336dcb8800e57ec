"""Adapters for a store of 64 pairs, one that fits it and one that does not, and a folder of captioned pictures."""

import json
import shutil
import warnings

import pytest
from tiny import make_pictures

from csdiff.adapters import LinearAdapter
from csdiff.cli import run_command
from csdiff.embeddings import EmbeddingStore, load_image_encoder, load_text_encoder


@pytest.fixture
def run(capsys):
    """`csdiff evaluate` as users call it: the exit code and what it said on stderr; stdout is in `run.table`."""

    def command(**options):
        words = []
        for name, value in options.items():
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
        code = run_command("evaluate", words, "csdiff evaluate")
        command.table, said = capsys.readouterr()
        return code, said.strip()

    return command


@pytest.fixture
def scores(run, tmp_path):
    """What `csdiff evaluate` writes to --json."""

    def command(**options):
        assert run(**options, json=tmp_path / "scores.json")[0] == 0
        return json.loads((tmp_path / "scores.json").read_text())

    return command


@pytest.fixture
def refused(run):
    """`refused(words, **options)`: options that end the command with exit code 2 and these words."""

    def command(expected, **options):
        code, said = run(**options)
        assert (code, expected in said) == (2, True), said
        return said

    return command


@pytest.fixture
def changed(tmp_path):
    """A copy of an adapter with other metadata."""

    def make(adapter, change):
        copy = shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True)
        metadata = json.loads((copy / "csdiff.json").read_text())
        change(metadata)
        (copy / "csdiff.json").write_text(json.dumps(metadata))
        return copy

    return make


@pytest.fixture(scope="session")
def adapters(plain_store, tmp_path_factory):
    """Folders of adapters `good` (a mean shift) and `bad` (the same, moved along one direction)."""
    folder = tmp_path_factory.mktemp("adapters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = LinearAdapter.fit(EmbeddingStore.open(plain_store), "mean_shift")
    good.save_pretrained(folder / "good")
    good.linear.bias.data[0] += 3
    good.save_pretrained(folder / "bad")
    return {name: str(folder / name) for name in ("good", "bad")}


@pytest.fixture(scope="session")
def captioned_pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("pictures"), 12, ["apple number {}", "a red thing {}"])


@pytest.fixture(scope="session")
def picture_adapter(tiny_clip, tmp_path_factory):
    """An adapter of the tiny CLIP that leaves embeddings as they are."""
    adapter = LinearAdapter(embedding_dim=16, method="mean_shift")
    text, image = load_text_encoder(str(tiny_clip)), load_image_encoder(str(tiny_clip))
    adapter.metadata = {"text_encoder": text.describe(), "image_encoder": image.describe()}
    folder = tmp_path_factory.mktemp("adapters") / "identity"
    adapter.save_pretrained(folder)
    return folder
