"""The commands of the page "train your own" run as they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path


def blocks(page: Path) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```", page.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_page_from_pictures_to_a_picture(root: Path, tmp_path: Path):
    for name in ("assets", "configs", "csdiff"):
        (tmp_path / name).symlink_to(root / name)
    for name in ("train_adapter.py", "generate.py"):
        shutil.copy(root / name, tmp_path)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = blocks(root / "docs" / "train.md")
    assert [language for language, _ in found] == ["python", "bash", "bash", "bash"]
    for language, code in found:
        command = [sys.executable, "-c", code] if language == "python" else ["bash", "-euc", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "my-adapter" / "config.json").is_file()
    assert list((tmp_path / "my-drawings").glob("*.png"))
