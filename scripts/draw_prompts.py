"""Draw prompts with the shipped models for the documentation, each from seed 0.

`prompts.png`: sixteen by the adapter. `prompts_maps.png`: the forty everyday ones of `example_prompts.txt` by adapter,
ridge map and raw text. `examples.png`: eight of the forty, chosen by eye among those that can be named, first where
the maps differ most. `spread.png`: one prompt with growing spread. The prompts were written down before they were
drawn, and none of them is a caption of the data set word for word.

    python scripts/draw_prompts.py    # writes them to docs/figures (six minutes on two idle cores)
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from images import ASSETS, ROOT, SPLITS, load_split
from PIL import Image, ImageDraw, ImageFont

from csdiff.pipelines import GenerateConfig, generate

FIGURES = ROOT / "docs/figures"
PROMPTS = (
    "a red apple, 3d style",
    "a happy dog, flat style",
    "a slice of pizza, noto style",
    "a birthday cake with candles, 3d style",
    "a sailing boat on the sea, flat style",
    "an old castle, twemoji style",
    "one shiny purple heart, 3d style",
    "a cup of hot coffee, noto style",
    "an angry red face, twemoji style",
    "a snowman with a hat, flat style",
    "a space rocket, 3d style",
    "the sleepy cat, noto style",
    "a yellow sports car, flat style",
    "a big green tree, twemoji style",
    "a sunflower in a pot, 3d style",
    "a friendly ghost, noto style",
)
EVERYDAY = tuple((Path(__file__).parent / "example_prompts.txt").read_text().splitlines())
CHOSEN = (22, 26, 2, 25, 8, 15, 23, 37)
MAPS = {"adapter": None, "ridge": str(ASSETS / "ridge"), "raw text": "none"}
SPREAD = "a happy dog wearing sunglasses, flat style"


def draw(prompts: tuple[str, ...], **options) -> list[Image.Image]:
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(prompt=list(prompts), output=folder, grid=False, progress=False, **options)
        return [Image.open(file).convert("RGB") for file in generate(config)]


def lines(prompt: str) -> str:
    words, style = prompt.rsplit(", ", 1)
    return "\n".join((*textwrap.wrap(words, 17), style))


def sheet(rows: dict[str, list[Image.Image]], prompts: Sequence[str], columns: int, name: str) -> None:
    """Rows of images of 128 pixels, one under the other, the prompts below them; `columns` images to a line."""
    left, deep = 90 if len(rows) > 1 else 0, 136 * len(rows) + 64 * bool(prompts)
    count = len(next(iter(rows.values())))
    made = Image.new("RGB", (left + columns * 140, -(-count // columns) * deep), "white")
    pen = ImageDraw.Draw(made)
    pen.font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 14)
    for index in range(count):
        x, y = left + index % columns * 140, index // columns * deep
        for row, (title, images) in enumerate(rows.items()):
            made.paste(images[index], (x + 6, y + 4 + 136 * row))
            if left and index % columns == 0:
                pen.text((6, y + 64 + 136 * row), title, fill="black")
        if prompts:
            pen.text((x + 70, y + deep - 62), lines(prompts[index]), fill="black", anchor="ma", align="center")
    made.save(FIGURES / name, optimize=True)


def main() -> None:
    captions = {caption for split in SPLITS for captions in load_split(split).captions for caption in captions}
    if known := captions.intersection(PROMPTS + EVERYDAY):
        raise SystemExit(f"these prompts are captions of the data set: {sorted(known)}")
    sheet({"": draw(PROMPTS)}, PROMPTS, 4, "prompts.png")
    sheet({f"spread {s}": draw((SPREAD,), num_images=6, spread=s) for s in (0.0, 0.3, 0.6)}, (), 6, "spread.png")
    drawn = {name: draw(EVERYDAY, adapter=adapter) for name, adapter in MAPS.items()}
    sheet(drawn, EVERYDAY, 10, "prompts_maps.png")
    chosen = {name: [images[i] for i in CHOSEN] for name, images in drawn.items()}
    sheet(chosen, [EVERYDAY[i] for i in CHOSEN], 8, "examples.png")


if __name__ == "__main__":
    main()
