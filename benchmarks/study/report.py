"""Tables and plots from the results file, and the blocks of `docs/results.md` that are filled with them."""

import math
import re
from pathlib import Path
from statistics import mean, stdev

from .methods import SWEEPS, TABLE

MAIN = {
    "R@1 text to image": ("text_to_image.r@1", 3),
    "R@10": ("text_to_image.r@10", 3),
    "R@1 image to text": ("image_to_text.r@1", 3),
    "kernel distance": ("kernel_distance", 1),
    "Frechet distance": ("frechet_distance", 3),
    "centroid gap": ("centroid_gap", 3),
    "distribution gap": ("distribution_gap", 3),
    "CS divergence": ("cs_divergence", 3),
}
MORE = {
    "median rank": ("text_to_image.median_rank", 1),
    "cosine to image": ("cosine.paired", 3),
    "to own text": ("cosine.text", 3),
    "to other text": ("cosine.unpaired", 3),
    "norm, mean": ("norm.mean_ratio", 2),
    "norm, spread": ("norm.std_ratio", 2),
    "effective rank": ("effective_rank", 0),
    "parameters": ("parameters", 0),
    "fitting, s": ("train_seconds", 1),
    "inference, ms per 1,000": ("inference_ms", 1),
}
DISTANCES = {
    "kernel_distance",
    "frechet_distance",
    "centroid_gap",
    "distribution_gap",
    "cs_divergence",
    "effective_rank",
}
OPPONENTS = ("eclipse", "eclipse_standardized")
DEFAULT = "cs_aligner"


def number(record: dict, split: str, key: str) -> float | None:
    """A metric of a record by dotted key; parameters and times stand beside the splits."""
    value = record.get(key, record["held_out"][split])
    if value is record["held_out"][split]:
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    return value


def spread(values: list[float], digits: int) -> str:
    """Mean and standard error over seeds; a value that no seed changes has none."""
    values = [value for value in values if value is not None and math.isfinite(value)]
    if not values:
        return ""
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    text = f"{mean(values):,.{digits}f}"
    return text if error < 0.05 * 10**-digits else f"{text} ± {error:.{digits}f}"


def splits(records: list[dict], data: str) -> list[str]:
    """Splits that were measured on a data set."""
    return list(dict.fromkeys(s for r in records if r["data"] == data for s in r["held_out"]))


def table(records: list[dict], data: str, split: str, columns: dict) -> str:
    """One row a method, mean and standard error over its seeds, as markdown."""
    lines = ["| method | " + " | ".join(columns) + " | seeds |", "|---|" + "---:|" * (len(columns) + 1)]
    for key, method in TABLE.items():
        mine = [r for r in records if r["part"] == "table" and r["data"] == data and r["method"] == key]
        if not mine:
            continue
        cells = []
        for metric, digits in columns.values():
            shown = key != "real" or metric in DISTANCES
            cells.append(spread([number(r, split, metric) for r in mine], digits) if shown else "")
        title = f"**{method.title}**" if key == DEFAULT else method.title
        lines.append(f"| {title} | " + " | ".join(cells) + f" | {len(mine)} |")
    return "\n".join(lines)


