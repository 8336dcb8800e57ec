"""Tables and plots from the results file, and the blocks of the pages that are filled with them."""

import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

from csdiff.evaluation.metrics import MAIN, lookup, metric
from csdiff.tables import number

from .methods import QUICK, SWEEPS, TABLE

MORE = ("text_to_image.median_rank", "cs_divergence", "frechet_distance", "cosine.paired", "norm.mean_ratio",
        "norm.std_ratio", "effective_rank", "parameters", "train_seconds", "inference_ms")  # fmt: skip
COSTS = {"parameters": "parameters", "train_seconds": "fitting, s", "inference_ms": "inference, ms per 1,000"}
PAIRWISE = ("text_to_image", "image_to_text", "cosine", "groups")
"""Metrics that mean nothing between different images."""
DEFAULT, OPPONENTS = "default", ("raw_text", "mean_shift", "ridge", "procrustes", "eclipse", "eclipse_standardized")
SHORT = ("text_to_image.r@1", "kernel_distance", "centroid_gap")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table for a Markdown page: the first column to the left, all others to the right."""
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *([number(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def value(record: dict, split: str, key: str) -> float | None:
    """A number of a record by dotted key; parameters and times of fitting stand beside the splits."""
    return record[key] if key in record else lookup(record["held_out"][split], key)


def spread(values: list[float | None]) -> str:
    """Mean and standard error over seeds; a value that no seed changes has none."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return ""
    middle = mean(known)
    digits = 0 if abs(middle) >= 1000 else 1 if abs(middle) >= 5 else 3
    error = stdev(known) / math.sqrt(len(known)) if len(known) > 1 else 0.0
    text = f"{middle:,.{digits}f}"
    return text if error < 0.5 * 10**-digits else f"{text} ± {error:,.{digits}f}"


def label(key: str) -> str:
    """Name of a column."""
    return COSTS.get(key) or metric(key).label


def splits(records: list[dict], data: str) -> list[str]:
    """Splits that were measured on a data set."""
    return list(dict.fromkeys(s for r in records if r["data"] == data for s in r["held_out"]))


def table(records: list[dict], data: str, split: str, keys: tuple[str, ...], methods=tuple(TABLE)) -> str:
    """One row a method, mean and standard error over its seeds, as Markdown."""
    found = {m: [r for r in records if (r["part"], r["data"], r["method"]) == ("table", data, m)] for m in methods}
    keys = tuple(k for k in keys if any(value(r, split, k) is not None for mine in found.values() for r in mine))
    rows = []
    for key, mine in found.items():
        if not mine:
            continue
        hidden = PAIRWISE if key == "real" else ()
        cells = ["" if k.startswith(hidden) else spread([value(r, split, k) for r in mine]) for k in keys]
        title = TABLE[key].title
        rows.append([f"**{title}**" if key == DEFAULT else title, *cells, len(mine)])
    return markdown_table(["method", *map(label, keys), "seeds"], rows)


def paired(records: list[dict]) -> str:
    """The default minus each opponent, seed by seed."""
    done = {(r["data"], r["method"], r["seed"]): r for r in records}
    rows = []
    for data in dict.fromkeys(data for data, *_ in done):
        for opponent in OPPONENTS:
            seeds = [s for d, m, s in done if (d, m) == (data, DEFAULT) and (data, opponent, s) in done]
            for split in splits(records, data) if seeds else ():
                gains = [
                    spread([
                        value(done[data, DEFAULT, s], split, key) - value(done[data, opponent, s], split, key)
                        for s in seeds
                    ])
                    for key in SHORT
                ]  # fmt: skip
                rows.append([TABLE[opponent].title, f"{data}, {split}", *gains, len(seeds)])
    return markdown_table(["the default minus", "split", *map(label, SHORT), "seeds"], rows)


def sweep_table(records: list[dict], part: str) -> str:
    """A sweep as Markdown, on validation rows."""
    rows = []
    for data in dict.fromkeys(r["data"] for r in records if r["part"] == part):
        for key in SWEEPS[part]:
            mine = [r for r in records if (r["part"], r["data"], r["method"]) == (part, data, key)]
            for split in splits(mine, data):
                cells = [spread([value(r, split, metric) for r in mine]) for metric in SHORT]
                rows.append([f"{data}, {split}", key, *cells, len(mine)])
    return markdown_table(["data", "setting", *map(label, SHORT), "seeds"], rows)


def plot(records: list[dict], path: Path) -> None:
    """The page's one figure: retrieval against kernel distance, a panel a split, with errors over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mine = [r for r in records if r["part"] == "table" and r["method"] in QUICK and r["method"] != "real"]
    panels = [(data, split) for data in dict.fromkeys(r["data"] for r in mine) for split in splits(mine, data)]
    rows = -(-len(panels) // 3)
    figure = Figure(figsize=(4.4 * min(3, len(panels)), 3.8 * rows), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, min(3, len(panels)), squeeze=False).ravel()
    for unused in axes[len(panels) :]:
        unused.set_axis_off()
    for axis, (data, split) in zip(axes, panels, strict=False):
        for key in dict.fromkeys(r["method"] for r in mine):
            points = [
                [value(r, split, k) for k in ("kernel_distance", "text_to_image.r@1")]
                for r in mine
                if (r["data"], r["method"]) == (data, key)
            ]
            if not points:
                continue
            x, y = zip(*points, strict=True)
            errors = [stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in (x, y)]
            colour = "#009e73" if key == DEFAULT else "#0072b2" if key in OPPONENTS else "0.6"
            axis.errorbar(mean(x), mean(y), errors[1], errors[0], "o", color=colour)
            # ECLIPSE and its scaled form lie on one another where rows are standardized.
            below = -11 if key == "eclipse_standardized" else 4
            axis.annotate(TABLE[key].title, (mean(x), mean(y)), (5, below), textcoords="offset points", fontsize=7)
        axis.set(title=f"{data}, {split}", xlabel=label("kernel_distance"), ylabel=label("text_to_image.r@1"))
        axis.set_xscale("symlog", linthresh=10)
        axis.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def blocks(records: list[dict]) -> dict[str, str]:
    """Everything that goes into the pages, by the name of its block."""
    result = {}
    tabled = [r for r in records if r["part"] == "table"]
    for data in dict.fromkeys(r["data"] for r in tabled):
        for split in splits(tabled, data):
            name = f"{data}-{split}"
            result[f"{name}-first"] = table(tabled, data, split, MAIN, tuple(m for m in QUICK if m != "real"))
            result[name], result[f"{name}-more"] = (table(tabled, data, split, keys) for keys in (MAIN, MORE))
    if tabled:
        result["paired"] = paired(tabled)
        result["figure"] = "![Retrieval against kernel distance, with errors](figures/results.png)"
        made = {(r["commit"], r["assets"]) for r in tabled}
        result["made-by"] = "Made by " + "; ".join(f"commit `{c}` on assets `{a}`" for c, a in sorted(made)) + "."
    for part in SWEEPS:
        if any(r["part"] == part for r in records):
            result[f"sweep-{part}"] = sweep_table(records, part)
    return result


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with the text between `<!-- NAME -->` and `<!-- end -->` replaced, for every name that is known."""

    def replaced(match: re.Match) -> str:
        name = match.group(1)
        return match.group(0) if name not in parts else f"<!-- {name} -->\n\n{parts[name]}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)
