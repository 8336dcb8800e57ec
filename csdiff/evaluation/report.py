"""The report of an evaluation: one HTML file that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from csdiff.errors import CSDiffError
from csdiff.evaluation.metrics import BASELINES
from csdiff.evaluation.plots import plot_projection, plot_retrieval, plot_similarities, png_base64
from csdiff.evaluation.table import Shown, tables
from csdiff.files import write_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 62rem; padding: 0 1rem; color: #222;
  background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #eee; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
td.good { color: #777; } tr.real td { font-weight: 600; }
img { max-width: 100%; } .sheet td { padding: .15rem; border: 0; text-align: center; font-size: .75rem; }
.sheet img { width: 96px; height: 96px; object-fit: cover; image-rendering: auto; } .wide { overflow-x: auto; }
pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .8rem; } p.note { color: #555; }
"""

_NOTE = """Real against real compares one half of the images with the other: independent images, but half as many,
which raises all distances but the kernel distance; compare Frechet distances of halves. A difference is real when its
interval leaves 0 out; about one in twenty of those that are not would still be called so."""


def write_report(path: Path, result: Mapping, *, drawing=None, pairs=None, predictions=None, baselines=None) -> None:
    """Writes the report, whole or not at all.

    Args:
        path: HTML file.
        result: Of `evaluate`.
        drawing: The `PictureRun` that made `result["pictures"]`, for the contact sheet.
        pairs: The `HeldOutPairs` behind the numbers.
        predictions: `(N, D)` of each adapter.
        baselines: `(N, D)` of each baseline.

    Raises:
        CSDiffError: the file cannot be written.
    """
    parts = [part for shown in tables(result) for part in (f"<h2>{html.escape(shown.title)}</h2>", _table(shown))]
    parts.append(f"<p class=note>{_NOTE}</p>")
    if pairs is not None:
        parts += _plots(pairs, predictions, baselines)
    if drawing is not None:
        parts += _sheet(drawing)
    manifest = json.dumps(result["manifest"], indent=2, ensure_ascii=False)
    parts += ["<h2>Manifest</h2>", f"<pre>{html.escape(manifest)}</pre>"]
    names = ", ".join(result["manifest"]["adapters"])
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>csdiff evaluate: {html.escape(names)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>How good is {html.escape(names)}?</h1>" + "\n".join(parts) + "</body></html>\n"
    )
    try:
        write_text(path, page)
    except OSError as error:
        raise CSDiffError(f"--report {path} cannot be written ({error.strerror}).") from error


def _plots(pairs, predictions: Mapping, baselines: Mapping) -> list[str]:
    parts = []
    # Adapters that are compared get a projection and a histogram each, baselines a line in the curves.
    for name, prediction in predictions.items():
        title = f": {html.escape(name)}" if len(predictions) > 1 else ""
        parts.append(f"<h2>Modality gap before and after{title}</h2>")
        for method in ("pca", "tsne"):
            parts.append(_image(plot_projection(pairs.text, pairs.image, prediction, method), f"{method} projection"))
        parts.append(f"<h2>Similarity to the true image and to others{title}</h2>")
        parts.append(
            _image(plot_similarities(pairs.text, pairs.image, prediction, pairs.image_ids), "similarity histograms")
        )
    lines = {**predictions, **{BASELINES[name]: value for name, value in baselines.items()}}
    parts += ["<h2>Retrieval</h2>", _image(plot_retrieval(lines, pairs.image, pairs.image_ids), "retrieval curves")]
    return parts


def _sheet(drawing) -> list[str]:
    parts = ["<h2>Contact sheet</h2>"]
    head = "".join(f"<td>{html.escape(name)}</td>" for name in drawing.sheet)
    body = []
    for place, prompt in enumerate(drawing.sheet_prompts):
        cells = "".join(
            f'<td><img alt="{html.escape(name)}" src="data:image/png;base64,{png_base64(_small(column[place]))}"></td>'
            for name, column in drawing.sheet.items()
        )
        body.append(f"<tr><td>{html.escape(prompt)}</td>{cells}</tr>")
    parts.append(f"<div class=wide><table class=sheet><tr><td></td>{head}</tr>{''.join(body)}</table></div>")
    return parts


def _small(picture: Image.Image, side: int = 192) -> Image.Image:
    small = picture.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.BICUBIC)
    return small


def _image(figure, alt: str) -> str:
    return f'<p><img alt="{html.escape(alt)}" src="data:image/png;base64,{png_base64(figure)}"></p>'


def _table(shown: Shown) -> str:
    lines = ["<tr>" + "".join(f"<th>{html.escape(cell)}</th>" for cell in shown.head) + "</tr>"]
    real = shown.head.index("real") if "real" in shown.head else None
    for cells in shown.rows:
        row = "".join(f"<td>{html.escape(cell)}</td>" for cell in cells)
        lines.append(f"<tr{' class=real' if real is not None and cells[real] == 'yes' else ''}>{row}</tr>")
    return f"<div class=wide><table>{''.join(lines)}</table></div>"
