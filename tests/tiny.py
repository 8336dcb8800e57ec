"""Tiny random but real components: every test that needs a model gets one of these, never a mock."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def build_tiny_tokenizer(max_length: int = 16):
    """A `CLIPTokenizer` over single bytes, so that any text has an encoding."""
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = alphabet + [symbol + "</w>" for symbol in alphabet]
    merges = [("a", "p"), ("r", "e"), ("re", "d</w>"), ("ap", "p"), ("e", "r</w>"), ("l", "e</w>"), ("app", "le</w>")]
    symbols += [left + right for left, right in merges]
    vocabulary = {symbol: index for index, symbol in enumerate([*symbols, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=max_length)


def make_tiny_clip(path: str | Path, dim: int = 16, seed: int = 0) -> Path:
    """A random `CLIPModel` folder (both towers, tokenizer, image processor) of projection dimension `dim`."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = build_tiny_tokenizer()
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower["projection_dim"] = dim
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text, vision = {**tower, **text}, {**tower, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=dim))
        # Default initial weights make every embedding alike; wider ones tell captions and pictures apart.
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    path = Path(path)
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(path)
    return path


def make_pictures(path: str | Path, count: int = 40, captions: Sequence[str] = ("thing {}",)) -> Path:
    """A folder of `count` pictures of noise about a colour, each with its captions."""
    draw = np.random.default_rng(0)
    path, rows = Path(path), []
    for index in range(count):
        pixels = draw.integers(0, 256, 3) + draw.normal(0, 30, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path / f"{index}.png")
        rows.append({"file_name": f"{index}.png", "captions": [caption.format(index) for caption in captions]})
    (path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def cloud(n: int, dim: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """`(n, dim)` normal numbers about `shift`."""
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def directions(count: int, each: int, spread: float = 0.05, seed: int = 0) -> tuple[torch.Tensor, list[str]]:
    """Points about `count` axes, `each` of one, with their names."""
    axes = torch.eye(2 * count)[torch.arange(count).repeat_interleave(each)]
    points = 5 * (axes + spread * cloud(count * each, 2 * count, seed))
    return points, [f"thing {i // each}" for i in range(count * each)]


def make_lora(clip: str | Path, metadata: dict, dim: int = 16):
    """A LoRA adapter in the text tower of a CLIP folder, with updates that are not zero."""
    from csdiff.adapters import LoRAAdapter

    torch.manual_seed(0)
    adapter = LoRAAdapter(embedding_dim=dim, text_encoder=str(clip), rank=2).eval()
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapter.metadata = dict(metadata)
    return adapter


def make_pairs(n: int, text_dim: int, image_dim: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Correlated text and image embeddings in two separate clouds, raw norms about 10, float32."""
    draw = np.random.default_rng(seed)
    maps = np.random.default_rng(12345)
    latent = draw.standard_normal((n, 12))
    text = latent @ maps.standard_normal((12, text_dim)) + 0.3 * draw.standard_normal((n, text_dim))
    image = latent @ maps.standard_normal((12, image_dim)) + 0.3 * draw.standard_normal((n, image_dim))
    text += 3 * maps.standard_normal(text_dim)
    image += 3 * maps.standard_normal(image_dim)
    text *= 10 / np.linalg.norm(text, axis=1).mean()
    image *= 10 / np.linalg.norm(image, axis=1).mean()
    return text.astype(np.float32), image.astype(np.float32)


def make_plain_store(
    path: str | Path, n: int = 64, text_dim: int = 16, image_dim: int = 16, seed: int = 0, unit_norm: bool = False
) -> Path:
    """A clip-retrieval folder of `n` pairs as anyone would write it: npy files and a parquet of captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, image = make_pairs(n, text_dim, image_dim, seed)
    if unit_norm:
        text /= np.linalg.norm(text, axis=1, keepdims=True)
        image /= np.linalg.norm(image, axis=1, keepdims=True)
    path = Path(path)
    for name, rows in (("text_emb", text), ("img_emb", image)):
        (path / name).mkdir(parents=True, exist_ok=True)
        np.save(path / name / f"{name}_0.npy", rows)
    (path / "metadata").mkdir(exist_ok=True)
    captions = [f"a picture of thing {index}" for index in range(n)]
    pq.write_table(pa.table({"caption": captions}), path / "metadata/metadata_0.parquet")
    return path
