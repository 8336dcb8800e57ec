"""Links of all pages lead somewhere, their code is code, the site knows them all, and the notebook runs."""

import ast
import json
import re
import subprocess
import sys

import nbformat
import pytest
import yaml
from nbclient import NotebookClient
from pages import PAGES, anchors, code_blocks, links, prose


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_and_anchors_lead_somewhere(name, root):
    page = root / name
    for link in links(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert not anchor or target.suffix != ".md" or anchor in anchors(target), link


def test_links_of_the_notebook_lead_somewhere(root):
    cells = json.loads((root / "docs/tour.ipynb").read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = links(text)
    assert targets
    assert not [link for link in targets if not (root / "docs" / link).is_file()]


@pytest.mark.parametrize("name", PAGES)
def test_code_blocks_are_code(name, root):
    for info, code in code_blocks(root / name):
        language = info.split()[0] if info else ""
        assert language, f"a block without a language: {code[:60]!r}"
        if language == "python":
            ast.parse(code, filename=name)
        elif language == "json":
            json.loads(code)
        elif language == "yaml":
            yaml.safe_load(code)
        elif language == "bash":
            done = subprocess.run(["bash", "-n"], input=code, text=True, capture_output=True)
            assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page(root):
    def entries(node):
        if isinstance(node, str):
            return [node]
        return [name for part in (node.values() if isinstance(node, dict) else node) for name in entries(part)]

    listed = entries(yaml.safe_load((root / "mkdocs.yml").read_text("utf-8"))["nav"])
    expected = [page.relative_to(root / "docs").as_posix() for page in root.glob("docs/**/*.md")]
    names = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
    expected += ["tour.md", *(f"repository/{name}" for name in names)]
    assert sorted(listed) == sorted(expected)


def test_no_page_has_a_diagram_for_which_the_site_would_fetch_a_library(root):
    assert not [name for name in PAGES if "```mermaid" in (root / name).read_text("utf-8")]


# What a browser fetches by itself; links that people follow may lead anywhere.
FETCHED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"'\s>]+)""")
STYLES = re.compile(
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?([^"'\s>]+)"""
)


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_browsers_fetch_nothing_from_elsewhere_and_find_everything(site):
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        content = page.read_text("utf-8")
        for link in FETCHED.findall(content) + STYLES.findall(content):
            if not link.startswith("data:"):
                assert "//" not in link, f"{page.relative_to(site)}: {link}"
                folder = site if link.startswith("/") else page.parent
                assert (folder / link.lstrip("/").split("?")[0]).is_file(), f"{page.relative_to(site)}: {link}"


def test_formulas_are_drawn_and_the_reference_is_filled(site):
    pages = {page.relative_to(site).as_posix(): page.read_text("utf-8") for page in site.rglob("*.html")}
    assert "<math" in pages["loss.html"]
    assert not [name for name, page in pages.items() if "arithmatex" in page or "::: csdiff" in page]
    for room in ("losses", "adapters", "embeddings", "data", "training", "pipelines", "evaluation"):
        assert f'id="csdiff.{room}.' in pages[f"reference/{room}.html"]


@pytest.fixture
def notebook(root):
    return nbformat.read(root / "docs/tour.ipynb", as_version=4)


def test_the_stored_outputs_are_those_of_a_whole_run(notebook, root):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert (root / "docs/tour.ipynb").stat().st_size < 300_000


@pytest.mark.slow
def test_the_notebook_runs(notebook, tmp_path):
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    gaps = {name.strip(): float(gap) for name, gap in re.findall(r"^(.+?) centroid gap (\S+)", text, re.MULTILINE)}
    assert gaps["this adapter"] < gaps["raw text"] / 2
    assert "the same after loading: True" in text
    assert any("image/png" in output.get("data", {}) for output in outputs)
