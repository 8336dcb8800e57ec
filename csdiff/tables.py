"""Tables for the terminal and for log files; the one way they are drawn."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence


def number(value: object) -> str:
    """Four significant places, without an exponent where that can be read; text as it is, nothing for None."""
    if not isinstance(value, float):
        return f"{value:,}" if type(value) is int else "" if value is None else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return f"{value:.1e}"


def text_table(head: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """A table as wide as its content is: cut numbers would be wrong ones.

    Args:
        head: Names of the columns; those of numbers only stand to the right.
        rows: Cells; numbers are written by :func:`number`.
        title: Above it.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    cells = [[number(cell) for cell in row] for row in rows]
    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD)
    for place, name in enumerate(head):
        right = place > 0 and all(_numeric(row[place]) for row in cells)
        table.add_column(name, justify="right" if right else "left", no_wrap=True)
    for row in cells:
        table.add_row(*row)
    out = io.StringIO()
    # Text, not markup: a name may hold brackets.
    plain = {"markup": False, "emoji": False, "highlight": False, "color_system": None, "force_terminal": False}
    Console(file=out, width=10_000, **plain).print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def _numeric(cell: str) -> bool:
    return not cell or cell[0].isdigit() or (cell[0] in "-+." and len(cell) > 1) or cell in ("inf", "nan")
