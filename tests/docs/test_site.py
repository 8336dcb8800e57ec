"""The site that `make docs` builds: no broken link, nothing from elsewhere, formulas that browsers draw."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

# What a browser fetches by itself; links that people follow may lead anywhere.
FETCHED = re.compile(r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["']?([^"'\s>]+)""")
STYLES = re.compile(
    r"""<link\b(?=[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon))[^>]*\bhref=["']?([^"'\s>]+)"""
)


@pytest.fixture(scope="module")
def site(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


def test_browsers_fetch_nothing_from_elsewhere_and_find_everything(site: Path):
    pages = list(site.rglob("*.html"))
    assert pages
    for page in pages:
        content = page.read_text("utf-8")
        for link in FETCHED.findall(content) + STYLES.findall(content):
            if not link.startswith("data:"):
                assert "//" not in link, f"{page.relative_to(site)}: {link}"
                folder = site if link.startswith("/") else page.parent
                assert (folder / link.lstrip("/").split("?")[0]).is_file(), f"{page.relative_to(site)}: {link}"


def test_formulas_are_drawn_and_the_reference_is_filled(site: Path):
    pages = {page.relative_to(site).as_posix(): page.read_text("utf-8") for page in site.rglob("*.html")}
    assert "<math" in pages["loss.html"]
    assert not [name for name, content in pages.items() if "arithmatex" in content]
    assert not [name for name, content in pages.items() if "::: csdiff" in content]
    assert 'id="csdiff.losses.objectives.CSAlignerLoss"' in pages["reference/losses.html"]
