"""Killed at any moment and started again, a run ends with the bits of one that was never disturbed."""

import json
import os
import signal
import time

import pytest
import training_processes as processes

from csdiff.adapters.registry import AutoAdapter
from csdiff.embeddings import EmbeddingStore, write_store

PLACES = [
    ("after a step", 3),
    ("after a step", 7),
    ("while a checkpoint is written", 2),
    ("before a checkpoint is renamed", 2),
    ("before the link to it is moved", 3),
    ("while the finished adapter is written", 1),
]


@pytest.fixture(scope="module")
def store(plain_store, tmp_path_factory):
    """Thirty-two pictures with two captions each, of which an epoch has one."""
    with pytest.warns(UserWarning, match=r"has no csdiff\.json"):
        plain = EmbeddingStore.open(plain_store)
    path = tmp_path_factory.mktemp("store") / "store"
    write_store(path, **plain.read(range(64)), image_ids=[str(row // 2) for row in range(64)], dtype="float32")
    return path


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed")
    assert processes.finish(processes.start(processes.train, processes.config(store, output))) == [0]
    return processes.everything(output)


@pytest.mark.parametrize(("where", "count"), PLACES)
def test_killed_and_resumed(store, tmp_path, undisturbed, where, count):
    made = processes.config(store, tmp_path)
    killed = processes.start(processes.train_and_die, made, where, count)
    assert processes.finish(killed) == [-signal.SIGKILL]
    for folder in (tmp_path / "checkpoints").glob("step-*"):
        AutoAdapter.from_pretrained(folder)
    assert processes.finish(processes.start(processes.train, made)) == [0]
    assert processes.everything(tmp_path) == undisturbed
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    steps = [line["step"] for line in log(tmp_path) if line["kind"] == "train"]
    assert steps == list(range(1, 13))


def test_killed_from_outside(store, tmp_path, undisturbed):
    made = processes.config(store, tmp_path)
    running = processes.start(processes.train, made)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoints" / "latest").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    processes.finish(running)
    assert processes.finish(processes.start(processes.train, made)) == [0]
    assert processes.everything(tmp_path) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint(plain_store, tmp_path, number):
    made = processes.config(plain_store, tmp_path, max_steps=100_000, **{"checkpoint.every": 0, "validation.every": 0})
    running = processes.start(processes.train, made, said=tmp_path / "said")
    deadline = time.monotonic() + 60
    while not log(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(running.pid, number)
    assert processes.finish(running) == [128 + number]
    latest = (tmp_path / "checkpoints" / "latest").resolve()
    said = (tmp_path / "said").read_text()
    for expected in (f"Stopped by {number.name}", latest.name, "run the same command"):
        assert expected in said
    AutoAdapter.from_pretrained(latest)


def log(output):
    path = output / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
