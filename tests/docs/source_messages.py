"""The error messages that the source raises, as templates in which `…` stands for what varies."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

# Fewer letters than these identify nothing: such a message passes on what something else said.
LETTERS = 10


def template(node: ast.expr) -> str:
    """The text of a string expression with `…` for every part that is computed."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        text = node.value
    elif isinstance(node, ast.JoinedStr):
        text = "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        text = template(node.left) + template(node.right)
    else:
        text = "…"
    return re.sub(r"…+", "…", " ".join(text.split()))


def letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def raised_messages(package: Path) -> Iterator[tuple[str, str]]:
    """`(file:line, template)` of every `raise SomeError("...")` whose text says something of its own."""
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                text = template(node.exc.args[0])
                if letters(re.sub(r"--[\w.]+", "", text)) >= LETTERS:
                    yield f"{path.relative_to(package.parent)}:{node.lineno}", text


def all_texts(package: Path) -> set[str]:
    """Templates of all strings in the source: messages are composed in other places than the `raise` too."""
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr | ast.BinOp) or (
                isinstance(node, ast.Constant) and isinstance(node.value, str)
            ):
                found.add(template(node))
    return found
