"""Train the shipped tiny CLIP (a transformers ``CLIPModel`` with its own BPE tokenizer) on the train pictures.

Images are seen at 64x64 in 8x8 patches. Most steps drop a random part of the patches (as FLIP does), which cuts the
cost of the image tower; blank patches go first, and the last tenth of the run sees nearly all of the drawing. A
picture's caption is drawn from its own list and from templates, so that free wording ("a red apple, 3d style") lies
near the training captions.

    python scripts/train_clip.py --output build/clip
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from checkpoint import load, save
from pictures import Pictures, load_pictures
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

IMAGE_SIZE = 64
MAX_LENGTH = 32
VOCABULARY = 3000
EMBEDDING_DIM = 256
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
TEMPLATES = (
    "{label}, {style} style",
    "a {style} emoji of {label}",
    "a picture of {label} in {style} style",
    "{label} {style}",
    "a {label}, {style} style",
    "{style} {label}",
    "the {label} drawn in {style} style",
    "{label}",
    "an emoji of a {label}",
)


def build_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's convention: lower case, words end in ``</w>``, start and end tokens."""
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    reference = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    bpe.normalizer = reference.backend_tokenizer.normalizer
    bpe.pre_tokenizer = reference.backend_tokenizer.pre_tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 2 - len(alphabet),
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(captions, trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    # CLIP's order: bytes, bytes at a word's end, merges, the two special tokens last.
    symbols = sorted(alphabet)
    ordered = symbols + [s + "</w>" for s in symbols]
    ordered += [a + b for a, b in merges if a + b not in set(ordered)]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(ordered))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_LENGTH)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": MAX_LENGTH,
        "projection_dim": EMBEDDING_DIM,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "hidden_act": "quick_gelu",
    }
    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
        "projection_dim": EMBEDDING_DIM,
        "hidden_act": "quick_gelu",
    }
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING_DIM))


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random scale, shift and small rotation on a white canvas, then 64x64 in [-1, 1]. `pixels`: (B, 3, 128, 128)."""
    batch = len(pixels)
    scale = 0.85 + 0.5 * torch.rand(batch, generator=generator)
    angle = (torch.rand(batch, generator=generator) - 0.5) * 0.35
    shift = (torch.rand(batch, 2, generator=generator) - 0.5) * 0.25
    cos, sin = torch.cos(angle), torch.sin(angle)
    theta = torch.stack([cos, -sin, shift[:, 0], sin, cos, shift[:, 1]], dim=1).view(batch, 2, 3)
    theta[:, :, :2] *= scale[:, None, None]
    # White is 0 after this inversion, so grid_sample's zero padding paints white.
    inverted = 1 - pixels.float() / 255
    inverted = F.avg_pool2d(inverted, 2)
    grid = F.affine_grid(theta, (batch, 3, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    return 1 - 2 * F.grid_sample(inverted, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def image_features(model: CLIPModel, pixel_values: torch.Tensor, keep: float) -> torch.Tensor:
    """The image tower on a random part `keep` of the patches (all of them at 1), blank ones dropped first."""
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    if keep < 1:
        batch, patches = len(hidden), hidden.shape[1] - 1
        darkness = F.avg_pool2d(1 - pixel_values, tower.config.patch_size).flatten(2).mean(1)
        order = (torch.rand(batch, patches) + 0.7 * (darkness > 0.01)).argsort(dim=1, descending=True)
        order = order[:, : int(keep * patches)] + 1
        chosen = hidden.gather(1, order[:, :, None].expand(-1, -1, hidden.shape[2]))
        hidden = torch.cat([hidden[:, :1], chosen], dim=1)
    hidden = tower.encoder(inputs_embeds=hidden).last_hidden_state
    return model.visual_projection(tower.post_layernorm(hidden[:, 0]))


def text_features(model: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """The text tower on short and long captions apart, so that the short ones carry no padding."""
    lengths = torch.tensor([len(ids) for ids in tokenizer(captions).input_ids])
    order = lengths.argsort()
    features = []
    for part in order.chunk(4):
        tokens = tokenizer([captions[i] for i in part], padding=True, truncation=True, return_tensors="pt")
        features.append(model.get_text_features(**tokens).pooler_output)
    return torch.cat(features)[order.argsort()]


def clip_loss(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE at the learnt temperature."""
    logits = scale.exp().clamp(max=100) * F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T
    labels = torch.arange(len(logits))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def draw_caption(pictures: Pictures, index: int, draw: random.Random) -> str:
    captions = pictures.captions[index]
    # The tags caption, where there is one, is the last.
    if len(captions) > 3 and draw.random() < 0.3:
        words = captions[-1].rsplit(", ", 1)[0].split(", ")
        chosen = draw.sample(words, min(len(words), draw.randint(1, 4)))
        head = [pictures.labels[index]] if draw.random() < 0.4 else []
        return ", ".join([*head, *chosen, f"{pictures.styles[index]} style"])
    return draw.choice(TEMPLATES).format(label=pictures.labels[index], style=pictures.styles[index])


