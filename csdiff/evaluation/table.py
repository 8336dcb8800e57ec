"""The result of an evaluation as tables for people: one description, drawn as text here and as HTML by the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from csdiff.evaluation.metrics import (
    BASELINES,
    IMAGE_METRICS,
    METRICS,
    SPACE_METRICS,
    Metric,
    main_metrics,
    metric,
    metric_rows,
)
from csdiff.tables import number, text_table


@dataclass(frozen=True)
class Shown:
    """One table: what it says, names of its columns, and its cells as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def columns(result: Mapping) -> dict[str, Mapping]:
    """Metrics by column: the adapters, then the baselines."""
    adapters = result.get("adapters") or {next(iter(result["manifest"]["adapters"])): result}
    baselines = result.get("baselines") or {}
    return {**adapters, **{BASELINES[name]: baselines[name] for name in BASELINES if name in baselines}}


def tables(result: Mapping) -> list[Shown]:
    """Embeddings (the main metrics, then the rest), differences, generated images: those that the result has."""
    made = []
    if "count" in result:
        shown = columns(result)
        widths = next(iter(shown.values())).get("cs_divergence_at") or {}
        main = main_metrics()
        more = [metric for metric in METRICS if metric not in main and metric.key != "cs_divergence"]
        more += [metric(f"cs_divergence_at.{width}") for width in widths]
        head = ["metric", "better", *shown]
        fitted = ["fitted on", "", *(column.get("fitted_on", "") for column in shown.values())]
        made.append(Shown(measured_on(result), head, [*metric_rows(shown, main), fitted]))
        made.append(Shown("More of them", head, metric_rows(shown, more)))
    if "comparison" in result:
        made.append(_differences(result["comparison"]))
    if "pictures" in result:
        made.append(_images(result))
    return made


def measured_on(result: Mapping) -> str:
    """What the embeddings' numbers were measured on, in one line."""
    data = result["manifest"]["data"]
    of = f" of {data['rows_of']:,}" if data["rows_of"] != data["rows"] else ""
    split = f", split {data['split']}" if data.get("split") else ""
    text = f"Measured on {data['source']}{split}: {data['rows']:,}{of} captions of {data['pictures']:,} images"
    estimated = result.get("estimated")
    if not estimated:
        return text
    return (
        f"{text}; ranks of {estimated['queries']:,} queries and kernels of {estimated['kernel_rows']:,} rows, ± one "
        "standard error (--full for all)"
    )


def _differences(comparison: Mapping) -> Shown:
    level = f"{comparison['level']:.0%}"
    rows = []
    for entry in comparison["differences"]:
        interval = f"{number(entry['low'])} to {number(entry['high'])}"
        real, better = ("yes" if entry["real"] else "no"), entry["better"] or ""
        label = metric(entry["metric"]).label
        rows.append([label, entry["first"], entry["second"], number(entry["difference"]), interval, real, better])
    title = f"Differences, first minus second, on {comparison['images']:,} images"
    return Shown(title, ["metric", "first", "second", "difference", f"{level} interval", "real", "better"], rows)


def _images(result: Mapping) -> Shown:
    shown = {**result["pictures"]["adapters"], "real vs real": result["pictures"]["real"]}
    rows = []
    for space in next(iter(shown.values()))["spaces"]:
        within = {name: metrics["spaces"][space] for name, metrics in shown.items()}
        named = [Metric(f"{entry.label}, {Path(space).name}", entry.key, entry.better) for entry in SPACE_METRICS]
        rows += metric_rows(within, named)
    made = result["manifest"]["pictures"]
    title = (
        f"{next(iter(shown.values()))['count']:,} generated images of {made['prompts']['count']:,} prompts, against "
        f"{made['references']['count']:,} images of {made['references']['source']}"
    )
    return Shown(title, ["metric", "better", *shown], rows + metric_rows(shown, IMAGE_METRICS))


def as_text(result: Mapping) -> str:
    """Every table."""
    return "\n\n".join(text_table(table.head, table.rows, table.title) for table in tables(result))
