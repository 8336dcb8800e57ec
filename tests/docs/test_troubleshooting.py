"""docs/troubleshooting.md explains every error message that the source raises, and none that it does not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source_messages import LETTERS, all_texts, letters, raised_messages

PAGE = "docs/troubleshooting.md"
CODE_SPAN = re.compile(r"(`+) ?(.+?) ?\1(?!`)")


@pytest.fixture(scope="module")
def entries(root: Path) -> dict[str, tuple[str, str]]:
    """Phrase of a message to its cause and cure, from the tables of the section on error messages."""
    _, section = (root / PAGE).read_text("utf-8").split("\n## Error messages\n")
    found = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if len(cells) == 3 and "`" in cells[0]:
            for _, phrase in CODE_SPAN.findall(cells[0]):
                assert phrase not in found, f"{PAGE} has two entries for {phrase!r}"
                found[phrase] = (cells[1], cells[2])
    return found


def says(text: str, phrase: str) -> bool:
    """Whether the parts of a phrase between its `…` stand in the text in this order."""
    place = 0
    for part in phrase.split("…"):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return True


def test_every_message_has_an_entry(root: Path, entries: dict):
    missing = [
        f"{where}: {text}"
        for where, text in raised_messages(root / "csdiff")
        if not any(says(text, phrase) for phrase in entries)
    ]
    assert not missing, f"add a row to a table of {PAGE} for:\n" + "\n".join(missing)


def test_every_entry_is_of_a_message(root: Path, entries: dict):
    texts = all_texts(root / "csdiff")
    stale = [phrase for phrase in entries if not any(says(text, phrase) for text in texts)]
    assert not stale, f"{PAGE} explains what no longer is in the source: correct or delete " + "; ".join(stale)


def test_every_entry_says_something(entries: dict):
    assert entries
    for phrase, (cause, cure) in entries.items():
        assert letters(phrase) >= LETTERS, f"{phrase!r} is too short to be found in a message"
        assert letters(cause) >= 5, phrase
        assert letters(cure) >= 5, phrase
