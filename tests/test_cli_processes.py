"""Commands as processes: what goes where, and what is left when they are interrupted."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

GENERATE = ["-m", "csdiff", "generate", "--height", "64", "--width", "64", "--prompt", "red apple"]


@pytest.fixture
def start(root, tmp_path):
    """`start(*arguments)`: a Python process in a fresh folder."""
    environment = {**os.environ, "PYTHONPATH": str(root), "NO_COLOR": "1"}

    def start(*arguments: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *arguments], cwd=tmp_path, env=environment, **pipes)

    return start


def test_results_on_stdout_progress_on_stderr(start, tmp_path):
    process = start(*GENERATE, "--output", str(tmp_path / "out"), "--steps", "2", "--num_images", "2", "--json")
    stdout, stderr = process.communicate(timeout=600)
    assert process.returncode == 0, stderr
    expected = [tmp_path / "out" / name for name in ("red-apple-0.png", "red-apple-1.png", "grid.png")]
    assert json.loads(stdout) == [str(path) for path in expected]
    assert all(path.is_file() for path in expected)
    assert "\r" not in stderr
    assert "\x1b" not in stderr


def test_ctrl_c_is_one_line_and_leaves_whole_files(start, tmp_path):
    out = tmp_path / "out"
    process = start(*GENERATE, "--output", str(out), "--steps", "20", "--num_images", "5000")
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
    names = {path.name for path in out.iterdir()}
    pictures = {name for name in names if name.endswith(".png")}
    assert names - {name.replace(".png", ".json") for name in pictures} == pictures


def test_sigterm_cleans_up(start, tmp_path):
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
    process = start("-c", code)
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, stderr = process.communicate(timeout=600)
    assert process.returncode == 143
    assert stderr == "csdiff test: terminated\n"
    assert list(tmp_path.iterdir()) == []
