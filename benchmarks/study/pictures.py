"""The part with generated images: a few methods drawn by the shipped decoder, measured in two feature spaces."""

import json
import shutil
from pathlib import Path

from csdiff.evaluation import EvaluateConfig, evaluate
from csdiff.evaluation.metrics import IMAGE_METRICS, SPACE_METRICS, lookup
from csdiff.tables import markdown_table

from .data import ASSETS, load
from .fit import fit, recipe
from .methods import TABLE

DRAWN = ("eclipse", "diffusion", "default")
SPACES = ["tiny-clip", "efficientnet-lite0"]


def draw(folder: Path, count: int | None) -> dict:
    """Fit, draw and measure; adapters and images that are there already are kept.

    Args:
        folder: Where adapters and images go.
        count: Prompts, evenly spread over the combination split; None draws all.

    Returns:
        The result of `csdiff evaluate`: `pictures.adapters` by method, `pictures.real`, and the manifest.
    """
    study = load("shipped", 0, folder)
    adapters = []
    for name in DRAWN:
        path = folder / "adapters" / name
        if not path.exists():
            fitted = fit(TABLE[name], study.fit, recipe(study.config), 0, folder / "fit")
            fitted.adapter.save_pretrained(path)
            shutil.rmtree(folder / "fit", ignore_errors=True)
        adapters.append(str(path))
    return evaluate(
        EvaluateConfig(
            compare=adapters,
            pictures=str(ASSETS / "data/combination.parquet"),
            decoder="tiny",
            num_prompts=count,
            extractors=SPACES,
            output=str(folder / "pictures"),
        )
    )


def picture_table(file: Path) -> str:
    """What is kept of :func:`draw` as Markdown."""
    pictures = json.loads(file.read_text())["pictures"]
    rows = {**pictures["adapters"], "real images, half against half": pictures["real"]}
    columns = {f"{m.label}, {s}": [lookup(found["spaces"][s], m.key) for found in rows.values()]
               for s in SPACES for m in SPACE_METRICS}  # fmt: skip
    columns |= {m.label: [lookup(found, m.key) for found in rows.values()] for m in IMAGE_METRICS}
    columns = {name: cells for name, cells in columns.items() if any(cell is not None for cell in cells)}
    titles = {"image": "true image embeddings", **{name: method.title for name, method in TABLE.items()}}
    names = [titles.get(name, name) for name in rows]
    return markdown_table(["embedding", *columns], list(zip(names, *columns.values(), strict=True)))
