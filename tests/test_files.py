"""Files that are whole or absent, locks, and readers that name the file."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from csdiff.files import (
    fsync,
    read_safetensors_header,
    remove_partial,
    write_json,
    writing,
    writing_folder,
)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})
    with pytest.raises(ZeroDivisionError), writing(path) as file:
        file.write(f"half {1 / 0}")
    assert json.loads(path.read_text()) == {"x": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_that_exists_keeps_what_others_put_there(tmp_path):
    target = tmp_path / "adapter"
    with writing_folder(target) as folder:
        (folder / "old.safetensors").write_text("old")
    (target / "notes.txt").write_text("mine")
    with writing_folder(target) as folder:
        (folder / "new.safetensors").write_text("new")
    assert sorted(entry.name for entry in target.iterdir()) == ["new.safetensors", "notes.txt"]


def test_a_written_folder_can_be_read_by_whoever_may_read_it(tmp_path):
    for target in (tmp_path / "new", tmp_path / "new"):
        with writing_folder(target) as folder:
            save_file({"a": torch.zeros(2)}, folder / "w.safetensors")
            (folder / "below").mkdir()
            save_file({"a": torch.zeros(2)}, folder / "below" / "w.safetensors")
        for file in target.rglob("*.safetensors"):
            assert file.stat().st_mode & 0o444 == target.stat().st_mode & 0o444


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_stays(tmp_path):
    code = "import os, sys; from pathlib import Path; Path(sys.argv[1], f'.partial-{os.getpid()}-x').mkdir()"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    (tmp_path / f".partial-{os.getppid()}-x").mkdir()
    remove_partial(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == [f".partial-{os.getppid()}-x"]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    fsync(tmp_path)


def test_safetensors_header_without_reading_tensors(tmp_path):
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, path, metadata={"format": "pt"})
    assert read_safetensors_header(path) == {"a": ("F32", (2, 3)), "b": ("F16", (4,))}
