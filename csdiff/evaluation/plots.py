"""Plots of embeddings, as matplotlib figures without global state: to save, to embed, or for a web page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from csdiff.errors import CSDiffError, require
from csdiff.evaluation.distances import unit
from csdiff.evaluation.retrieval import first_rows, image_identities, retrieval_ranks

TEXT, IMAGE, PREDICTED = "#d55e00", "#0072b2", "#009e73"
"""Colours that stay apart for colour-blind readers (Okabe and Ito)."""
OTHERS = ("#cc79a7", "#e69f00", "#56b4e9", "#000000")
PROJECTIONS = {
    "gap": "across: the gap direction; up: the first principal component without it",
    "pca": "PCA",
    "tsne": "t-SNE",
}
POINTS = 600
"""Points shown of each set."""


def plot_projection(text: Tensor | None, image: Tensor, predicted: Tensor, method: str = "pca", seed: int = 0):
    """The modality gap before and after: unit vectors of text and images, and of predictions and images, in a plane.

    Both panels of the matplotlib figure show one projection, fitted to all sets together, so that places can be
    compared between them.

    Row i of `text`, `image` and `predicted`, all `(N, D)` and raw, is one picture; `text` of None (or another width)
    leaves the panel "before" out. The method is "pca", "tsne", or "gap": across the direction from the centroid of the
    images to that of the text (of the predictions, where there is no text), in which the distance of two centroids is
    the part of the gap along it, and up the first principal component at a right angle to it.

    Raises:
        CSDiffError: scikit-learn or matplotlib is not installed, or another method.
    """
    if method not in PROJECTIONS:
        raise CSDiffError(f"plot_projection: expected one of {', '.join(PROJECTIONS)}, found {method!r}.")
    chosen = torch.randperm(len(image), generator=torch.Generator().manual_seed(seed))[:POINTS]
    sets = {"images": unit(image[chosen].cpu()), "predictions": unit(predicted[chosen].cpu())}
    panels = [("predictions", PREDICTED, "after: predictions and images")]
    if text is not None and text.shape[1] == image.shape[1]:
        sets["text"] = unit(text[chosen].cpu())
        panels.insert(0, ("text", TEXT, "before: text and images"))
    centroids = {name: z.mean(0).numpy() for name, z in sets.items()}
    rows = np.concatenate([z.numpy() for z in sets.values()])
    if method == "gap":
        rows = rows - centroids["images"]
        direction = centroids[panels[0][0]] - centroids["images"]
        direction /= max(float(np.linalg.norm(direction)), 1e-12)
        across = rows @ direction
        plane = np.stack([across, _project(rows - across[:, None] * direction, "pca", seed)[:, 0]], axis=1)
    else:
        plane = _project(rows, method, seed)
    places = dict(zip(sets, np.split(plane, len(sets)), strict=True))
    figure, axes = _panels(len(panels), 4.2, 4)
    for axis, (name, colour, title) in zip(axes, panels, strict=True):
        pairs = np.stack([places["images"], places[name]], axis=1)[:40]
        axis.plot(*pairs.transpose(2, 1, 0), color="0.65", linewidth=0.5, zorder=0)
        axis.scatter(*places["images"].T, s=7, color=IMAGE, label="images", alpha=0.6, linewidths=0)
        axis.scatter(*places[name].T, s=7, color=colour, label=name, alpha=0.6, linewidths=0)
        gap = np.linalg.norm(centroids["images"] - centroids[name])
        axis.set(xticks=[], yticks=[])
        axis.set_title(f"{title}\ncentroid gap {gap:.2f}", fontsize=10)
        _legend_below(axis, -0.02, markerscale=2)
    figure.supxlabel(f"{PROJECTIONS[method]}\nof unit vectors; lines join 40 of the pairs", fontsize=9)
    return figure


def _project(rows: np.ndarray, method: str, seed: int) -> np.ndarray:
    require("sklearn", "plots")
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(rows)
    reduced = PCA(min(50, *rows.shape), random_state=seed).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    return TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed).fit_transform(reduced)


def plot_similarities(text: Tensor | None, image: Tensor, predicted: Tensor, image_ids: Tensor | None = None):
    """Histograms of cosine similarity to the true image and to other images, before and after: a matplotlib figure.

    Rows are those of :func:`plot_projection`; `image_ids` `(N,)` is the picture of each, by default equal image
    embeddings are one picture.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    panels = [("before: text", text, TEXT)] if text is not None and text.shape[1] == image.shape[1] else []
    panels.append(("after: predictions", predicted, PREDICTED))
    figure, axes = _panels(len(panels), 4.2, 3.2)
    y = unit(image)
    # A fixed number of shifts pairs every row with rows of other pictures, without an N x N matrix.
    shifts = np.unique(np.linspace(1, len(y) - 1, min(len(y) - 1, 64)).astype(int)).tolist()
    bins = np.linspace(-1, 1, 81)
    for axis, (title, rows, colour) in zip(axes, panels, strict=True):
        z = unit(rows)
        other = torch.cat([(z * y.roll(s, 0)).sum(1)[ids != ids.roll(s)] for s in shifts])
        for cosines, shown, options in (
            (other, "0.65", {"label": "other images"}),
            ((z * y).sum(1), colour, {"label": "true image", "alpha": 0.75}),
        ):
            # Rounding may go a little beyond 1.
            axis.hist(cosines.clamp(-1, 1).cpu().numpy(), bins, density=True, color=shown, **options)
        axis.set(title=title, xlabel="cosine similarity", yticks=[], xticks=[-1, -0.5, 0, 0.5, 1])
        _legend_below(axis, -0.28)
    axes[0].set_ylabel("density")
    return figure


