"""Draw one prompt with the shipped models without spread, with 0.3 and with 0.6, for the documentation.

python scripts/draw_spread.py    # writes docs/figures/spread.png
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from PIL import Image, ImageDraw

from csdiff.pipelines import GenerateConfig, generate

PROMPT = "a happy dog wearing sunglasses, flat style"
SPREADS, COUNT, CELL, LEFT = (0.0, 0.3, 0.6), 6, 128, 84
TARGET = Path(__file__).resolve().parent.parent / "docs/figures/spread.png"


def main() -> None:
    sheet = Image.new("RGB", (LEFT + COUNT * CELL, len(SPREADS) * CELL), "white")
    draw = ImageDraw.Draw(sheet)
    for row, spread in enumerate(SPREADS):
        with tempfile.TemporaryDirectory() as folder:
            options = {"num_images": COUNT, "spread": spread, "output": folder, "grid": False, "progress": False}
            images = [Image.open(file).convert("RGB") for file in generate(GenerateConfig(prompt=[PROMPT], **options))]
        draw.text((8, row * CELL + CELL // 2), f"spread {spread}", fill="black", anchor="lm")
        for column, image in enumerate(images):
            sheet.paste(image.resize((CELL, CELL)), (LEFT + column * CELL, row * CELL))
    sheet.save(TARGET, optimize=True)


if __name__ == "__main__":
    main()