def paired(records: list[dict]) -> str:
    """The default recipe minus ECLIPSE, seed by seed."""
    metrics = [MAIN[name] for name in ("R@1 text to image", "kernel distance", "centroid gap")]
    lines = [
        "| default recipe minus | split | R@1 text to image | kernel distance | centroid gap | seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    records = [r for r in records if r["part"] == "table"]
    done = {(r["data"], r["method"], r["seed"]): r for r in records}
    for data in dict.fromkeys(r["data"] for r in records):
        seeds = sorted(seed for d, m, seed in done if (d, m) == (data, DEFAULT))
        for opponent in OPPONENTS:
            common = [seed for seed in seeds if (data, opponent, seed) in done]
            for split in splits(records, data) if common else []:
                cells = [
                    spread(
                        [
                            number(done[data, DEFAULT, seed], split, key)
                            - number(done[data, opponent, seed], split, key)
                            for seed in common
                        ],
                        digits,
                    )
                    for key, digits in metrics
                ]
                lines.append(
                    f"| {TABLE[opponent].title} | {data}, {split} | " + " | ".join(cells) + f" | {len(common)} |"
                )
    return "\n".join(lines)


def sweep_table(records: list[dict], part: str) -> str:
    """A sweep as markdown, on validation rows."""
    lines = [
        "| data | setting | R@1 text to image | kernel distance | centroid gap | seeds |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for data in dict.fromkeys(r["data"] for r in records if r["part"] == part):
        for key in SWEEPS[part]:
            mine = [r for r in records if (r["part"], r["data"], r["method"]) == (part, data, key)]
            if mine:
                cells = [
                    spread([number(r, "validation", metric) for r in mine], digits)
                    for metric, digits in (MAIN["R@1 text to image"], MAIN["kernel distance"], MAIN["centroid gap"])
                ]
                lines.append(f"| {data} | {key} | " + " | ".join(cells) + f" | {len(mine)} |")
    return "\n".join(lines)


def plot(records: list[dict], part: str, path: Path) -> None:
    """Retrieval and kernel distance over the setting, one column a data set, one line a kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(r["data"] for r in records if r["part"] == part))
    figure, axes = plt.subplots(2, len(names), figsize=(4.2 * len(names), 5), sharex="col", squeeze=False)
    for column, data in enumerate(names):
        lines: dict[str, list] = {}
        for key in SWEEPS[part]:
            mine = [r for r in records if (r["part"], r["data"], r["method"]) == (part, data, key)]
            if mine:
                kind, value = key.split("=")
                lines.setdefault(kind, []).append((float(value), mine))
        for row, metric in enumerate(("text_to_image.r@1", "kernel_distance")):
            axis = axes[row][column]
            for kind, points in lines.items():
                x = [value for value, _ in points]
                y = [[number(r, "validation", metric) for r in mine] for _, mine in points]
                error = [stdev(v) / math.sqrt(len(v)) if len(v) > 1 else 0 for v in y]
                if len(points) == 1:
                    axis.axhline(mean(y[0]), linestyle="--", color="0.4" if kind == "mixed" else "0.7", label=kind)
                else:
                    axis.errorbar(x, [mean(v) for v in y], yerr=error, marker="o", markersize=3, label=kind)
            axis.set_ylabel("R@1 text to image" if row == 0 else "kernel distance")
            axis.grid(alpha=0.3)
            if len(lines) > 1:
                axis.legend(fontsize=7)
        positive = all(value > 0 for points in lines.values() if len(points) > 1 for value, _ in points)
        axes[0][column].set_xscale("log" if positive else "symlog")
        axes[0][column].set_title(data)
        axes[1][column].set_xlabel(part)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def blocks(records: list[dict]) -> dict[str, str]:
    """Everything that goes into the page, by the name of its block."""
    result = {}
    for data in dict.fromkeys(r["data"] for r in records if r["part"] == "table"):
        mine = [r for r in records if r["part"] == "table"]
        for split in splits(mine, data):
            result[f"{data}-{split}"] = table(mine, data, split, MAIN)
            result[f"{data}-{split}-more"] = table(mine, data, split, MORE)
    if any(r["part"] == "table" for r in records):
        result["paired"] = paired(records)
    for part in SWEEPS:
        if any(r["part"] == part for r in records):
            image = f"![R@1 and kernel distance over {part}](figures/results_{part}.png)"
            result[f"sweep-{part}"] = f"{image}\n\n{sweep_table(records, part)}"
    return result


def fill(page: str, parts: dict[str, str]) -> str:
    """The page with the text between `<!-- NAME -->` and `<!-- end -->` replaced, for every name that is known."""

    def replaced(match: re.Match) -> str:
        name = match.group(1)
        return match.group(0) if name not in parts else f"<!-- {name} -->\n\n{parts[name]}\n\n<!-- end -->"

    return re.sub(r"<!-- ([\w-]+) -->\n.*?<!-- end -->", replaced, page, flags=re.DOTALL)
