"""Commands as processes: what goes where, and what is left when they are interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

GENERATE = [sys.executable, "-m", "csdiff", "generate", "--adapter", "none", "--height", "32", "--width", "32"]


def environment(root) -> dict:
    return {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1"}


@pytest.fixture(scope="module")
def decoder(tiny_decoder, tiny_clip, tmp_path_factory):
    """The tiny decoder, with its encoders stated, so that prompts can be drawn without an adapter."""
    import shutil

    folder = shutil.copytree(tiny_decoder, tmp_path_factory.mktemp("stated") / "decoder")
    encoders = {f"{tower}_encoder": {"id": str(tiny_clip)} for tower in ("text", "image")}
    (folder / "csdiff.json").write_text(json.dumps({"format": 1, "kind": "decoder", **encoders}))
    return folder


def test_results_on_stdout_progress_on_stderr(root, decoder, tmp_path):
    options = ["--decoder", str(decoder), "--output", str(tmp_path / "out"), "--steps", "2", "--guidance", "1"]
    done = subprocess.run(
        [*GENERATE, *options, "--prompt", "red apple", "--num_images", "2", "--json"],
        capture_output=True, cwd=tmp_path, env=environment(root), text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pictures = json.loads(done.stdout)
    names = ["red-apple-0.png", "red-apple-1.png", "grid.png"]
    assert pictures == [str(tmp_path / "out" / name) for name in names]
    assert all((tmp_path / "out" / name).is_file() for name in names)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr


def test_ctrl_c_is_one_line_and_leaves_whole_files(root, decoder, tmp_path):
    out = tmp_path / "out"
    options = ["--decoder", str(decoder), "--output", str(out), "--steps", "20", "--guidance", "1"]
    process = subprocess.Popen(
        [*GENERATE, *options, "--prompt", "red apple", "--num_images", "5000"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment(root), text=True,
    )  # fmt: skip
    try:
        while process.poll() is None and not list(out.glob("*.png")):
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert stderr.splitlines()[-1] == "csdiff generate: interrupted"
    assert "Traceback" not in stderr
    assert stdout == ""
    pictures = {path.stem for path in out.iterdir() if path.suffix == ".png"}
    assert {path.name for path in out.iterdir()} - {f"{name}.json" for name in pictures} == {
        f"{name}.png" for name in pictures
    }


def test_sigterm_cleans_up(root, tmp_path):
    code = """
import sys, time
from csdiff.cli import run
from pathlib import Path
def action():
    try:
        Path("half").write_text("x")
        print("ready", flush=True)
        time.sleep(600)
    finally:
        Path("half").unlink()
sys.exit(run(action, "csdiff test"))
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, env=environment(root), text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 143
    assert stderr == "csdiff test: terminated\n"
    assert list(tmp_path.iterdir()) == []
