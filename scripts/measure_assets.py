"""Measure what ships in ``assets/`` with standard errors, print the figures and write them to ``assets/figures.json``.

Retrieval of the tiny CLIP, reconstruction of the autoencoder, the shipped adapter beside maps fitted in closed form,
and whether a stranger would see the right thing: images drawn from image embeddings and from text alone
(`generate.py --prompt "LABEL, STYLE style"`), judged by concept. Drawn images and features are kept in the build
folder, so that `--images` can be raised later. Also draws the contact sheet of held-out originals (above) and what the
decoder makes of their image embeddings (below).

    python scripts/measure_assets.py                # half an hour to an hour on a CPU
    python scripts/measure_assets.py --images 40    # rougher
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import KandinskyV22Pipeline
from efficientnet import pooled_features
from images import ASSETS, BUILD, ROOT, SPLITS, Images, load_split, to_pil
from judge import outlines_and_colours, style_blind
from loop import DEVICE
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_autoencoder import psnr
from train_clip import retrieval
from transformers import CLIPModel, CLIPTokenizer

from csdiff import AutoAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.evaluation import baseline_metrics, concept_rate, embedding_metrics

PARTS = ("clip", "decoder", "adapter", "text")
JUDGES = {"tiny-clip": 5, "efficientnet-lite0": 10, "outlines": 10}
"""What judges images, and how many nearest concepts count as right."""
COLUMNS = 12


def weights_sha256(*folders: str) -> str:
    """Of the weights in folders of `assets/`."""
    digest = hashlib.sha256()
    for path in sorted(path for name in folders for path in (ASSETS / name).rglob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class Kept:
    """Tensors in a folder, forgotten when the shipped encoder or decoder changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / weights_sha256("clip", "decoder")
        self.folder.mkdir(parents=True, exist_ok=True)

    def get(self, name: str) -> Tensor | None:
        path = self.folder / f"{name}.safetensors"
        return load_file(path)["value"] if path.is_file() else None

    def put(self, name: str, value: Tensor) -> Tensor:
        save_file({"value": value.contiguous().cpu()}, self.folder / f"{name}.safetensors")
        return value


def encode_images(pixels: Tensor) -> Tensor:
    """Raw image embeddings of the tiny CLIP, (N, D), of uint8 images (N, 3, H, W)."""
    encoder = load_image_encoder("tiny-clip", device=DEVICE)
    return torch.cat([encoder.encode(to_pil(chunk)).embeds for chunk in pixels.split(128)]).cpu()


def encode_text(captions: list[str]) -> Tensor:
    encoder = load_text_encoder("tiny-clip", device=DEVICE)
    return torch.cat([encoder.encode(captions[i : i + 256]).embeds for i in range(0, len(captions), 256)]).cpu()


def features(pixels: Tensor, judge: str) -> Tensor:
    by = {"tiny-clip": encode_images, "efficientnet-lite0": pooled_features, "outlines": outlines_and_colours}
    return by[judge](pixels)


def draw(embeds: Tensor, name: str, kept: Kept) -> Tensor:
    """uint8 images (N, 3, 128, 128) by the decoder's own steps and guidance, the noise of row i from seed i."""
    drawn = kept.get(name)
    drawn = torch.empty(0, 3, 128, 128, dtype=torch.uint8) if drawn is None else drawn[: len(embeds)]
    if len(drawn) == len(embeds):
        return drawn
    sampling = json.loads((ASSETS / "decoder/csdiff.json").read_text())["sampling"]
    decoder = KandinskyV22Pipeline.from_pretrained(ASSETS / "decoder", dtype=torch.float32).to(DEVICE)
    decoder.set_progress_bar_config(disable=True)
    encoder = load_image_encoder("tiny-clip", device=DEVICE)
    with torch.no_grad():
        zero = encoder.forward(torch.zeros_like(encoder.preprocess([Image.new("RGB", (8, 8))]))).embeds
    for start in range(len(drawn), len(embeds), 8):
        chunk = embeds[start : start + 8].to(DEVICE)
        images = decoder(
            image_embeds=chunk,
            negative_image_embeds=zero.expand_as(chunk),
            num_inference_steps=sampling["steps"],
            guidance_scale=sampling["guidance"],
            height=128,
            width=128,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
            output_type="np",
        ).images
        images = torch.from_numpy(images).permute(0, 3, 1, 2).mul(255).round().byte()
        drawn = kept.put(name, torch.cat([drawn, images]))
        print(f"{name}: {len(drawn)} of {len(embeds)} drawn", flush=True)
    return drawn


def choose(images: Images, count: int, train: Images) -> list[int]:
    """`count` rows in a fixed random order, one a concept, of concepts of which `train` has (other) images."""
    known = Counter(train.concepts)
    if images is train:
        known = {concept: n - 1 for concept, n in known.items()}
    chosen = {}
    for row in torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist():
        concept = images.concepts[row]
        if known.get(concept, 0) > 0 and concept not in chosen:
            chosen[concept] = row
    return list(chosen.values())[:count]


