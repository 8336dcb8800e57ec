"""The worked examples of CONTRIBUTING.md, followed in a copy: the shared tests pass over the new parts."""

import os
import re
import shutil
import subprocess
import sys

import pytest

BLOCK = re.compile(r'^```(\w+) title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
NEW = "gated or energy or linedrawing"
TESTS = (
    "tests/adapters/test_contract.py",
    "tests/losses/test_objectives.py",
    "tests/losses/test_energy.py",
    "tests/pipelines/test_decoders.py",
    "tests/training/test_combinations.py",
)


def apply(path, diff):
    """Replaces the lines of each hunk that are marked ' ' and '-' by those marked ' ' and '+'."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        before = "".join(line[1:] for line in lines if line[0] in " -")
        after = "".join(line[1:] for line in lines if line[0] in " +")
        text = path.read_text("utf-8")
        assert text.count(before) == 1, f"CONTRIBUTING.md shows lines that {path.name} has not (once):\n{before}"
        path.write_text(text.replace(before, after), "utf-8")


@pytest.fixture(scope="module")
def checkout(root, tmp_path_factory):
    """A copy of the checkout with the examples followed."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("csdiff", "tests", "configs"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "assets").symlink_to(root / "assets")
    shutil.copy(root / "pyproject.toml", copy)
    for language, name, text in BLOCK.findall((root / "CONTRIBUTING.md").read_text("utf-8")):
        path = copy / name
        if language == "diff":
            apply(path, text)
        else:
            assert not path.exists(), name
            path.write_text(text, "utf-8")
    return copy


def run(command, folder, **options):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, **options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def test_the_code_of_the_examples_is_clean(checkout):
    files = ["csdiff/adapters", "csdiff/losses", "csdiff/pipelines/decoders.py", "tests/losses/test_energy.py"]
    for command in (["check"], ["format", "--check"]):
        run([sys.executable, "-m", "ruff", *command, "--no-cache", *files], checkout)


def test_the_shared_tests_pass_over_the_new_parts(checkout):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *TESTS, "-k", NEW]
    # on another copy than this one the new names would be unknown
    run(command, checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
