"""What the text tower and the shipped adapter make of everyday nouns that are no label of the data set.

For each word of `everyday_nouns.txt`, which was written down before anyone looked: the nearest label by the text
tower, and the nearest concept of the train images by the adapter. Prints the table of docs/pictures.md.

    python scripts/look_up_words.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from images import ASSETS, load_split
from measure_assets import encode_images, encode_text

from csdiff import AutoAdapter


@torch.no_grad()
def main() -> None:
    words = (Path(__file__).parent / "everyday_nouns.txt").read_text().split()
    train = load_split("train")
    labels = sorted(set(train.labels))
    if known := set(words) & {label.lower() for label in labels}:
        raise SystemExit(f"these words are labels: {sorted(known)}")
    text = encode_text([f"a {word}" for word in words])
    by_text = F.normalize(text, dim=1) @ F.normalize(encode_text([f"a {label}" for label in labels]), dim=1).T
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    similarity = F.normalize(adapter.embed(text), dim=1) @ F.normalize(encode_images(train.pixels), dim=1).T
    place = torch.tensor([labels.index(label) for label in train.labels])
    by_image = torch.full((len(words), len(labels)), -1.0)
    by_image.scatter_reduce_(1, place.expand(len(words), -1), similarity, reduce="amax")
    print("| word | nearest labels, text tower | nearest concepts, adapter |\n|---|---|---|")
    for word, near_text, near_image in zip(words, by_text.topk(3).indices, by_image.topk(3).indices, strict=True):
        cells = (", ".join(labels[i] for i in near.tolist()) for near in (near_text, near_image))
        print(f"| {word} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
