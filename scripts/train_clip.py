"""Train the shipped tiny CLIP: a transformers ``CLIPModel`` with its own BPE tokenizer.

InfoNCE on images and captions, and two teachers on heads that are thrown away: EfficientNet-Lite0 tells the image
tower what things look like, MiniLM-L6-v2 tells the text tower what words mean that no caption has. Steps see half of
an image's patches (as FLIP does), blank ones dropped first. A caption is one of the image's own or a template, so that
free wording ("a red apple, 3d style") lies near the training captions.

    python scripts/train_clip.py    # after build_dataset.py and phrases.py; writes build/assets/clip/model
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from efficientnet import image_targets
from images import BUILD, Images, load_split, load_training, moved_view, sharp_view
from loop import DEVICE, Loop, indices, parse_arguments
from phrases import load_phrases
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

IMAGE_SIZE = 96
TOKENS = 24
PHRASE_TOKENS = 16
VOCABULARY = 6000
EMBEDDING_DIM = 256
KEEP = 0.5
CAPTIONS = 20
TEACHER_WEIGHT = 2.0
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
    "a {label}",
    "{label} in {style} style",
    "one {label}, {style} style",
)


def build_tokenizer(texts: list[str]) -> CLIPTokenizer:
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
    bpe.train_from_iterator(texts, trainer)
    merges = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    # CLIP's order: bytes, bytes at a word's end, merges, the two special tokens last.
    symbols = sorted(alphabet)
    ordered = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges)]
    vocabulary = {symbol: i for i, symbol in enumerate(dict.fromkeys(ordered))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    shared = {"num_attention_heads": 4, "projection_dim": EMBEDDING_DIM, "hidden_act": "quick_gelu"}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "max_position_embeddings": TOKENS,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 256,
        "intermediate_size": 1024,
        "num_hidden_layers": 6,
        "image_size": IMAGE_SIZE,
        "patch_size": 8,
    }
    configs = {"text_config": text | shared, "vision_config": vision | shared}
    return CLIPModel(CLIPConfig(**configs, projection_dim=EMBEDDING_DIM))


def image_tower(model: CLIPModel, views: Tensor, keep: float = 1.0) -> tuple[Tensor, Tensor]:
    """Embeddings and pooled states of views (B, 3, 96, 96), from a random part `keep` of the patches."""
    tower = model.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(views))
    if keep < 1:
        batch, patches = len(hidden), hidden.shape[1] - 1
        darkness = F.avg_pool2d(1 - views, tower.config.patch_size).flatten(2).mean(1)
        order = torch.rand(batch, patches, device=hidden.device) + 0.7 * (darkness > 0.01)
        chosen = order.argsort(dim=1, descending=True)[:, : int(keep * patches)] + 1
        hidden = torch.cat(
            [hidden[:, :1], hidden.gather(1, chosen[:, :, None].expand(-1, -1, hidden.shape[2]))], dim=1
        )
    pooled = tower.post_layernorm(tower.encoder(inputs_embeds=hidden).last_hidden_state[:, 0])
    return model.visual_projection(pooled), pooled


def text_tower(model: CLIPModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    pooled = model.text_model(input_ids=ids, attention_mask=mask).pooler_output
    return model.text_projection(pooled), pooled


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens["input_ids"].to(DEVICE), tokens["attention_mask"].to(DEVICE)


def write_captions(images: Images, index: int, draw: random.Random) -> list[str]:
    """The `CAPTIONS` captions of one image: every template, and random parts of its tags where it has some."""
    label, style = images.labels[index], images.styles[index]
    found = [template.format(label=label, style=style) for template in TEMPLATES]
    # The tags caption, where there is one, is the last.
    if len(images.captions[index]) > 3:
        tags = images.captions[index][3].rsplit(", ", 1)[0].split(", ")
        while len(found) < CAPTIONS:
            chosen = draw.sample(tags, draw.randint(1, min(len(tags), 4)))
            head = [label] if draw.random() < 0.5 else []
            found.append(", ".join([*head, *chosen, f"{style} style"]))
    return found + draw.choices(found, k=CAPTIONS - len(found))


@torch.no_grad()
def retrieval(model: CLIPModel, tokenizer: CLIPTokenizer, images: Images) -> dict[str, float]:
    """Text-to-image retrieval by the first caption among `images`, with standard errors, and the centroid gap."""
    views = (sharp_view(pixels.to(DEVICE), IMAGE_SIZE) for pixels in images.pixels.split(128))
    image = torch.cat([F.normalize(image_tower(model, view)[0].float(), dim=-1) for view in views])
    ids, mask = tokenize(tokenizer, [captions[0] for captions in images.captions], TOKENS)
    text = F.normalize(text_tower(model, ids, mask)[0].float(), dim=-1)
    similarity = text @ image.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(1)
    found = {"images": len(images), "centroid_gap": (text.mean(0) - image.mean(0)).norm().item()}
    for k in (1, 5, 10):
        share = (rank < k).float().mean().item()
        found |= {f"r@{k}": share, f"r@{k}_error": (share * (1 - share) / len(images)) ** 0.5}
    return found


def save_clip(model: CLIPModel, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """float16 files that load as float32: `dtype` in the config decides what transformers makes of them."""
    model.half().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    # As built, without the padding and truncation that training has set on it.
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def main() -> None:
    options = parse_arguments(__doc__, "clip", steps=1500, batch=1024, phrases=str(BUILD))
    images = load_training(options.further, options.every, DEVICE)
    phrases, phrase_targets = load_phrases(Path(options.phrases), options.every)
    targets, phrase_targets = image_targets(images.pixels), phrase_targets.to(DEVICE)

    # The tokenizer learns from what ships, three times as often as from the phrases.
    own = [caption for captions in load_split("train", options.every).captions for caption in captions]
    tokenizer = build_tokenizer(own * 3 + phrases)
    draw = random.Random(options.seed)
    captions = [caption for i in range(len(images)) for caption in write_captions(images, i, draw)]
    caption_ids, caption_mask = (x.view(len(images), CAPTIONS, -1) for x in tokenize(tokenizer, captions, TOKENS))
    phrase_ids, phrase_mask = tokenize(tokenizer, phrases, PHRASE_TOKENS)

    torch.manual_seed(options.seed)
    clip = build_clip(tokenizer).to(DEVICE)
    heads = nn.ModuleDict(
        {
            "image": nn.Linear(clip.config.vision_config.hidden_size, targets.shape[1]),
            "text": nn.Linear(clip.config.text_config.hidden_size, phrase_targets.shape[1]),
        }
    ).to(DEVICE)
    labels = torch.arange(options.batch, device=DEVICE)

    def losses() -> dict[str, Tensor]:
        row, caption = indices(len(images), options.batch), indices(CAPTIONS, options.batch)
        phrase = indices(len(phrases), options.batch)
        image, image_state = image_tower(clip, moved_view(images.pixels[row], IMAGE_SIZE), KEEP)
        text, _ = text_tower(clip, caption_ids[row, caption], caption_mask[row, caption])
        _, text_state = text_tower(clip, phrase_ids[phrase], phrase_mask[phrase])
        image, text = F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)
        logits = clip.logit_scale.exp().clamp(max=100) * image @ text.T
        seen, meant = heads["image"](image_state).float(), heads["text"](text_state).float()
        return {
            "info_nce": (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2,
            "image_teacher": 1 - F.cosine_similarity(seen, targets[row]).mean(),
            "text_teacher": 1 - F.cosine_similarity(meant, phrase_targets[phrase]).mean(),
        }

    loop = Loop(
        {"clip": clip, "heads": heads},
        losses,
        options.output,
        steps=options.steps,
        learning_rate=1e-3,
        decay=0.9,
        weight_decay=0.2,
        betas=(0.9, 0.98),
        weights={"image_teacher": TEACHER_WEIGHT, "text_teacher": TEACHER_WEIGHT},
        seed=options.seed,
    )
    held_out = load_split("combination", options.every)
    loop.run(report=lambda: retrieval(clip, tokenizer, held_out))
    print(json.dumps(retrieval(clip, tokenizer, held_out)))
    save_clip(clip, tokenizer, options.output / "model")


if __name__ == "__main__":
    main()
