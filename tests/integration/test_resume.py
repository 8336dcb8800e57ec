"""Killed, on a full disk or started again from anywhere, a run ends with the bits of an undisturbed one."""

import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import training_processes as processes

from csdiff.adapters.registry import AutoAdapter
from csdiff.cli.export import ExportConfig, export
from csdiff.embeddings import EmbeddingStore, write_store
from csdiff.errors import CSDiffError
from csdiff.training.run import Run
from csdiff.training.run_folder import Checkpoints


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


@pytest.mark.parametrize(
    ("where", "count"),
    [
        ("after a step", 3),
        ("while a checkpoint is written", 2),
        ("before a checkpoint is renamed", 1),
        ("before it is named", 3),
        ("after the last checkpoint", 1),
        ("while the finished adapter is written", 1),
    ],
)
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
    options = {"checkpoint.every": 0, "validation.every": 0}
    output = tmp_path / "out"
    running = start_and_wait(processes.config(plain_store, output, max_steps=100_000, **options))
    before = (output / "training.yaml").read_bytes()
    other = processes.config(plain_store, output, max_steps=2, seed=1, **options)
    with pytest.raises(CSDiffError, match="another process"):
        processes.train(other)
    assert (output / "training.yaml").read_bytes() == before
    os.kill(running.pid, signal.SIGKILL)
    processes.finish(running)
    assert (output / ".lock").exists()
    processes.train(other)
    assert not (output / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint(plain_store, tmp_path, number):
    options = {"max_steps": 100_000, "checkpoint.every": 0, "validation.every": 0}
    made = processes.config(plain_store, tmp_path / "run", **options)
    running = start_and_wait(made, said=tmp_path / "said")
    os.kill(running.pid, number)
    assert processes.finish(running) == [128 + number]
    latest = processes.Checkpoints(tmp_path / "run/checkpoints").named("latest")
    said = (tmp_path / "said").read_text()
    for expected in (number.name, latest.name, "the same command"):
        assert expected in " ".join(said.split())
    AutoAdapter.from_pretrained(latest)


def start_and_wait(made, **options):
    """A run in a process of its own that has written a number."""
    running = processes.start(processes.train, made, **options)
    metrics, deadline = Path(made.output_dir) / "metrics.jsonl", time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    return running


def train_with_little_space(made, size, said, checkpoints):
    """A run that may write no file larger than `size` bytes once it has so many checkpoints."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, saved = Run._save, []

    def limited(self):
        save(self)
        saved.append(self)
        if len(saved) >= checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    Run._save = limited
    try:
        processes.train(made)
    except CSDiffError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))


@pytest.mark.parametrize(
    ("size", "every", "checkpoints", "what", "intact"),
    [
        # The limits break the adapter's weights, then the optimizer's moments, then the weights of the state.
        (2000, 100, 1, "step-00000008 needs about", 4),
        (14_000, 100, 1, "step-00000008 needs about", 4),
        (17_000, 100, 1, "step-00000008 needs about", 4),
        # The metrics, then the finished adapter.
        (100, 1, 1, "nothing can be added to", 4),
        (2000, 100, 3, "nothing can be added to", 12),
    ],
)
def test_the_last_checkpoint_is_intact(plain_store, tmp_path, size, every, checkpoints, what, intact):
    # Nothing else grows to the limit meanwhile.
    options = {"validation.every": 0, "logging.every": every}
    made, said = processes.config(plain_store, tmp_path / "out", **options), tmp_path / "said"
    assert processes.finish(processes.start(train_with_little_space, made, size, said, checkpoints)) == [0]
    folder, message = tmp_path / "out" / "checkpoints", said.read_text()
    last = folder / f"step-{intact:08d}"
    for expected in ("disk is full", what, "MB", f"{last}, is intact"):
        assert expected in message
    assert {path.name for path in folder.iterdir()} >= {last.name, "latest"}
    assert not list(folder.glob("*partial*")) + list((tmp_path / "out").glob("config.json"))
    AutoAdapter.from_pretrained(Checkpoints(folder).latest())
    assert processes.finish(processes.start(processes.train, made)) == [0]
    AutoAdapter.from_pretrained(tmp_path / "out")
