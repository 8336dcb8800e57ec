"""Draw sixteen prompts with the shipped models for the documentation: by the adapter, the ridge map and the raw text.

None of the prompts is a caption of the data set word for word; they were written down before they were drawn, and all
of them are shown.

    python scripts/draw_prompts.py    # writes docs/figures/prompts.png and docs/figures/prompts_maps.png
"""

from __future__ import annotations

import tempfile

from images import ASSETS, ROOT, SPLITS, load_split
from PIL import Image, ImageDraw

from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.generate import generate

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
MAPS = {"adapter": None, "ridge": str(ASSETS / "ridge"), "raw text": "none"}


def check_prompts_are_new() -> None:
    captions = {caption for split in SPLITS for captions in load_split(split).captions for caption in captions}
    known = captions.intersection(PROMPTS)
    if known:
        raise SystemExit(f"these prompts are captions of the data set: {sorted(known)}")


def draw(adapter: str | None) -> list[Image.Image]:
    with tempfile.TemporaryDirectory() as folder:
        config = GenerateConfig(prompt=list(PROMPTS), adapter=adapter, output=folder, grid=False, progress=False)
        return [Image.open(file).convert("RGB") for file in generate(config)]


def write(draw: ImageDraw.ImageDraw, prompt: str, middle: int, top: int) -> None:
    words, style = prompt.rsplit(", ", 1)
    cut = len(words) if len(words) <= 24 else words.rfind(" ", 0, 24)
    for line, text in enumerate(filter(None, (words[:cut], words[cut:].strip(), style))):
        draw.text((middle, top + 13 * line), text, fill="black", anchor="ma")


def main() -> None:
    check_prompts_are_new()
    drawn = {name: draw(adapter) for name, adapter in MAPS.items()}
    sheet = Image.new("RGB", (4 * 160, 4 * 176), "white")
    for index, (prompt, image) in enumerate(zip(PROMPTS, drawn["adapter"], strict=True)):
        left, top = index % 4 * 160, index // 4 * 176
        sheet.paste(image, (left + 16, top + 4))
        write(ImageDraw.Draw(sheet), prompt, left + 80, top + 135)
    sheet.save(ROOT / "docs/figures/prompts.png", optimize=True)

    sheet = Image.new("RGB", (64 + 8 * 136, 2 * 460), "white")
    pen = ImageDraw.Draw(sheet)
    for index, prompt in enumerate(PROMPTS):
        left, top = 64 + index % 8 * 136, index // 8 * 460
        for row, (name, images) in enumerate(drawn.items()):
            sheet.paste(images[index], (left + 4, top + 4 + 136 * row))
            pen.text((6, top + 64 + 136 * row), name, fill="black")
        write(pen, prompt, left + 68, top + 412)
    sheet.save(ROOT / "docs/figures/prompts_maps.png", optimize=True)


if __name__ == "__main__":
    main()
