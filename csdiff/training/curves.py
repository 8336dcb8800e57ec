"""`curves.png`: a run at a glance, drawn from its `metrics.jsonl`."""

import json
from math import ceil
from pathlib import Path

from csdiff.files import flatten, writing
from csdiff.training.run_folder import METRICS_NAME

CURVES_NAME = "curves.png"
_COLUMNS = 3
_NOT_DRAWN = ("samples_per_second",)
# Dotted key of a validation result -> title.
_MEASURES = {
    "text_to_image.r@1": "text to image, recall at 1",
    "image_to_text.r@1": "image to text, recall at 1",
    "cosine.paired": "cosine to the own picture",
    "centroid_gap": "centroid gap",
    "distribution_gap": "distribution gap",
    "cs_divergence": "CS divergence",
    "norm.mean_ratio": "norm, mean over that of pictures",
    "norm.std_ratio": "norm, spread over that of pictures",
}
# Okabe and Ito's colours, which colour-blind people tell apart.
_COLOURS = {"average": "#0072B2", "online": "#E69F00", "train": "#333333"}
_BASELINES = {"raw_text": "#999999", "mean_shift": "#CC79A7", "ridge": "#009E73"}


def read_metrics(path: Path) -> dict[str, dict[int, dict]]:
    """Lines of a `metrics.jsonl` by kind and step; of several of one step the last counts."""
    found: dict[str, dict[int, dict]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue  # The last line of a killed run may be cut short.
        found.setdefault(values["kind"], {})[values["step"]] = values
    return {kind: dict(sorted(lines.items())) for kind, lines in found.items()}


def draw_curves(folder: Path) -> Path | None:
    """Draw every logged number of a run: loss and its terms, gradient norm and learning rate, and the held-out metrics
    of averaged and online weights with the data's own baselines as lines.

    Args:
        folder: Of the run.

    Returns:
        The picture, or None when nothing is logged yet.
    """
    # Figure and canvas alone: pyplot keeps global state and looks for a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = folder / METRICS_NAME
    lines = read_metrics(path) if path.is_file() else {}
    train, validation = lines.get("train", {}), lines.get("validation", {})
    names = dict.fromkeys(name for values in train.values() for name in values if name not in ("step", "kind"))
    measured = {step: flatten(values) for step, values in validation.items()}
    panels = [("train", name, name.replace("_", " ")) for name in names if name not in _NOT_DRAWN]
    panels += [
        ("validation", key, title)
        for key, title in _MEASURES.items()
        if any(values.get(f"average.{key}") is not None for values in measured.values())
    ]
    if not panels:
        return None
    rows = ceil(len(panels) / _COLUMNS)
    height = 2.3 * rows + 0.7
    figure = Figure(figsize=(12, height))
    FigureCanvasAgg(figure)
    # Margins by hand: matplotlib's own layouts draw everything twice.
    figure.subplots_adjust(0.06, 0.45 / height, 0.985, 1 - 0.65 / height, 0.2, 0.42)
    axes = [figure.add_subplot(rows, _COLUMNS, place + 1) for place in range(len(panels))]
    legend: dict[str, object] = {}
    end = max(*train, *validation, 1)
    for axis, (kind, key, title) in zip(axes, panels, strict=True):
        if kind == "train":
            _line(axis, {step: values.get(key) for step, values in train.items()}, "train", thin=len(train) > 60)
        else:
            legend |= _validation(axis, key, measured)
        axis.set_title(title, fontsize=10, loc="left")
        axis.grid(alpha=0.25)
        axis.set_xlim(0, end * 1.02)
        axis.ticklabel_format(axis="y", scilimits=(-3, 4))
        axis.locator_params(nbins=5)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.text(0.52, 0.1 / height, "step", fontsize=10, ha="center")
    if legend:
        names = list(legend)
        figure.legend(list(legend.values()), names, loc="upper right", ncols=len(names), fontsize=9, frameon=False)
    target = folder / CURVES_NAME
    with writing(target, "wb") as file:
        figure.savefig(file, format="png", dpi=100)
    return target


def _line(axis, points: dict[int, float | None], name: str, thin: bool = False):
    known = {step: value for step, value in points.items() if value is not None}
    # Averaged weights run on top of the last ones, and are often close.
    width = {"online": 2.4, "average": 1.2, "train": 0.8 if thin else 1.4}[name]
    style = {"linewidth": width} if thin else {"linewidth": width, "marker": ".", "markersize": 3 + width}
    return axis.plot(list(known), list(known.values()), color=_COLOURS[name], **style)[0]


def _validation(axis, key: str, measured: dict[int, dict]) -> dict[str, object]:
    """One measure of averaged and online weights over its baselines; returns what the legend names."""
    drawn = {}
    last = measured[max(measured)]
    for name, colour in _BASELINES.items():
        value = last.get(f"baselines.{name}.{key}")
        if value is not None:
            drawn[name.replace("_", " ")] = axis.axhline(value, color=colour, linestyle="--", linewidth=1.2)
    for name, label in {"online": "last weights", "average": "averaged weights"}.items():
        drawn[label] = _line(axis, {step: values.get(f"{name}.{key}") for step, values in measured.items()}, name)
    return drawn
