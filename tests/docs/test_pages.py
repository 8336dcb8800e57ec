"""Links of all pages lead somewhere, their code is code, and the site knows them all."""

from __future__ import annotations

import ast
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from pages import anchors, code_blocks, links, pages, prose

ROOT = Path(__file__).resolve().parents[2]
PAGES = [page.relative_to(ROOT).as_posix() for page in pages(ROOT)]


@pytest.mark.parametrize("name", PAGES)
def test_relative_links_and_anchors_lead_somewhere(name: str, root: Path):
    page, broken = root / name, []
    for link in links(prose(page)):
        if "://" in link or link.startswith("mailto:"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_links_of_the_notebook_lead_somewhere(root: Path):
    cells = json.loads((root / "docs/tour.ipynb").read_text("utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    targets = links(text)
    assert targets
    assert not [link for link in targets if not (root / "docs" / link).is_file()]


@pytest.mark.parametrize("name", PAGES)
def test_code_blocks_are_code(name: str, root: Path):
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


def navigation(node: object) -> list[str]:
    if isinstance(node, str):
        return [node]
    return [name for part in (node.values() if isinstance(node, dict) else node) for name in navigation(part)]


def test_every_page_is_in_the_navigation_and_every_entry_is_a_page(root: Path):
    listed = navigation(yaml.safe_load((root / "mkdocs.yml").read_text("utf-8"))["nav"])
    written = {page.relative_to(root / "docs").as_posix() for page in root.glob("docs/**/*.md")}
    made = {"tour.md"} | {f"repository/{name}" for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")}
    made.add("repository/benchmarks/README.md")
    assert len(listed) == len(set(listed))
    assert set(listed) == written | made


def test_the_site_takes_nothing_from_elsewhere(root: Path):
    site = yaml.safe_load((root / "mkdocs.yml").read_text("utf-8"))
    assert site["theme"]["font"] is False
    for asset in site.get("extra_css", []) + site.get("extra_javascript", []):
        assert (root / "docs" / asset).is_file()
    # Material fetches a library from elsewhere for such diagrams.
    assert not [name for name in PAGES if "```mermaid" in (root / name).read_text("utf-8")]


@pytest.mark.parametrize("room", ["losses", "adapters", "embeddings", "data", "training", "pipelines", "evaluation"])
def test_every_room_has_a_page_of_the_reference(room: str, root: Path):
    assert f"\n::: csdiff.{room}\n" in (root / f"docs/reference/{room}.md").read_text("utf-8")


def test_the_workflow_runs_what_runs_at_home(root: Path):
    workflow = yaml.safe_load((root / ".github/workflows/ci.yml").read_text("utf-8"))
    steps = [step.get("run") for step in workflow["jobs"]["run"]["steps"]]
    assert [step for step in steps if step] == [".ci/run"]


def test_forms_and_templates_are_valid(root: Path):
    for form in (root / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text("utf-8"))
        if form.name != "config.yml":
            assert {"name", "description", "body"} <= content.keys()
            fields = [field for field in content["body"] if field["type"] != "markdown"]
            assert all(field["attributes"]["label"] for field in fields)
            assert len({field["id"] for field in fields}) == len(fields)
