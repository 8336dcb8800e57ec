"""The one table of metrics: what each is called, where it stands in a result, and which value is better."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from csdiff.tables import number


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        label: For people, with the unit where that is not 1.
        key: Dotted place in the result of an evaluation.
        better: "near 0" and "near 0.5" are of estimates that scatter about the best value, so that what lies below it
            is as good as it; "near 1" of ratios, from both sides; "" where neither more nor less is better.
    """

    label: str
    key: str
    better: Literal["higher", "lower", "near 0", "near 0.5", "near 1", ""] = "lower"

    def loss(self, value: float) -> float:
        """How bad a value is: the smaller the better, and 0 for the best of a metric that is near something.

        Raises a ValueError where neither more nor less is better.
        """
        if not self.better:
            raise ValueError(f"{self.label}: neither more nor less is better")
        if self.better in ("higher", "lower"):
            return -value if self.better == "higher" else value
        best = float(self.better.removeprefix("near "))
        return abs(value - best) if best == 1 else max(value - best, 0.0)


METRICS = (
    Metric("text to image R@1", "text_to_image.r@1", "higher"),
    Metric("text to image R@5", "text_to_image.r@5", "higher"),
    Metric("text to image R@10", "text_to_image.r@10", "higher"),
    Metric("text to image median rank", "text_to_image.median_rank"),
    Metric("image to text R@1", "image_to_text.r@1", "higher"),
    Metric("image to text R@5", "image_to_text.r@5", "higher"),
    Metric("image to text R@10", "image_to_text.r@10", "higher"),
    Metric("image to text median rank", "image_to_text.median_rank"),
    Metric("kernel distance x 1000", "kernel_distance", "near 0"),
    Metric("centroid gap", "centroid_gap"),
    Metric("distribution gap", "distribution_gap"),
    Metric("Frechet distance", "frechet_distance"),
    Metric("Frechet, half against half", "frechet_halves"),
    Metric("Frechet, extrapolated", "frechet_extrapolated", "near 0"),
    Metric("MMD^2, Gaussian", "mmd.squared", "near 0"),
    Metric("MMD^2, p-value", "mmd.p_value", ""),
    Metric("separability", "separability", "near 0.5"),
    Metric("CS divergence", "cs_divergence"),
    Metric("groups, V-measure", "groups.v_measure", "higher"),
    Metric("groups, ARI", "groups.ari", "higher"),
    Metric("cosine to true image", "cosine.paired", "higher"),
    Metric("cosine to own caption", "cosine.text", ""),
    Metric("cosine to unrelated captions", "cosine.unpaired"),
    Metric("norm, mean ratio", "norm.mean_ratio", "near 1"),
    Metric("norm, spread ratio", "norm.std_ratio", "near 1"),
    Metric("effective rank", "effective_rank", ""),
)
"""Of embeddings."""

MAIN = (
    "text_to_image.r@1",
    "text_to_image.r@10",
    "image_to_text.r@1",
    "kernel_distance",
    "centroid_gap",
    "distribution_gap",
    "groups.v_measure",
    "groups.ari",
)
"""Keys of the eight that stand in a first table; the rest is behind it."""

SPACE_METRICS = (
    Metric("FID", "fid"),
    Metric("FID, extrapolated", "fid_extrapolated", "near 0"),
    Metric("KID x 1000", "kid", "near 0"),
)
"""Of generated images, in the feature space of one extractor."""

IMAGE_METRICS = (
    Metric("CMMD x 1000", "cmmd", "near 0"),
    Metric("CLIP score x 100", "clip_score", "higher"),
    Metric("prompt by image R@1", "picture_to_prompt.r@1", "higher"),
    Metric("prompt by image R@5", "picture_to_prompt.r@5", "higher"),
    Metric("prompt by image R@10", "picture_to_prompt.r@10", "higher"),
    Metric("prompt by image median rank", "picture_to_prompt.median_rank"),
    Metric("right concept among ten", "concept.rate", "higher"),
    Metric("right concept, ratio to originals", "concept.ratio", "higher"),
    Metric("diversity among seeds", "diversity", ""),
)
"""Of generated images, all feature spaces together."""

BASELINES = {"raw_text": "raw text", "mean_shift": "mean shift", "ridge": "ridge", "real": "real vs real"}
"""Key in a result -> label."""

_BY_KEY = {metric.key: metric for metric in (*METRICS, *IMAGE_METRICS)}


def metric(key: str) -> Metric:
    """The metric at a dotted key; a KeyError where there is none."""
    if key.startswith("cs_divergence_at."):
        return Metric(f"CS divergence, width {key.partition('.')[2]}", key)
    return _BY_KEY[key]


def lookup(result: Mapping, key: str) -> float | None:
    """Value at a dotted key, or None."""
    value: object = result
    # Keys such as "0.5" hold a dot themselves; they stand last.
    for part in key.split(".", 1):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def metric_rows(columns: Mapping[str, Mapping], metrics: Iterable[Metric] = METRICS) -> list[list[str]]:
    """Rows of a table with one column a result: label, what is better, and the values as text, with their errors.

    Metrics that no column has are left out.
    """
    rows = []
    for entry in metrics:
        values = [(lookup(column, entry.key), column.get("errors", {}).get(entry.key)) for column in columns.values()]
        if any(value is not None for value, _ in values):
            cells = [number(value) + (f" ± {number(error)}" if error else "") for value, error in values]
            rows.append([entry.label, entry.better, *cells])
    return rows
