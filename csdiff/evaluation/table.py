"""The result of an evaluation as tables for people."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

ROWS = (
    ("text to image R@1", "text_to_image.r@1", "up"),
    ("text to image R@5", "text_to_image.r@5", "up"),
    ("text to image R@10", "text_to_image.r@10", "up"),
    ("text to image median rank", "text_to_image.median_rank", "down"),
    ("image to text R@1", "image_to_text.r@1", "up"),
    ("image to text R@5", "image_to_text.r@5", "up"),
    ("image to text R@10", "image_to_text.r@10", "up"),
    ("image to text median rank", "image_to_text.median_rank", "down"),
    ("centroid gap", "centroid_gap", "down"),
    ("distribution gap", "distribution_gap", "down"),
    ("Frechet distance", "frechet_distance", "down"),
    ("Frechet, half against half", "frechet_halves", "down"),
    ("Frechet, extrapolated", "frechet_extrapolated", "down"),
    ("kernel distance x 1000", "kernel_distance", "down"),
    ("MMD^2, Gaussian", "mmd.squared", "down"),
    ("MMD^2, p-value", "mmd.p_value", ""),
    ("separability (0.5: none)", "separability", "down"),
    ("CS divergence", "cs_divergence", "down"),
    ("cosine to true image", "cosine.paired", "up"),
    ("cosine to own caption", "cosine.text", ""),
    ("cosine to unrelated captions", "cosine.unpaired", "down"),
    ("norm, mean ratio", "norm.mean_ratio", "1"),
    ("norm, spread ratio", "norm.std_ratio", "1"),
    ("effective rank", "effective_rank", ""),
)
"""Label, dotted key and what is good: up, down, nearness to 1, or nearness to the real ones."""
BETTER = {"up": "higher", "down": "lower", "1": "near 1", "": ""}
BASELINES = {"raw_text": "raw text", "mean_shift": "mean shift", "ridge": "ridge", "real": "real vs real"}


def lookup(metrics: Mapping, key: str) -> float | None:
    """Value at a dotted key, or None."""
    value = metrics
    # Keys such as "0.5" hold a dot themselves; they stand last.
    for part in key.split(".", 1):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def columns(result: Mapping) -> dict[str, Mapping]:
    """Metrics by column: the adapters, then the baselines."""
    adapters = result.get("adapters") or {"adapter": result}
    baselines = result.get("baselines") or {}
    return {**adapters, **{BASELINES[name]: baselines[name] for name in BASELINES if name in baselines}}


def rows(result: Mapping) -> list[tuple[str, str, list[str]]]:
    """Label, what is good, and the values as text, of every metric that some column has."""
    shown = columns(result)
    keys = list(ROWS)
    place = next(i for i, row in enumerate(keys) if row[1] == "cs_divergence")
    widths = next(iter(shown.values())).get("cs_divergence_at") or {}
    keys[place : place + 1] = [(f"CS divergence, width {w}", f"cs_divergence_at.{w}", "down") for w in widths]
    table = []
    for label, key, good in keys:
        values = [lookup(metrics, key) for metrics in shown.values()]
        if any(value is not None for value in values):
            table.append((label, BETTER[good], [number(value) for value in values]))
    return table


def number(value: object) -> str:
    """Four significant places, without an exponent where that can be read."""
    if not isinstance(value, (int, float)):
        return "" if value is None else str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 10 else f"{value:.4f}"
    return f"{value:.1e}"


def as_text(result: Mapping) -> str:
    """Every table, as wide as its numbers are: cut numbers would be wrong ones."""
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, width=1000, force_terminal=False, color_system=None)
    for table in tables(result):
        console.print(table)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def tables(result: Mapping) -> list:
    """Rich tables: embeddings, differences, pictures."""
    from rich import box
    from rich.table import Table

    made = []
    if "count" in result:
        pictures = result["manifest"]["data"]["pictures"]
        title = f"Embeddings: {result['count']} captions of {pictures} pictures"
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("metric", no_wrap=True)
        table.add_column("better")
        for name in columns(result):
            table.add_column(name, justify="right")
        for label, good, values in rows(result):
            table.add_row(label, good, *values)
        made.append(table)
    if "comparison" in result:
        level = f"{result['comparison']['level']:.0%}"
        table = Table(title="Differences (first minus second)", box=box.SIMPLE_HEAD, title_justify="left")
        for name in ("metric", "first", "second", "difference", f"{level} interval", "real", "better"):
            table.add_column(name)
        for entry in result["comparison"]["differences"]:
            interval = f"{number(entry['low'])} to {number(entry['high'])}"
            real = "yes" if entry["real"] else "no"
            table.add_row(
                entry["metric"],
                entry["first"],
                entry["second"],
                number(entry["difference"]),
                interval,
                real,
                entry["better"] or "",
            )
        made.append(table)
    if "pictures" in result:
        made.append(_pictures(result["pictures"]))
    return made


def _pictures(pictures: Mapping):
    from rich import box
    from rich.table import Table

    table = Table(title="Pictures", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("metric", no_wrap=True)
    table.add_column("better")
    shown = {**pictures["adapters"], "real vs real": pictures["real"]}
    for name in shown:
        table.add_column(name, justify="right")
    for label, good, values in picture_rows(shown):
        table.add_row(label, good, *values)
    return table


def picture_rows(shown: Mapping[str, Mapping]) -> list[tuple[str, str, list[str]]]:
    """As `rows`, of the metrics of pictures."""
    first = next(iter(shown.values()))
    keys = [
        (f"{label}, {Path(name).name}", ("spaces", name, key)) for name in first["spaces"] for label, key in SPACE_ROWS
    ]
    keys += [(label, tuple(key.split("."))) for label, key in PICTURE_ROWS]
    table = []
    for label, path in keys:
        values = [_path(metrics, path) for metrics in shown.values()]
        if any(value is not None for value in values):
            good = "higher" if path[-1] in ("clip_score", "r@1", "r@5", "r@10") else "lower"
            table.append((label, "" if path[-1] == "diversity" else good, [number(value) for value in values]))
    return table


SPACE_ROWS = (("FID", "fid"), ("FID extrapolated", "fid_extrapolated"), ("KID x 1000", "kid"))
PICTURE_ROWS = (
    ("CMMD", "cmmd"),
    ("CLIP score", "clip_score"),
    ("prompt by picture R@1", "picture_to_prompt.r@1"),
    ("prompt by picture R@5", "picture_to_prompt.r@5"),
    ("prompt by picture R@10", "picture_to_prompt.r@10"),
    ("prompt by picture, median rank", "picture_to_prompt.median_rank"),
    ("diversity among seeds", "diversity"),
)


def _path(metrics: Mapping, path: tuple[str, ...]):
    value = metrics
    for part in path:
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
