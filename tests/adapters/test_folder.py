"""Adapter folders: complete, reloadable, written whole, and on the Hub, with a folder in place of its repositories."""

import fnmatch
import re
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter
from csdiff.adapters.card import model_card
from csdiff.adapters.folder import WEIGHTS
from tests.adapters.adapter_tester import DIM, embed, make_adapter, text_inputs

METADATA = {
    "text_encoder": {"id": "some-clip", "dim": DIM},
    "image_encoder": {"id": "some-clip", "dim": DIM},
    "metrics": {"centroid_gap": 0.04, "text_to_image": {"r@1": 0.5}},
    "normalized": False,
}


def names(folder):
    return sorted(file.name for file in folder.iterdir())


def test_round_trip_keeps_answers_and_metadata(adapter, name, tmp_path):
    adapter.metadata = dict(METADATA)
    adapter.calibrate_norm(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.5, 3.5]))
    adapter.save_pretrained(tmp_path / "adapter")
    written = names(tmp_path / "adapter")
    assert {"config.json", "csdiff.json", "README.md", WEIGHTS} <= set(written)
    assert all(file.endswith((".json", ".safetensors", ".md")) for file in written)
    assert names(tmp_path) == ["adapter"]
    direct, info = type(adapter).from_pretrained(tmp_path / "adapter", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    for loaded in (AutoAdapter.from_pretrained(tmp_path / "adapter"), direct):
        assert type(loaded) is type(adapter)
        assert not loaded.training
        assert torch.equal(embed(loaded, text_inputs(name)), embed(adapter, text_inputs(name)))
        assert {key: loaded.metadata[key] for key in METADATA} == METADATA
        assert loaded.metadata["format"] == 1
        assert loaded.metadata["kind"] == "adapter"
        assert loaded.metadata["versions"]["torch"] == torch.__version__
        trained, expected = ({n: p.requires_grad for n, p in a.named_parameters()} for a in (loaded, adapter))
        assert trained == expected


@pytest.mark.parametrize(("option", "dtype"), [("dtype", torch.float16), ("torch_dtype", torch.bfloat16)])
def test_loads_in_another_dtype_with_exact_statistics(adapter, tmp_path, option, dtype):
    adapter.save_pretrained(tmp_path)
    loaded = AutoAdapter.from_pretrained(tmp_path, **{option: dtype})
    assert {p.dtype for p in loaded.parameters()} <= {dtype}
    assert torch.equal(loaded.clip_mean, adapter.clip_mean)
    loaded.save_pretrained(tmp_path / "cast")
    again = AutoAdapter.from_pretrained(tmp_path / "cast")
    assert torch.equal(again.clip_std, adapter.clip_std)
    assert {p.dtype for p in again.parameters()} == {torch.float32}


def test_a_variant_lies_beside_the_weights(adapter, name, tmp_path):
    adapter.save_pretrained(tmp_path / "prior")
    full = embed(adapter, text_inputs(name))
    half = AutoAdapter.from_pretrained(tmp_path / "prior").half()
    for shard in (300, "10GB"):
        half.save_pretrained(tmp_path / "prior", variant="fp16", max_shard_size=shard)
        loaded = AutoAdapter.from_pretrained(tmp_path, subfolder="prior", variant="fp16")
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert torch.equal(embed(loaded, text_inputs(name)), embed(half.float(), text_inputs(name)))
        assert torch.equal(embed(AutoAdapter.from_pretrained(tmp_path / "prior"), text_inputs(name)), full)
        # Shards of the save before do not stay. PEFT has one file.
        assert bool(list((tmp_path / "prior").glob("*-of-*"))) == (shard == 300 and name != "lora")
    with pytest.raises(CSDiffError, match=r"ema.* is missing"):
        AutoAdapter.from_pretrained(tmp_path / "prior", variant="ema")
    # One variant alone needs no name; two do.
    adapter.save_pretrained(tmp_path / "alone", variant="fp16")
    assert torch.equal(embed(AutoAdapter.from_pretrained(tmp_path / "alone"), text_inputs(name)), full)
    adapter.save_pretrained(tmp_path / "alone", variant="ema")
    with pytest.raises(CSDiffError, match="variant"):
        AutoAdapter.from_pretrained(tmp_path / "alone")


def test_a_failing_save_leaves_the_last_one(tmp_path, text_encoder):
    adapter = make_adapter("mlp", text_encoder)
    adapter.save_pretrained(tmp_path / "adapter")
    before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}
    adapter.metadata["data"] = object()
    with pytest.raises(TypeError):
        adapter.save_pretrained(tmp_path / "adapter")
    assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
    with pytest.raises(TypeError):
        adapter.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert names(tmp_path) == ["adapter"]


