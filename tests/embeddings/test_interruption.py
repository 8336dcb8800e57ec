"""Killed at any moment and started again, on any number of processes, the store has the same bytes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import embedding_runs
import numpy as np
import pytest
from embedding_runs import config, content

from csdiff.embeddings import EmbeddingStore, embed
from csdiff.errors import CSDiffError


class Killed(BaseException):
    """Stands for the end of the process: nothing in the package catches it."""


def visible_shards_are_whole(output):
    for file in output.glob("*_emb/*.npy"):
        np.load(file, allow_pickle=False)


def test_stopped_before_any_rename_the_store_is_the_same(dataset, tiny_clip, tmp_path, monkeypatch, capsys):
    """Every change of the store is a rename: stop before each of them in turn, and go on."""
    left = 1000

    def counting(rename):
        def counted(self, target):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return rename(self, target)

        return counted

    for name in ("replace", "rename"):
        monkeypatch.setattr(Path, name, counting(getattr(Path, name)))
    embed(config(dataset, tiny_clip, tmp_path / "whole", shard_size=7))
    # 2 shards x (1 JSON file, 1 folder, 3 visible files), and plan, report and fingerprint.
    renames = 1000 - left
    assert renames == 2 * 5 + 3
    for stop in range(renames):
        output, left = tmp_path / str(stop), stop
        with pytest.raises(Killed):
            embed(config(dataset, tiny_clip, output, shard_size=7))
        visible_shards_are_whole(output)
        with pytest.raises(CSDiffError):
            EmbeddingStore.open(output)
        left = 1000
        embed(config(dataset, tiny_clip, output, shard_size=7))
        assert content(output) == content(tmp_path / "whole"), stop
    said = capsys.readouterr().err
    assert all(f"{kept} of 2 shards are kept; the same command goes on" in said for kept in (0, 1))


def start(dataset, tiny_clip, output, root, **environment):
    options = json.dumps(asdict(config(dataset, tiny_clip, output)))
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, embedding_runs.__file__, options]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def test_killed_in_the_middle_the_store_is_the_same(store, dataset, tiny_clip, tmp_path, root):
    output = tmp_path / "s"
    process = start(dataset, tiny_clip, output, root)
    # The first shard is whole, the others are in the making.
    while process.poll() is None and not (output / ".partial/shard_000000").is_dir():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (output / "csdiff.json").exists()
    visible_shards_are_whole(output)
    embed(config(dataset, tiny_clip, output))
    assert content(output) == content(store)


def test_shards_whose_files_have_other_names_are_made_again(store, dataset, tiny_clip, tmp_path, root):
    """As an earlier csdiff named them: flat in the folder of their shard."""
    output = tmp_path / "s"
    process = start(dataset, tiny_clip, output, root)
    shard = output / ".partial/shard_000000"
    while process.poll() is None and not shard.is_dir():
        time.sleep(0.001)
    process.kill()
    process.communicate()
    for file in [*shard.glob("*/*")]:
        file.rename(shard / f"{file.parent.name}{file.suffix}")
        file.parent.rmdir()
    embed(config(dataset, tiny_clip, output))
    assert content(output) == content(store)


def test_two_processes_write_the_bytes_of_one(store, dataset, tiny_clip, tmp_path, root):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # What a launcher sets, without the seconds that it takes to start.
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**group, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    processes = [start(dataset, tiny_clip, tmp_path / "s", root, **rank) for rank in ranks]
    errors = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert content(tmp_path / "s") == content(store)


def test_a_second_run_into_the_same_folder_is_refused(dataset, tiny_clip, tmp_path):
    from csdiff.embeddings import StoreWriter

    with StoreWriter(tmp_path / "s", 1) as writer:
        writer.begin({})
        with pytest.raises(CSDiffError, match="another process is writing"), StoreWriter(tmp_path / "s", 1) as other:
            other.begin({})
    with StoreWriter(tmp_path / "s", 1) as writer:
        assert writer.begin({}) is False
