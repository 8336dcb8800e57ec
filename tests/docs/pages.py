"""The Markdown pages of the repository: their text without code, links, headings and code blocks."""

import re
from pathlib import Path

FENCE = re.compile(r"^( *)(`{3,})([^\n]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(`+)(?!`).+?(?<!`)\1(?!`)")
ROOT = Path(__file__).resolve().parents[2]
# Every page that people read.
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "assets/README.md", "assets/LICENSES.md"]
PAGES += ["benchmarks/README.md", *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/**/*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def prose(page):
    """The text without code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def links(text):
    """Targets of the links and pictures in a text without code blocks."""
    return LINK.findall(INLINE.sub("code", text))


def anchors(page):
    """Names of the headings, as GitHub and Python-Markdown make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+?) *$", prose(page), re.MULTILINE):
        heading = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.add(name if name not in found else f"{name}-1")
    return found


def code_blocks(page):
    """`(info string, code)` of every fenced block."""
    return [(info.strip(), code) for _, _, info, code in FENCE.findall(page.read_text("utf-8"))]
