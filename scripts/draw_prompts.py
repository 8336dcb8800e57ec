"""Draw ten prompts with the shipped models for the documentation: with the adapter above, with the raw text below.

None of the prompts is a caption of the data set word for word; they were written down before they were drawn, and all
of them are shown.

    python scripts/draw_prompts.py    # writes docs/figures/prompts.png and docs/figures/prompts_raw_text.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pyarrow.parquet as pq
from pictures import DATA, ROOT, SPLITS
from PIL import Image, ImageDraw

from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.generate import generate

PROMPTS = (
    "a happy dog wearing sunglasses, flat style",
    "one shiny purple heart, 3d style",
    "a hot slice of pizza, noto style",
    "an angry red face, twemoji style",
    "a small green dragon, 3d style",
    "the sleepy cat, noto style",
    "a sailing boat on blue water, flat style",
    "a chocolate birthday cake with candles, 3d style",
    "a friendly robot, twemoji style",
    "an astronaut riding a horse, 3d style",
)
COLUMNS = 5


def check_prompts_are_new() -> None:
    captions = {
        caption
        for split in SPLITS
        for captions in pq.read_table(DATA / f"{split}.parquet", columns=["captions"])["captions"].to_pylist()
        for caption in captions
    }
    known = captions.intersection(PROMPTS)
    if known:
        raise SystemExit(f"these prompts are captions of the data set: {sorted(known)}")


def draw_sheet(adapter: str | None, path: Path) -> None:
    """All pictures in one sheet with their prompts under them."""
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(prompt=list(PROMPTS), adapter=adapter, output=folder, grid=False, progress=False)
        pictures = [Image.open(file).convert("RGB") for file in generate(config)]
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * 176, rows * 176), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (prompt, picture) in enumerate(zip(PROMPTS, pictures, strict=True)):
        left, top = index % COLUMNS * 176, index // COLUMNS * 176
        sheet.paste(picture, (left + 24, top + 4))
        words, style = prompt.rsplit(", ", 1)
        middle = len(words) if len(words) <= 26 else words.rfind(" ", 0, 26)
        for line, text in enumerate((words[:middle], words[middle:].strip() or style, style)[: 2 + (len(words) > 26)]):
            draw.text((left + 88, top + 135 + 13 * line), text, fill="black", anchor="ma")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def main() -> None:
    check_prompts_are_new()
    draw_sheet(None, ROOT / "docs/figures/prompts.png")
    draw_sheet("none", ROOT / "docs/figures/prompts_raw_text.png")


if __name__ == "__main__":
    main()