def plot_retrieval(predictions: Mapping[str, Tensor], image: Tensor, image_ids: Tensor | None = None):
    """Recall at every k up to 50 (or the number of pictures), captions to pictures and pictures to captions.

    A line for each of the predictions `(N, D)`, by name; `image` and `image_ids` are those of
    :func:`plot_similarities`. A matplotlib figure.
    """
    ids = image_identities(image) if image_ids is None else image_ids
    first = first_rows(ids)
    pictures, picture_ids = image[first], ids[first]
    ks = list(range(1, min(50, len(first)) + 1))
    figure, axes = _panels(2, 4.2, 3.6)
    fixed = {"raw text": TEXT, "mean shift": "0.55", "ridge": "0.3"}
    others = iter((PREDICTED, *OTHERS) * (1 + len(predictions) // 5))
    for name, rows in predictions.items():
        colour = fixed[name] if name in fixed else next(others)
        forward = retrieval_ranks(rows, pictures, ids, picture_ids)
        backward = retrieval_ranks(pictures, rows, picture_ids, ids)
        for axis, ranks in zip(axes, (forward, backward), strict=True):
            axis.plot(ks, [ranks.hits(k).mean().item() for k in ks], color=colour, label=name, linewidth=1.6)
    for axis, title in zip(axes, ("text to image", "image to text"), strict=True):
        axis.set(title=title, xlabel="k", ylim=(0, 1), xscale="log")
        axis.grid(alpha=0.3)
        axis.set_xticks([k for k in (1, 5, 10, 50) if k <= ks[-1]])
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.xaxis.set_minor_formatter("")
    axes[0].set_ylabel(f"recall at k, {len(first)} images")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    return figure


def _legend_below(axis, height: float, **options) -> None:
    """Where it covers no points."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, height), ncols=2, frameon=False, **options)


def _panels(count: int, width: float, height: float):
    """A figure and its axes, side by side."""
    require("matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * count, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, count, squeeze=False, sharex=True, sharey=True)[0]


def png_base64(picture) -> str:
    """A figure or a PIL picture as a base64 PNG."""
    file = io.BytesIO()
    if hasattr(picture, "savefig"):
        # Without the date and version that matplotlib would add, equal figures are equal files.
        picture.savefig(file, format="png", metadata={"Software": None})
    else:
        picture.save(file, format="PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
