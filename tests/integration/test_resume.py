"""Killed at any moment and started again, from anywhere, a run ends with the bits of one that was never disturbed."""

import os
import shutil
import signal
import time

import pytest
import training_processes as processes

from csdiff.adapters.registry import AutoAdapter
from csdiff.cli.export import ExportConfig, export
from csdiff.embeddings import EmbeddingStore, write_store
from csdiff.errors import CSDiffError

PLACES = [
    ("after a step", 3),
    ("while a checkpoint is written", 2),
    ("before a checkpoint is renamed", 1),
    ("before it is named", 3),
    ("after the last checkpoint", 1),
    ("while the finished adapter is written", 1),
]


@pytest.fixture(scope="module")
def store(plain_store, tmp_path_factory):
    """Thirty-two images with two captions each, of which an epoch has one."""
    with pytest.warns(UserWarning, match=r"has no csdiff\.json"):
        plain = EmbeddingStore.open(plain_store)
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, **plain.read(range(64)), image_ids=[str(row // 2) for row in range(64)], dtype="float32")
    return path


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert processes.finish(processes.start(processes.train, processes.config(store, output))) == [0]
    return processes.everything(output)


@pytest.mark.parametrize(("where", "count"), PLACES)
def test_killed_and_resumed(store, tmp_path, undisturbed, where, count):
    made = processes.config(store, "run")
    killed = processes.start(processes.train_and_die, made, where, count, cwd=tmp_path)
    assert processes.finish(killed) == [-signal.SIGKILL]
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        AutoAdapter.from_pretrained(folder)
    assert processes.finish(processes.start(processes.train, made, cwd=tmp_path)) == [0]
    assert processes.everything(tmp_path / "run") == undisturbed
    processes.traces(tmp_path / "run")


def test_started_four_times_under_four_names(store, tmp_path, undisturbed):
    """Relative from two folders, absolute, and moved; with kills between, and the best exported at the end."""
    shutil.copytree(store, tmp_path / "a/store")
    runs = tmp_path / "a/runs"
    runs.mkdir()
    best = {"validation.metric": "count", "checkpoint.keep": 1}

    def go(target, data, output, cwd, *place, **more):
        made = processes.config(data, output, **{**best, **more})
        return processes.finish(processes.start(target, made, *place, cwd=cwd))

    killed = [-signal.SIGKILL]
    assert go(processes.train_and_die, "store", "runs/r1", tmp_path / "a", "after a step", 7) == killed
    assert go(processes.train_and_die, "a/store", "a/runs/r1", tmp_path, "before it is named", 1) == killed
    assert go(processes.train, "../store", str(runs / "r1"), runs) == [0]
    assert processes.everything(runs / "r1") == undisturbed
    processes.traces(runs / "r1")
    (runs / "r1").rename(runs / "moved")
    assert go(processes.train, "../store", "moved", runs, export="best") == [0]
    processes.traces(runs / "moved")
    weights = "diffusion_pytorch_model.safetensors"
    first = (runs / "moved/checkpoints/step-00000005" / weights).read_bytes()
    assert (runs / "moved" / weights).read_bytes() == first
    export(ExportConfig(source=str(runs / "moved"), checkpoint="best", output=str(tmp_path / "exported")))
    assert (tmp_path / "exported" / weights).read_bytes() == first


def test_two_runs_in_one_folder(plain_store, tmp_path):
    made = processes.config(plain_store, tmp_path / "out", **{"checkpoint.every": 0, "validation.every": 0})
    made.max_steps = 100_000
    running = processes.start(processes.train, made)
    wait_for_a_number(tmp_path / "out")
    before = (tmp_path / "out/training.yaml").read_bytes()
    made.max_steps, made.seed = 2, 1
    with pytest.raises(CSDiffError, match="another process"):
        processes.train(made)
    assert (tmp_path / "out/training.yaml").read_bytes() == before
    os.kill(running.pid, signal.SIGKILL)
    processes.finish(running)
    assert (tmp_path / "out/.lock").exists()
    processes.train(made)
    assert not (tmp_path / "out/.lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint(plain_store, tmp_path, number):
    options = {"max_steps": 100_000, "checkpoint.every": 0, "validation.every": 0}
    made = processes.config(plain_store, tmp_path / "run", **options)
    running = processes.start(processes.train, made, said=tmp_path / "said")
    wait_for_a_number(tmp_path / "run")
    os.kill(running.pid, number)
    assert processes.finish(running) == [128 + number]
    latest = processes.Checkpoints(tmp_path / "run/checkpoints").named("latest")
    said = (tmp_path / "said").read_text()
    for expected in (number.name, latest.name, "the same command"):
        assert expected in " ".join(said.split())
    AutoAdapter.from_pretrained(latest)


def wait_for_a_number(output, seconds=60):
    metrics, deadline = output / "metrics.jsonl", time.monotonic() + seconds
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
