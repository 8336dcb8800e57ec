"""The commands of the page "train your own" run as they stand there."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def kill_at_the_first_number(command, metrics: Path, environment):
    """Start a training command and kill all of it once it has written a number."""
    log = metrics.parent.parent / "killed.log"
    with log.open("w") as said:
        running = subprocess.Popen(
            command, cwd=metrics.parent.parent, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    deadline = time.monotonic() + 300
    while not (metrics.is_file() and metrics.read_text()):
        assert running.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()


def test_the_page_from_pictures_to_a_picture(root: Path, tmp_path: Path):
    for name in ("assets", "configs", "csdiff"):
        (tmp_path / name).symlink_to(root / name)
    for name in ("train_adapter.py", "generate.py"):
        shutil.copy(root / name, tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = blocks(root / "docs" / "train.md")
    assert [language for language, _ in found] == ["python", "bash", "bash", "bash", "bash"]
    for language, code in found:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        if "csdiff train" in code:
            kill_at_the_first_number(command, tmp_path / "my-adapter" / "metrics.jsonl", environment)
        for _ in range(2 if "csdiff train" in code else 1):
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert not list((tmp_path / "my-adapter").glob("previous-*"))
    lines = [json.loads(line) for line in (tmp_path / "my-adapter" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [10, 20, 30, 40, 50, 60]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [60]
    assert (tmp_path / "my-adapter" / "config.json").is_file()
    assert list((tmp_path / "my-drawings").glob("*.png"))
