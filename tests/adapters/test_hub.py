"""Pushing to and loading from a hub: a fake one on loopback, in a process of its own that has it as `HF_ENDPOINT`."""

import json
import os
import subprocess
import sys

import pytest

from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter
from tests.adapters.fake_hub import fake_hub

SCRIPT = """
import json
import torch
from csdiff import AutoAdapter, CSDiffError
from csdiff.adapters import MLPAdapter

torch.manual_seed(0)
adapter = MLPAdapter(embedding_dim=4).eval()
torch.nn.init.normal_(adapter.proj_out.weight)
adapter.metadata = {"metrics": {"centroid_gap": 0.25}}
text = torch.randn(2, 4)

commits = [adapter.push_to_hub("someone/adapter", token="hf_fake") for _ in range(2)]
adapter.push_to_hub("someone/others", token="hf_fake", subfolder="prior")
loaded = AutoAdapter.from_pretrained("someone/adapter")
nested = AutoAdapter.from_pretrained("someone/others", subfolder="prior")
try:
    AutoAdapter.from_pretrained("someone/nothing")
except CSDiffError as error:
    missing = str(error)
print(json.dumps({
    "commits": [str(commit) for commit in commits],
    "equal": [torch.equal(a.embed(text), adapter.embed(text)) for a in (loaded, nested)],
    "metrics": loaded.metadata["metrics"],
    "missing": missing,
}))
"""


def run(script, tmp_path, root, endpoint):
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "PYTHONPATH": str(root)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_push_and_load(tmp_path, root):
    with fake_hub() as (endpoint, hub):
        result = run(SCRIPT, tmp_path, root, endpoint)
    assert result["equal"] == [True, True]
    assert result["metrics"] == {"centroid_gap": 0.25}
    assert result["commits"][0].startswith(f"{endpoint}/someone/adapter/commit/")
    expected = {"config.json", "csdiff.json", "README.md", "diffusion_pytorch_model.safetensors"}
    assert expected == set(hub.repositories["someone/adapter"]) - {".gitattributes"}
    assert {f"prior/{name}" for name in expected} == set(hub.repositories["someone/others"])
    card = hub.repositories["someone/adapter"]["README.md"].decode()
    assert 'AutoAdapter.from_pretrained("someone/adapter")' in card
    assert "| centroid_gap | 0.25 |" in card
    assert "'someone/nothing' is no folder here, and could not be fetched from the Hub" in result["missing"]
    assert "\n" not in result["missing"]


def test_offline_is_one_sentence(tmp_path):
    with pytest.raises(CSDiffError, match=r"'someone/adapter' is no folder here.*while online") as error:
        AutoAdapter.from_pretrained("someone/adapter", local_files_only=True, cache_dir=tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(CSDiffError, match="'someone/adapter' is no folder here"):
        MLPAdapter.from_pretrained("someone/adapter", cache_dir=tmp_path)  # the tests run with HF_HUB_OFFLINE
    with pytest.raises(CSDiffError, match="could not be pushed to 'someone/adapter'"):
        MLPAdapter(embedding_dim=4).push_to_hub("someone/adapter", token="hf_fake")


def test_a_missing_local_folder_is_not_looked_up(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CSDiffError, match="Adapter folder runs/adapter does not exist"):
        AutoAdapter.from_pretrained("runs/adapter")