@pytest.mark.parametrize("place", ["file", "file/adapter", "/proc/adapter"])
def test_unwritable_place_is_one_sentence(tmp_path, text_encoder, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(CSDiffError, match=f"Cannot save the adapter to {re.escape(str(tmp_path / place))}: "):
        make_adapter("mlp", text_encoder).save_pretrained(tmp_path / place)
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("kind", ["a training run", "a checkpoint of a training run"])
def test_a_run_is_never_saved_into(tmp_path, kind):
    MLPAdapter(embedding_dim=4).save_pretrained(tmp_path)
    (tmp_path / "state").mkdir() if "checkpoint" in kind else (tmp_path / "training.yaml").write_text("seed: 0\n")
    with pytest.raises(CSDiffError, match=f"found {kind}, whose adapter"):
        MLPAdapter(embedding_dim=8).save_pretrained(tmp_path)
    assert AutoAdapter.from_pretrained(tmp_path).config.embedding_dim == 4


def test_pickle_is_never_written(tmp_path):
    with pytest.raises(CSDiffError, match="safetensors only"):
        MLPAdapter(embedding_dim=4).save_pretrained(tmp_path / "adapter", safe_serialization=False)
    MLPAdapter(embedding_dim=4).save_pretrained(tmp_path / "adapter", is_main_process=False)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["adapter", "ridge"])
def test_the_cards_that_ship_are_up_to_date_and_draw(name, root, monkeypatch, tmp_path):
    folder = root / "assets" / name
    adapter = AutoAdapter.from_pretrained(folder)
    card = (folder / "README.md").read_text()
    assert card == model_card(adapter, adapter.metadata)
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert 'from_pretrained(snapshot_download("a/b"))' in model_card(adapter, adapter.metadata, "a/b")
    codes = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-2:]
    (tmp_path / "here").symlink_to(folder)
    monkeypatch.chdir(tmp_path)
    for code in codes:
        exec(code.replace('"."', '"here"', 1).replace("output=", "steps=1, output="), {})
    assert (tmp_path / "a-red-apple-0.png").is_file()


def test_model_card_has_licence_metrics_and_code_that_runs(adapter, tmp_path, monkeypatch, capsys):
    adapter.metadata = {**METADATA, "license": "cc-by-4.0"}
    adapter.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert card.startswith("---\nlicense: cc-by-4.0\n")
    assert "| text_to_image.r@1 | 0.5 |" in card
    assert "# Text to image embeddings of `some-clip`" in card
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card, re.DOTALL)[1], {})
    assert f"torch.Size([1, {DIM}])" in capsys.readouterr().out


@pytest.mark.parametrize("page", ["adapters.md", "loss.md", "store.md"])
def test_the_code_of_a_page_runs_from_top_to_bottom(page, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (root / "docs" / page).read_text(), re.DOTALL)
    exec("\n".join(blocks), {})
    assert blocks


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The three calls of the hub's client that are made, with the arguments that the client has, on a folder."""

    def create_repo(repo_id, *, private, token, exist_ok):
        (tmp_path / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(*, repo_id, folder_path, path_in_repo, commit_message, token, create_pr=None):
        shutil.copytree(folder_path, tmp_path / repo_id / (path_in_repo or "."), dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/{commit_message}"

    def snapshot_download(repo_id, *, allow_patterns, local_files_only):
        if local_files_only or not (tmp_path / repo_id).is_dir():
            raise OSError("no such repository")
        files = [str(f.relative_to(tmp_path / repo_id)) for f in (tmp_path / repo_id).rglob("*") if f.is_file()]
        assert all(any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns) for file in files)
        return str(tmp_path / repo_id)

    for call in (create_repo, upload_folder, snapshot_download):
        monkeypatch.setattr(huggingface_hub, call.__name__, call)
    monkeypatch.setattr("csdiff.hub.unreachable", lambda: None)
    return tmp_path


@pytest.mark.parametrize("subfolder", [None, "prior"])
def test_push_and_load(hub, subfolder):
    adapter = MLPAdapter(embedding_dim=4).eval()
    torch.nn.init.normal_(adapter.proj_out.weight)
    adapter.metadata = {"metrics": {"centroid_gap": 0.25}}
    commits = [adapter.push_to_hub("someone/adapter", token="hf_fake", subfolder=subfolder) for _ in range(2)]
    assert "someone/adapter" in commits[0]
    loaded = AutoAdapter.from_pretrained("someone/adapter", subfolder=subfolder)
    text = torch.randn(2, 4)
    assert torch.equal(loaded.embed(text), adapter.embed(text))
    assert loaded.metadata["metrics"] == {"centroid_gap": 0.25}
    card = (hub / "someone/adapter" / (subfolder or ".") / "README.md").read_text()
    assert 'AutoAdapter.from_pretrained("someone/adapter")' in card
    # Nobody gave a licence, and the encoders that a pipeline needs are not known.
    assert card.startswith("---\nlibrary_name: csdiff\n")
    assert "Licence: not stated" in card
    assert "CSDiffPriorPipeline" not in card


def test_what_is_not_there_is_one_sentence(hub):
    for options in ({}, {"local_files_only": True}):
        with pytest.raises(CSDiffError, match="someone/nothing: expected an adapter") as error:
            AutoAdapter.from_pretrained("someone/nothing", **options)
        assert "\n" not in str(error.value)


def test_offline_is_one_sentence(tmp_path):
    """The tests run with HF_HUB_OFFLINE."""
    with pytest.raises(CSDiffError, match=r"someone/adapter.*HF_HUB_OFFLINE"):
        MLPAdapter.from_pretrained("someone/adapter", cache_dir=tmp_path)
    with pytest.raises(CSDiffError, match="'someone/adapter'"):
        MLPAdapter(embedding_dim=4).push_to_hub("someone/adapter", token="hf_fake")
