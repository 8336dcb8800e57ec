"""What the documentation site adds to the Markdown in docs/; MkDocs calls these functions (`hooks:` in mkdocs.yml).

The pages are written to be read in the repository as well: they link to files beside docs/, write formulas between
dollars, and the tour is a notebook. Here the linked files become part of the site, formulas become MathML, which
browsers draw by themselves, the notebook a page, and `::: csdiff.losses` every public name of that package.
"""

from __future__ import annotations

import ast
import html
import json
import os
import re
from importlib import import_module
from pathlib import Path, PurePosixPath

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BESIDE = "repository"  # where files from beside docs/ are in the site
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?\)")
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def on_files(files: Files, config) -> Files:
    """Adds the files outside docs/ that pages link to, those that they link to in turn, and the notebook's page."""
    for notebook in ROOT.glob("docs/*.ipynb"):
        files.append(File.generated(config, f"{notebook.stem}.md", content=notebook_as_markdown(notebook)))
    waiting = list(ROOT.glob("docs/**/*.md"))
    waiting += [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        name = path.relative_to(ROOT).as_posix()
        if not name.startswith("docs/"):
            files.append(File.generated(config, f"{BESIDE}/{name}", abs_src_path=str(path)))
        if path.suffix == ".md":
            links = LINK.findall(CODE.sub("", path.read_text("utf-8")))
            found = [linked_file(path.parent, link) for _, link, _ in links]
            waiting += [linked for linked in found if linked is not None]
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Points links to files outside docs/ to their place in the site, and expands `::: csdiff.ROOM`."""
    here = PurePosixPath(page.file.src_uri)
    inside = here.parts[0] != BESIDE
    source = ROOT / "docs" / here if inside else ROOT / here.relative_to(BESIDE)

    def moved(match: re.Match) -> str:
        path = linked_file(source.parent, match[2])
        if path is None:
            return match[0]
        name = path.relative_to(ROOT)
        target = name.relative_to("docs") if name.parts[0] == "docs" else Path(BESIDE) / name
        target = target.with_suffix(".md") if target.suffix == ".ipynb" else target
        relative = os.path.relpath(target, here.parent)
        return f"{match[1]}{Path(relative).as_posix()}{match[3] or ''})"

    parts = re.split(f"({CODE.pattern})", markdown, flags=CODE.flags)
    parts = [part if part.startswith("```") else LINK.sub(moved, part) for part in parts]
    return re.sub(r"^::: (csdiff\.\w+)$", lambda match: public_names(match[1]), "".join(parts), flags=re.MULTILINE)


def on_page_content(content: str, page, config, files: Files) -> str:
    """Turns the formulas that the arithmatex extension has marked into MathML."""
    inline = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
    display = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)
    content = inline.sub(lambda match: mathml(match[1], "inline"), content)
    return display.sub(lambda match: mathml(match[1], "block"), content)


def mathml(formula: str, display: str) -> str:
    """MathML of a LaTeX formula as it stands in HTML."""
    found = convert(html.unescape(formula), display=display)
    # LaTeX sets a thin space after the name of a function; the converter does not.
    return re.sub(r"(<mi>(?:log|exp|cos|sin)</mi>)(?!<mo)", r'\1<mspace width="0.17em"/>', found)


def linked_file(folder: Path, link: str) -> Path | None:
    """The file of the repository that a relative link names; of a folder its README."""
    path = Path(os.path.normpath(folder / link))
    if path.is_dir():
        path /= "README.md"
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def public_names(package: str) -> str:
    """A `:::` line for each name that the lazy `__init__.py` of a package exports; what they name is not imported."""
    tree = ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text("utf-8"))
    exported = next(
        word.value for word in ast.walk(tree) if isinstance(word, ast.keyword) and word.arg == "submod_attrs"
    )
    modules: dict[str, list[str]] = {}
    for module, names in zip(exported.keys, exported.values, strict=True):
        # `**_NAMES`: made from a registry, which is light to import.
        unpacked = module is None
        modules |= vars(import_module(package))[names.id] if unpacked else {module.value: ast.literal_eval(names)}
    return "\n\n".join(f"::: {package}.{module}.{name}" for module, names in modules.items() for name in names)


def notebook_as_markdown(path: Path) -> str:
    """The cells of a notebook with their stored outputs."""
    parts = []
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                picture = "".join(data["image/png"]).replace("\n", "")
                parts.append(f'<img alt="output of the cell above" src="data:image/png;base64,{picture}">')
            elif text := "".join(output.get("text", data.get("text/plain", ""))).rstrip():
                parts.append(f"```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"
