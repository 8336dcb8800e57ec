"""Look inside: adapters and stores give facts, a table and three plots; what is missing is said."""

import shutil

import pyarrow.parquet as pq
import pytest
import torch

from csdiff.adapters import build_adapter
from csdiff.app.inspection import Inspector, metrics_table, plain_markdown
from csdiff.app.work import Line
from csdiff.errors import CSDiffError
from csdiff.resources import assets_dir

FIGURES = {"gap", "projection", "similarities", "retrieval"}


def ignore(message):
    pass


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "tiny"
    build_adapter("mlp", embedding_dim=16, text_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture
def inspector(tmp_path):
    table = pq.read_table(assets_dir() / "data" / "combination.parquet")
    pq.write_table(table.slice(0, 12), tmp_path / "few.parquet")
    inspector = Inspector(held_out=tmp_path / "few.parquet")
    yield inspector
    inspector.close()


def test_shipped_adapter_on_captioned_pictures(inspector):
    seen = inspector.look("", None, "", ignore)
    assert "12 pictures" in seen.note
    assert "CS-Aligner" in seen.title
    assert set(seen.figures) == FIGURES
    for column in ("CS-Aligner", "raw text", "ridge"):
        assert f"<th>{column}</th>" in seen.table
    assert "csdiff.json" not in seen.card
    assert "## Usage" in seen.card


def test_adapter_on_a_store(inspector, adapter, plain_store):
    with pytest.warns(UserWarning, match=r"csdiff\.json"):
        seen = inspector.look(str(adapter), None, str(plain_store), ignore)
    assert set(seen.figures) == FIGURES
    assert "64 pictures" in seen.note


def test_adapter_without_data_shows_its_card_and_says_why(inspector, adapter):
    seen = inspector.look(str(adapter), None, "", ignore)
    assert seen.card
    assert not seen.figures
    assert "give a store" in seen.note


def test_uploaded_store_leaves_nothing_behind(inspector, plain_store, tmp_path):
    files = []
    for file in plain_store.rglob("*.*"):
        files.append(str(tmp_path / file.name))
        shutil.copyfile(file, files[-1])
    with pytest.warns(UserWarning, match=r"csdiff\.json"):
        seen = inspector.look("", files, "", ignore)
    assert set(seen.figures) == FIGURES
    assert "uploaded files" in seen.facts
    assert "csdiff-upload-" not in seen.facts


def test_nothing_there(inspector):
    with pytest.raises(CSDiffError, match="/nowhere"):
        inspector.look("/nowhere", None, "", ignore)


def test_cards_bring_no_pictures_and_no_html():
    card = plain_markdown("---\na: b\n---\n# T\n![x](http://192.0.2.1/x.png) <img src='http://192.0.2.1'>")
    assert card.lstrip().startswith("# T")
    assert "![" not in card
    assert "<img" not in card


def test_names_in_tables_are_text():
    assert "<script>" not in metrics_table({"<script>": {"centroid_gap": 0.5}})


def test_waits_for_whoever_uses_the_models():
    line = Line()

    def give_up(message):
        if "1 before you" in str(message):
            raise InterruptedError

    with line.turn(ignore), pytest.raises(InterruptedError):
        Inspector(line=line).look("", None, "", give_up)