class Judges:
    """Whether drawn images show their concepts, beside the originals, by every judge."""

    def __init__(self, train: Images, left_out: list[int], kept: Kept, names: list[str]) -> None:
        # An original that stands among the references would be its own nearest.
        self.rows = sorted(set(range(len(train))) - set(left_out))
        self.concepts = [train.concepts[i] for i in self.rows]
        self.train, self.kept, self.names = train, kept, names

    def __call__(self, drawn: Tensor, originals: Images, rows: list[int]) -> dict:
        found = {}
        for judge in self.names:
            reference = self.kept.get(f"train-{judge}")
            if reference is None:
                reference = self.kept.put(f"train-{judge}", features(self.train.pixels, judge))
            found_in = [features(drawn, judge), reference[self.rows], features(originals.pixels[rows], judge)]
            if judge == "outlines":
                found_in = map(style_blind(found_in[1], self.concepts), found_in)
            made, known, real = found_in
            wanted = [originals.concepts[i] for i in rows]
            found[judge] = asdict(concept_rate(made, wanted, known, self.concepts, real, k=JUDGES[judge]))
        return found


def contact_sheet(above: Tensor, below: Tensor, path: Path) -> None:
    """Rows of `above`, each with the matching row of `below` under it."""
    rows = math.ceil(len(above) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * 132 + 4, rows * 276), "gray")
    for i in range(len(above)):
        left, top = 4 + i % COLUMNS * 132, 4 + i // COLUMNS * 276
        for k, image in enumerate(to_pil(torch.stack([above[i], below[i]]))):
            sheet.paste(image, (left, top + 132 * k))
    sheet.save(path, optimize=True)


def measure_clip(splits: dict[str, Images]) -> dict:
    model = CLIPModel.from_pretrained(ASSETS / "clip").to(DEVICE).eval()
    tokenizer = CLIPTokenizer.from_pretrained(ASSETS / "clip")
    figures = {split: retrieval(model, tokenizer, splits[split]) for split in SPLITS[1:]}
    return {"parameters": sum(p.numel() for p in model.parameters()), **figures}


def measure_decoder(splits: dict[str, Images], chosen: list[int], judges: Judges, kept: Kept) -> dict:
    decoder = KandinskyV22Pipeline.from_pretrained(ASSETS / "decoder", dtype=torch.float32).to(DEVICE)
    parameters = {"unet": decoder.unet, "movq": decoder.movq}
    held_out = splits["combination"]
    originals = held_out.pixels[chosen]
    drawn = draw(encode_images(originals), "from-image", kept)
    contact_sheet(originals[:36], drawn[:36], ROOT / "docs/figures/decoder_combination.png")
    return {
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in parameters.items()},
        "sampling": json.loads((ASSETS / "decoder/csdiff.json").read_text())["sampling"],
        "psnr": {split: psnr(decoder.movq, splits[split].pixels) for split in SPLITS[1:]},
        "from_image_embeddings": judges(drawn, held_out, chosen),
    }


@torch.no_grad()
def measure_adapter(splits: dict[str, Images]) -> dict:
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    pairs = {split: (encode_text([c[0] for c in i.captions]), encode_images(i.pixels)) for split, i in splits.items()}
    figures = {"parameters": sum(p.numel() for p in adapter.parameters())}
    for split in SPLITS[1:]:
        text, image = pairs[split]
        figures[split] = {
            "adapter": embedding_metrics(adapter.embed(text), image, text),
            **baseline_metrics(*pairs["train"], text, image),
        }
    return figures


@torch.no_grad()
def measure_text(splits: dict[str, Images], chosen: dict[str, list[int]], judges: Judges, kept: Kept) -> dict:
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    figures = {}
    for split, rows in chosen.items():
        images = splits[split]
        prompts = [f"{images.labels[i]}, {images.styles[i]} style" for i in rows]
        drawn = draw(adapter.embed(encode_text(prompts)), f"from-text-{split}-{weights_sha256('adapter')}", kept)
        figures[split] = judges(drawn, images, rows)
    return figures


def merge(old: dict, new: dict) -> dict:
    """`new` over `old`, dict by dict, so that a part measured by one judge keeps what another said."""
    both = {key: merge(old[key], new[key]) for key in old.keys() & new.keys() if isinstance(new[key], dict)}
    return old | new | both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=240, help="how many to draw for each row of the table")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--judges", nargs="*", choices=JUDGES, default=list(JUDGES), help="who judges")
    parser.add_argument("--build", type=Path, default=BUILD / "measured", help="where drawn images are kept")
    arguments = parser.parse_args()
    path = ASSETS / "figures.json"
    splits = {split: load_split(split) for split in SPLITS}
    train = splits["train"]
    chosen = {split: choose(splits[split], arguments.images, train) for split in ("combination", "train")}
    kept = Kept(arguments.build)
    judges = Judges(train, chosen["train"], kept, arguments.judges)
    measure = {
        "clip": lambda: measure_clip(splits),
        "decoder": lambda: measure_decoder(splits, chosen["combination"], judges, kept),
        "adapter": lambda: measure_adapter(splits),
        "text": lambda: measure_text(splits, chosen, judges, kept),
    }
    for part in arguments.parts:
        found = {part: measure[part](), "images": {split: len(images) for split, images in splits.items()}}
        print(json.dumps(found, indent=2), flush=True)
        # Read again each time, so that parts can be measured side by side.
        figures = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(merge(figures, found), indent=2) + "\n")


if __name__ == "__main__":
    main()
