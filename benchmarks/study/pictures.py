"""The picture part: a few methods drawn by the shipped decoder and measured in two feature spaces."""

from pathlib import Path

from .data import ASSETS, load
from .fit import fit, recipe
from .methods import TABLE

DRAWN = ("mse", "info_nce", "eclipse", "cs", "plain", "cs_aligner")
BASELINES = ["raw_text", "mean_shift", "ridge", "image"]
SPACES = ["tiny-clip", "efficientnet-lite0"]


def draw(folder: Path, count: int | None) -> dict:
    """Fit, draw and measure; pictures that are there already are kept.

    Args:
        folder: Where adapters and pictures go.
        count: Prompts, evenly spread over the combination split; None draws all.

    Returns:
        The result of `csdiff evaluate`: `pictures.adapters` by method, `pictures.real`, and the manifest.
    """
    from csdiff.evaluation import evaluate
    from csdiff.evaluation.config import EvaluateConfig

    study = load("shipped", 0, folder)
    adapters = []
    for name in DRAWN:
        path = folder / "adapters" / name
        fitted = fit(TABLE[name], study.fit, recipe(study.config), 0)
        fitted.adapter.metadata = _fingerprint()
        fitted.adapter.save_pretrained(path)
        adapters.append(str(path))
    config = EvaluateConfig(
        compare=adapters,
        pictures=str(ASSETS / "data/combination.parquet"),
        decoder="tiny",
        num_prompts=count,
        extractors=SPACES,
        picture_baselines=BASELINES,
        output=str(folder / "pictures"),
    )
    return evaluate(config)


def _fingerprint() -> dict:
    """The encoders that the decoder is paired by, as the shipped adapter states them."""
    import json

    shipped = json.loads((ASSETS / "adapter/csdiff.json").read_text())
    return {key: shipped.get(key) for key in ("text_encoder", "image_encoder", "tokenizer", "preprocessing")}


def picture_table(result: dict) -> str:
    """Distances of the pictures from real ones, and retrieval, as markdown."""
    pictures = result["pictures"]
    spaces = [s for s in SPACES if all(s in m["spaces"] for m in pictures["adapters"].values())]
    heads = [f"{kind}, {space}" for space in spaces for kind in ("FID", "FID extrapolated", "KID")]
    lines = [
        "| embedding | " + " | ".join([*heads, "CMMD", "CLIP score", "picture to prompt R@1", "R@10"]) + " |",
        "|---|" + "---:|" * (len(heads) + 4),
    ]
    rows = {**pictures["adapters"], "real pictures, half against half": pictures["real"]}
    for name, metrics in rows.items():
        cells = []
        for space in spaces:
            found = metrics.get("spaces", {}).get(space, {})
            cells += [_shown(found.get(kind), 2) for kind in ("fid", "fid_extrapolated", "kid")]
        retrieval = metrics.get("picture_to_prompt") or {}
        cells += [_shown(metrics.get("cmmd"), 3), _shown(metrics.get("clip_score"), 1)]
        cells += [_shown(retrieval.get(k), 3) for k in ("r@1", "r@10")]
        lines.append(f"| {_title(name)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:,.{digits}f}"


def _title(name: str) -> str:
    key = Path(name).name
    return {"image": "true image embeddings"}.get(key, TABLE[key].title if key in TABLE else key)
