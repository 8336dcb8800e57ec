"""The result of an evaluation for people: tables as text, and one HTML file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from csdiff.errors import require
from csdiff.evaluation.metrics import BASELINES, IMAGE_METRICS, MAIN, METRICS, SPACE_METRICS, metric, metric_rows
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities, png_base64
from csdiff.tables import number, text_table

ENOUGH = 50
"""Images from which on a Frechet distance says something."""


class Table(NamedTuple):
    """Cells as text, under the names of their columns."""

    title: str
    head: list[str]
    rows: list[list[str]]


def as_text(result: Mapping) -> str:
    """Every table."""
    return "\n\n".join(text_table(table.head, table.rows, table.title) for table in tables(result))


def tables(result: Mapping) -> list[Table]:
    """Embeddings (the main metrics, then the rest), differences, generated images: those that the result has."""
    made = []
    if "count" in result:
        adapters = result.get("adapters") or {next(iter(result["manifest"]["adapters"])): result}
        columns = {**adapters, **{BASELINES[name]: column for name, column in result["baselines"].items()}}
        more = [entry for entry in METRICS if entry.key not in (*MAIN, "cs_divergence")]
        more += [metric(f"cs_divergence_at.{width}") for width in result["cs_divergence_at"]]
        head = ["metric", "better", *columns]
        fitted = ["fitted on", "", *(column.get("fitted_on", "") for column in columns.values())]
        main = metric_rows(columns, [metric(key) for key in MAIN])
        made += [Table(_measured_on(result), head, [*main, fitted])]
        made += [Table("More of them", head, metric_rows(columns, more))]
    made += [_differences(result["comparison"])] if "comparison" in result else []
    return made + ([_images(result)] if "pictures" in result else [])


def _measured_on(result: Mapping) -> str:
    data = result["manifest"]["data"]
    of = f" of {data['rows_of']:,}" if data["rows_of"] != data["rows"] else ""
    split = f", split {data['split']}" if data["split"] else ""
    text = f"Measured on {data['source']}{split}: {data['rows']:,}{of} captions of {data['pictures']:,} images"
    if estimated := result.get("estimated"):
        text += (
            f"; ranks of {estimated['queries']:,} queries and kernels of {estimated['kernel_rows']:,} rows, ± one "
            "standard error (--full for all)"
        )
    if data["seen_by"]:
        text += f"; not held out: {', '.join(data['seen_by'])} trained on this data"
    return text


def _differences(comparison: Mapping) -> Table:
    rows = []
    for entry in comparison["differences"]:
        interval = f"{number(entry['low'])} to {number(entry['high'])}"
        cells = [metric(entry["metric"]).label, entry["first"], entry["second"], number(entry["difference"]), interval]
        rows.append([*cells, "yes" if entry["real"] else "no", entry["better"] or ""])
    title = f"Differences, first minus second, on {comparison['images']:,} images"
    interval = f"{comparison['level']:.0%} interval"
    return Table(title, ["metric", "first", "second", "difference", interval, "real", "better"], rows)


def _images(result: Mapping) -> Table:
    columns = {**result["pictures"]["adapters"], "real": result["pictures"]["real"]}
    columns = {BASELINES.get(name, name): column for name, column in columns.items()}
    first = next(iter(columns.values()))
    rows = []
    for space in first["spaces"]:
        within = {name: metrics["spaces"][space] for name, metrics in columns.items()}
        named = [replace(entry, label=f"{entry.label}, {Path(space).name}") for entry in SPACE_METRICS]
        rows += metric_rows(within, named)
    made = result["manifest"]["pictures"]
    title = (
        f"{first['count']:,} generated images of {made['prompts']['count']:,} prompts, against "
        f"{made['references']['count']:,} images of {made['references']['source']}"
    )
    if min(first["count"], made["references"]["count"]) < ENOUGH:
        title += f"; with fewer than {ENOUGH} images FID is no estimate"
    return Table(title, ["metric", "better", *columns], rows + metric_rows(columns, IMAGE_METRICS))


def html_page(result: Mapping, measured=None, drawing=None) -> str:
    """The report of a result of `evaluate` as one HTML page; a CSDiffError without jinja2 or matplotlib.

    Plots are made of `measured`, the `HeldOutPairs` behind the numbers and the predictions `(N, D)` of adapters and of
    baselines by name; the contact sheet of `drawing`, the `PictureRun` that made `result["pictures"]`.
    """
    require("jinja2", "report")
    from jinja2 import Template

    prompts, sheet = drawing.sheet() if drawing else ([], {})
    template = Path(__file__).with_name("report.html").read_text("utf-8")
    return Template(template, autoescape=True, trim_blocks=True).render(
        names=", ".join(result["manifest"]["adapters"]),
        tables=tables(result),
        compared="comparison" in result,
        plots=_plots(*measured) if measured else [],
        prompts=prompts,
        sheet={BASELINES.get(name, name): list(map(_thumbnail, column)) for name, column in sheet.items()},
        manifest=json.dumps(result["manifest"], indent=2, ensure_ascii=False),
    )


def _plots(pairs, predictions: Mapping, baselines: Mapping) -> Iterator[tuple[str, list[str]]]:
    """Sections of plots: adapters get a projection and a histogram each, baselines a line in the curves."""
    for name, prediction in predictions.items():
        of = f": {name}" if len(predictions) > 1 else ""
        gap = [plot_projection(pairs.text, pairs.image, prediction, method) for method in ("pca", "tsne")]
        yield f"Modality gap before and after{of}", [png_base64(figure) for figure in gap]
        similarities = plot_similarities(pairs.text, pairs.image, prediction, pairs.image_ids)
        yield f"Similarity to the true image and to others{of}", [png_base64(similarities)]
    lines = {**predictions, **{BASELINES[name]: value for name, value in baselines.items()}}
    yield "Retrieval", [png_base64(plot_retrieval(lines, pairs.image, pairs.image_ids))]


def _thumbnail(picture) -> str:
    small = picture.convert("RGB")
    small.thumbnail((192, 192))
    return png_base64(small)
