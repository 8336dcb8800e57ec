"""The part with generated images: a few methods drawn by the shipped decoder, measured in two feature spaces."""

import io
import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
import torch
from PIL import Image

from csdiff.evaluation import EvaluateConfig, concept_rate, evaluate, load_extractor
from csdiff.evaluation.metrics import IMAGE_METRICS, SPACE_METRICS, lookup
from csdiff.evaluation.picture_run import picture_files, read_picture

from .data import ASSETS, load
from .fit import fit, recipe
from .methods import TABLE
from .report import markdown_table

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
    result = evaluate(
        EvaluateConfig(
            compare=adapters,
            pictures=str(ASSETS / "data/combination.parquet"),
            decoder="tiny",
            num_prompts=count,
            picture_baselines=["raw_text", "ridge", "image"],
            extractors=SPACES,
            output=str(folder / "pictures"),
        )
    )
    for name, rate in concept_rates(result, count).items():
        result["pictures"]["adapters"][name]["concept"] = rate
    return result


def concept_rates(result: dict, count: int | None) -> dict[str, dict]:
    """Right concept among the ten nearest of the train images, by EfficientNet's features, for every drawn method."""
    judge = load_extractor("efficientnet-lite0")

    def features(images) -> torch.Tensor:
        images = list(images)
        return torch.cat([judge(images[start : start + 32]) for start in range(0, len(images), 32)])

    train, held_out = (_table(split) for split in ("train", "combination"))
    # The prompts that `csdiff evaluate` chooses.
    places = torch.linspace(0, len(held_out) - 1, min(count or len(held_out), len(held_out))).round().long().unique()
    chosen = [held_out[place] for place in places.tolist()]
    drawn = picture_files([row["captions"][0] for row in chosen], 1, 0)
    reference, originals = (features(_decode(row) for row in rows) for rows in (train, chosen))
    names, known = ([row["concept"] for row in rows] for rows in (chosen, train))
    rates = {}
    for name, path in result["manifest"]["pictures"]["folders"].items():
        made = features(read_picture(Path(path) / file) for file in drawn)
        rates[name] = asdict(concept_rate(made, names, reference, known, originals))
    return rates


def _table(split: str) -> list[dict]:
    return pq.read_table(ASSETS / f"data/{split}.parquet", columns=["image", "captions", "concept"]).to_pylist()


def _decode(row: dict) -> Image.Image:
    return Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")


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
