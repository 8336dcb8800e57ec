"""The notebook docs/tour.ipynb runs from top to bottom, and holds the outputs of such a run."""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient


@pytest.fixture
def notebook(root: Path) -> nbformat.NotebookNode:
    return nbformat.read(root / "docs/tour.ipynb", as_version=4)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")


def test_the_stored_outputs_are_those_of_a_whole_run(notebook: nbformat.NotebookNode, root: Path):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert (root / "docs/tour.ipynb").stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs(notebook: nbformat.NotebookNode, tmp_path: Path):
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    text = printed(notebook)
    gaps = {name.strip(): float(gap) for name, gap in re.findall(r"^(.+?) centroid gap (\S+)", text, re.MULTILINE)}
    assert gaps["this adapter"] < gaps["raw text"] / 2
    assert "the same after loading: True" in text
    assert any("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
