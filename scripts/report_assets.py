"""Measure what ships in ``assets/``, print the figures and write them to ``assets/figures.json``.

Retrieval of the tiny CLIP, reconstruction of the autoencoder, recognisability of the decoder's pictures, and the
shipped adapter against the raw text embedding and a ridge map, on the held-out splits. Also draws the contact sheet
of held-out originals (above) and what the decoder makes of their image embeddings (below).

    python scripts/report_assets.py                 # everything, about ten minutes on two cores
    python scripts/report_assets.py --pictures 120  # the decoder on a part of the split
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from diffusers import KandinskyV22Pipeline
from pictures import ROOT, SPLITS, Pictures, load_pictures
from PIL import Image
from train_autoencoder import psnr
from train_clip import evaluate
from transformers import CLIPModel, CLIPTokenizer

from csdiff import AutoAdapter
from csdiff.embeddings import load_image_encoder, load_text_encoder
from csdiff.evaluation import baseline_metrics, embedding_metrics

ASSETS = ROOT / "assets"
COLUMNS = 12
PARTS = ("clip", "decoder", "adapter")


def encode_pictures(encoder, pictures: list[Image.Image]) -> torch.Tensor:
    return torch.cat([encoder.encode(pictures[i : i + 128]).embeds for i in range(0, len(pictures), 128)])


def concept_hits(embeds: torch.Tensor, concepts: list[str], train: torch.Tensor, train_concepts: list[str]) -> dict:
    """Part of the pictures whose concept is among the five nearest concepts of the train pictures, in two readings.

    By cosine similarity, a concept is as near as the nearest of its pictures (`nearest_picture`), or as the mean of
    their unit embeddings (`mean_of_pictures`), which the drawing style of the picture sways less.
    """
    normalize = torch.nn.functional.normalize
    names = sorted(set(train_concepts))
    position = {name: index for index, name in enumerate(names)}
    index = torch.tensor([position[name] for name in train_concepts])
    embeds, train = normalize(embeds, dim=-1), normalize(train, dim=-1)
    nearest = torch.full((len(embeds), len(names)), -2.0)
    nearest.scatter_reduce_(1, index.expand(len(embeds), -1), embeds @ train.T, reduce="amax")
    means = torch.zeros(len(names), train.shape[1]).index_add_(0, index, train)
    wanted = torch.tensor([position[name] for name in concepts])[:, None]
    similarities = {"nearest_picture": nearest, "mean_of_pictures": embeds @ normalize(means, dim=-1).T}
    return {
        reading: (similarity.topk(5, dim=1).indices == wanted).any(dim=1).float().mean().item()
        for reading, similarity in similarities.items()
    }


def draw(decoder, embeds: torch.Tensor, negative: torch.Tensor, steps: int, guidance: float) -> list[Image.Image]:
    """One picture for every embedding, the noise of each from its own seed."""
    pictures = []
    for start in range(0, len(embeds), 16):
        chunk = embeds[start : start + 16]
        pictures += decoder(
            image_embeds=chunk,
            negative_image_embeds=negative.expand_as(chunk),
            num_inference_steps=steps,
            guidance_scale=guidance,
            height=128,
            width=128,
            generator=[torch.Generator().manual_seed(start + i) for i in range(len(chunk))],
        ).images
    return pictures


def contact_sheet(above: list[Image.Image], below: list[Image.Image], path: Path) -> None:
    """Rows of `above`, each with the matching row of `below` under it."""
    rows = math.ceil(len(above) / COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * 132 + 4, rows * 276), "gray")
    for i, pair in enumerate(zip(above, below, strict=True)):
        left, top = 4 + i % COLUMNS * 132, 4 + i // COLUMNS * 276
        for k, picture in enumerate(pair):
            sheet.paste(picture, (left, top + 132 * k))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path, optimize=True)


def report_clip() -> dict:
    model, tokenizer = (
        CLIPModel.from_pretrained(ASSETS / "clip").eval(),
        CLIPTokenizer.from_pretrained(ASSETS / "clip"),
    )
    figures = {split: evaluate(model, tokenizer, load_pictures(split)) for split in ("combination", "concept")}
    return {"parameters": sum(p.numel() for p in model.parameters()), **figures}


def report_decoder(limit: int, guidance: float | None) -> dict:
    fingerprint = json.loads((ASSETS / "decoder/csdiff.json").read_text())
    steps = fingerprint["sampling"]["steps"]
    guidance = fingerprint["sampling"]["guidance"] if guidance is None else guidance
    decoder = KandinskyV22Pipeline.from_pretrained(ASSETS / "decoder", dtype=torch.float32)
    decoder.set_progress_bar_config(disable=True)
    encoder = load_image_encoder("tiny-clip")
    train, held_out = load_pictures("train"), load_pictures("combination")
    # An even sample of the split, not its first (all faces) part.
    chosen = torch.linspace(0, len(held_out) - 1, min(limit, len(held_out))).long().tolist()
    concepts = [held_out.concepts[i] for i in chosen]
    originals = held_out.images(chosen)
    embeds = encode_pictures(encoder, originals)
    train_embeds = encode_pictures(encoder, train.images(list(range(len(train)))))
    zero = encoder.forward(torch.zeros_like(encoder.preprocess(originals[:1]))).embeds.detach()
    drawn = draw(decoder, embeds, zero, steps, guidance)
    of_originals = concept_hits(embeds, concepts, train_embeds, train.concepts)
    of_drawn = concept_hits(encode_pictures(encoder, drawn), concepts, train_embeds, train.concepts)
    shown = torch.linspace(0, len(drawn) - 1, min(3 * COLUMNS, len(drawn))).long().tolist()
    sheet = ROOT / "docs/figures/decoder_combination.png"
    contact_sheet([originals[i] for i in shown], [drawn[i] for i in shown], sheet)
    return {
        "parameters": sum(p.numel() for p in (*decoder.unet.parameters(), *decoder.movq.parameters())),
        "steps": steps,
        "guidance": guidance,
        "pictures": len(drawn),
        "psnr": {split: psnr(decoder.movq, load_pictures(split).pixels) for split in ("combination", "concept")},
        "concept_in_top_5": {
            reading: {
                "held_out_originals": of_originals[reading],
                "generated": of_drawn[reading],
                "ratio": of_drawn[reading] / of_originals[reading],
            }
            for reading in of_originals
        },
    }


def encode_pairs(pictures: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
    """Text embeddings of the first captions and image embeddings."""
    text = load_text_encoder("tiny-clip").encode([captions[0] for captions in pictures.captions]).embeds
    return text, encode_pictures(load_image_encoder("tiny-clip"), pictures.images(list(range(len(pictures)))))


@torch.no_grad()
def report_adapter() -> dict:
    adapter = AutoAdapter.from_pretrained(ASSETS / "adapter")
    train_text, train_image = encode_pairs(load_pictures("train"))
    figures = {"parameters": sum(p.numel() for p in adapter.parameters())}
    for split in SPLITS[1:]:
        text, image = encode_pairs(load_pictures(split))
        figures[split] = {
            "adapter": embedding_metrics(adapter.embed(text), image, text),
            **baseline_metrics(train_text, train_image, text, image),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=10**9, help="how many of the held-out pictures to redraw")
    parser.add_argument("--guidance", type=float, help="guidance scale; by default the decoder's own")
    parser.add_argument(
        "--parts", nargs="*", choices=("clip", "decoder", "adapter"), default=("clip", "decoder", "adapter")
    )
    arguments = parser.parse_args()
    path = ASSETS / "figures.json"
    figures = json.loads(path.read_text()) if path.is_file() else {}
    figures["pictures"] = {split: len(load_pictures(split)) for split in SPLITS}
    if "clip" in arguments.parts:
        figures["clip"] = report_clip()
    if "decoder" in arguments.parts:
        figures["decoder"] = report_decoder(arguments.pictures, arguments.guidance)
    if "adapter" in arguments.parts:
        figures["adapter"] = report_adapter()
    path.write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
