"""Look inside: adapters and stores give facts, a table and plots; what is missing is said."""

import shutil
import tempfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from csdiff.adapters import AutoAdapter, build_adapter
from csdiff.app.drawing import adapter_name
from csdiff.app.inspection import PLOTS, Inspector, gather, plain_markdown
from csdiff.embeddings import EmbeddingStore
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed
from csdiff.errors import CSDiffError
from csdiff.pipelines.decoders import find_models, read_adapter_card
from csdiff.resources import assets_dir


def ignore(message):
    pass


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("adapters") / "tiny"
    build_adapter("mlp", embedding_dim=16, text_dim=16).save_pretrained(folder)
    return folder


@pytest.fixture
def inspector(models, tmp_path):
    table = pq.read_table(assets_dir() / "data" / "combination.parquet")
    pq.write_table(table.slice(0, 12), tmp_path / "few.parquet")
    inspector = Inspector(models, held_out=tmp_path / "few.parquet")
    with inspector.resources:
        yield inspector


def test_shipped_adapter_on_captioned_images(inspector):
    seen = inspector.look("", None, "", ignore)
    assert "12 images" in seen.note
    assert "CS-Aligner" in seen.title
    assert list(seen.figures) == list(PLOTS)
    assert seen.table.startswith("| metric (better) | CS-Aligner | raw text | mean shift | ridge |\n")
    assert "mean shift to these images, across folds; ridge to the shipped training images" in seen.note
    assert "csdiff.json" not in seen.card
    assert "## Usage" in seen.card


def test_baselines_and_ridge_map_are_fitted_to_the_store_of_an_adapter_for_the_shipped_encoders(
    models, inspector, tmp_path
):
    encoders = {"text_encoder": "tiny-clip", "image_encoder": "tiny-clip"}
    embed(EmbedConfig(source=str(inspector.held_out), output=str(tmp_path / "mine"), progress=False, **encoders))
    store = EmbeddingStore.open(tmp_path / "mine")
    adapter = AutoAdapter.from_pretrained(assets_dir() / "adapter")
    adapter.metadata["data"] = {"train": str(tmp_path / "mine"), "source": store.fingerprint["data"]}
    adapter.save_pretrained(tmp_path / "adapter")
    seen = inspector.look(str(tmp_path / "adapter"), None, "", ignore)
    assert "mean shift to mine; ridge to mine" in seen.note
    _, fitted_to = models.ridge(*find_models(models.options(str(tmp_path / "adapter"))))
    assert fitted_to == "mine"


def test_adapter_on_a_store(inspector, adapter, plain_store):
    with pytest.warns(UserWarning, match=r"csdiff\.json"):
        seen = inspector.look(str(adapter), None, str(plain_store), ignore)
    assert seen.figures
    assert "64 images" in seen.note


def test_adapter_without_data_shows_its_card_and_says_why(inspector, adapter):
    seen = inspector.look(str(adapter), None, "", ignore)
    assert seen.card
    assert not seen.figures
    assert "give a store" in seen.note
    with pytest.raises(CSDiffError, match="/nowhere"):
        inspector.look("/nowhere", None, "", ignore)


def test_uploaded_store_leaves_nothing_behind(inspector, plain_store, tmp_path):
    files = [shutil.copy(file, tmp_path) for file in plain_store.rglob("*.*")]
    before = set(Path(tempfile.gettempdir()).glob("csdiff-upload-*"))
    with pytest.warns(UserWarning, match=r"csdiff\.json"):
        seen = inspector.look("", [str(file) for file in files], "", ignore)
    assert seen.figures
    assert "uploaded files" in seen.facts
    assert "csdiff-upload-" not in seen.facts
    assert set(Path(tempfile.gettempdir()).glob("csdiff-upload-*")) <= before


def test_cards_bring_no_pictures_and_no_html():
    card = plain_markdown("---\na: b\n---\n# T\n![x](http://192.0.2.1/x.png) <img src='http://192.0.2.1'>")
    assert card.lstrip().startswith("# T")
    assert "![" not in card
    assert "<img" not in card


def test_an_adapter_is_called_by_a_name_alone(tmp_path):
    adapter = build_adapter("mlp", embedding_dim=16)
    for said, name in (
        ("cs_aligner", "CS-Aligner"),
        ("my_loss", "my_loss"),
        ("![x](//y) | z", "MLPAdapter"),
        ({}, "MLPAdapter"),
    ):
        adapter.metadata["objective"] = {"name": said}
        adapter.save_pretrained(tmp_path)
        assert adapter_name(read_adapter_card(tmp_path)) == name


def test_waits_for_whoever_uses_the_models(models):
    def give_up(message):
        raise InterruptedError

    with models.turn(ignore), pytest.raises(InterruptedError):
        Inspector(models).look("", None, "", give_up)


def test_folder_is_put_together_without_pickles(tmp_path):
    names = ["img_emb_0.npy", "text_emb_12.npy", "metadata_0.parquet", "csdiff.json", "pytorch_model.bin"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    folder = gather([str(tmp_path / name) for name in names], tmp_path / "folder")
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    kept = {"img_emb/img_emb_0.npy", "text_emb/text_emb_12.npy", "metadata/metadata_0.parquet", "csdiff.json"}
    assert found == kept
    with pytest.raises(CSDiffError, match=r"virus\.exe"):
        gather([str(tmp_path / "virus.exe")], folder)
