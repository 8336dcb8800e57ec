"""Pushing to and loading from the hub, with a folder in place of its repositories."""

import fnmatch
import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter


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


def test_a_missing_local_folder_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CSDiffError, match="runs/adapter does not exist"):
        AutoAdapter.from_pretrained("runs/adapter")