@torch.no_grad()
def evaluate(model: CLIPModel, tokenizer: CLIPTokenizer, pictures: Pictures) -> dict[str, float]:
    """Text-to-image retrieval by the first caption, ranked among `pictures` themselves, and the centroid gap."""
    processor_view = F.interpolate(pictures.pixels.float(), size=IMAGE_SIZE, mode="bicubic", antialias=True)
    pixel_values = processor_view.clamp(0, 255) / 127.5 - 1
    image = torch.cat([F.normalize(image_features(model, x, 1.0), dim=-1) for x in pixel_values.split(256)])
    tokens = tokenizer([c[0] for c in pictures.captions], padding="max_length", truncation=True, return_tensors="pt")
    text = F.normalize(model.get_text_features(**tokens).pooler_output, dim=-1)
    similarity = text @ image.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    return {
        "r@1": (rank < 1).float().mean().item(),
        "r@5": (rank < 5).float().mean().item(),
        "r@10": (rank < 10).float().mean().item(),
        "centroid_gap": (text.mean(0) - image.mean(0)).norm().item(),
        "pictures": len(pictures),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/clip"))
    parser.add_argument("--steps", type=int, default=850)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--keep", type=float, default=0.3, help="part of the patches seen, but in the last tenth")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    train = load_pictures("train")
    held_out = load_pictures("combination")
    tokenizer = build_tokenizer([caption for captions in train.captions for caption in captions])
    model = build_clip(tokenizer)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=arguments.learning_rate,
        betas=(0.9, 0.98),
    )
    step = load(arguments.output / "checkpoint", {"model": model}, optimizer)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(tokenizer)} tokens", flush=True)
    started, warm_up = time.time(), 60
    while step < arguments.steps:
        seed = arguments.seed * 1_000_003 + step
        torch.manual_seed(seed)
        generator, draw = torch.Generator().manual_seed(seed), random.Random(seed)
        progress = step / arguments.steps
        rate = min(1, (step + 1) / warm_up) * (0.01 + 0.495 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate
        index = torch.randperm(len(train), generator=generator)[: arguments.batch].tolist()
        keep = arguments.keep if progress < 0.9 else 0.65
        image = image_features(model, augment(train.pixels[index], generator), keep)
        text = text_features(model, tokenizer, [draw_caption(train, i, draw) for i in index])
        loss = clip_loss(image, text, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.4f} {time.time() - started:.0f} s", flush=True)
        if step % 200 == 0 or step == arguments.steps:
            model.eval()
            print(json.dumps(evaluate(model, tokenizer, held_out)), flush=True)
            model.train()
        if step % 50 == 0 or step == arguments.steps:
            save(arguments.output / "checkpoint", step, {"model": model}, optimizer)
    model.eval().save_pretrained(arguments.output / "model")
    tokenizer.save_pretrained(arguments.output / "model")
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(arguments.output / "model")
    figures = {split: evaluate(model, tokenizer, load_pictures(split)) for split in ("combination", "concept")}
    (arguments.output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
