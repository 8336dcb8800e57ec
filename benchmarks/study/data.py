"""The data of the study: the shipped pictures embedded by the tiny CLIP, and real CLIP pairs where there are some."""

import io
import json
import zlib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent.parent
ASSETS, COCO = ROOT / "assets", ROOT.parent / "shared/data/coco500"
SPLITS = ("train", "combination", "concept")
COCO_DEVELOPMENT = 400


@dataclass
class Rows:
    """Captions with the embeddings of their pictures.

    Attributes:
        text: `(N, Dt)` raw text embeddings, one row a caption.
        image: `(N, D)` raw image embeddings of the same rows; a picture with several captions repeats.
        ids: `(N,)` picture of each row.
        captions: N texts; empty where they are not needed.
    """

    text: Tensor
    image: Tensor
    ids: Tensor
    captions: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, rows: Tensor) -> "Rows":
        captions = [self.captions[i] for i in rows.tolist()] if self.captions else []
        return Rows(self.text[rows], self.image[rows], self.ids[rows], captions)

    def pictures(self, chosen: Tensor) -> "Rows":
        """All captions of the given pictures."""
        return self[torch.isin(self.ids, chosen).nonzero()[:, 0]]

    @property
    def distinct(self) -> Tensor:
        """`(P, D)` image embeddings, each picture once."""
        _, inverse = self.ids.unique(return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(self)).scatter_reduce_(
            0, inverse, torch.arange(len(self)), "amin"
        )
        return self.image[first]


@dataclass
class Study:
    """One data set: what is fitted, and what is measured, by name of the split.

    Attributes:
        fit: Rows that methods are fitted to.
        held_out: Rows that they are measured on.
        encoder: Whether the text encoder that made the rows is at hand (for LoRA and tokens).
        config: Configuration file whose recipe and budget all methods get.
    """

    fit: Rows
    held_out: dict[str, Rows]
    encoder: bool
    config: str


def available() -> list[str]:
    """Names of the data sets that are on this machine."""
    return ["shipped", *(["coco500"] if COCO.is_dir() else [])]


def load(name: str, seed: int, folder: Path, validation: bool = False) -> Study:
    """A data set.

    Args:
        name: "shipped", "coco500", or "random" (small random pairs, for the test of the script).
        seed: Of the subsample of coco500 that is fitted to.
        folder: Folder that keeps the shipped embeddings.
        validation: Measure on a part held out of the *fitted* rows, as the sweeps do that choose the defaults;
            otherwise on the test splits.
    """
    if name == "random":
        return _random(seed)
    if name == "coco500":
        return _coco(seed, validation)
    rows = shipped(folder)
    if not validation:
        return Study(rows["train"], {s: rows[s] for s in SPLITS[1:]}, True, "tiny.yaml")
    held_out = torch.tensor([zlib.crc32(concept.encode()) % 8 == 0 for concept in shipped_concepts("train")])
    every = torch.arange(len(held_out))
    train = rows["train"]
    first = torch.cat([torch.tensor([True]), train.ids[1:] != train.ids[:-1]]).nonzero()[:, 0]
    return Study(
        train.pictures(every[~held_out]), {"validation": train[first].pictures(every[held_out])}, True, "tiny.yaml"
    )


def _coco(seed: int, validation: bool) -> Study:
    text, image = (torch.from_numpy(np.load(COCO / f"{side}_embeddings.npy")).float() for side in ("text", "image"))
    rows = Rows(text, image, torch.arange(len(text)))
    order = torch.randperm(COCO_DEVELOPMENT, generator=torch.Generator().manual_seed(seed))
    if validation:
        return Study(rows[order[100:]], {"validation": rows[order[:100]]}, False, "embeddings.yaml")
    # Nine tenths of the development part: seeds differ by their data too, and so do the error bars.
    test = torch.arange(COCO_DEVELOPMENT, len(text))
    return Study(rows[order[: COCO_DEVELOPMENT * 9 // 10]], {"test": rows[test]}, False, "embeddings.yaml")


def _random(seed: int) -> Study:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(160, 16, generator=generator) + 1
    text = image + 0.5 * torch.randn(160, 16, generator=generator) - 2
    rows = Rows(text, image, torch.arange(160))
    return Study(rows[torch.arange(120)], {"test": rows[torch.arange(120, 160)]}, False, "embeddings.yaml")


def shipped_concepts(split: str) -> list[str]:
    """Concept of every picture of a split."""
    import pyarrow.parquet as pq

    return pq.read_table(ASSETS / f"data/{split}.parquet", columns=["concept"])["concept"].to_pylist()


def shipped(folder: Path) -> dict[str, Rows]:
    """The shipped splits, embedded once; all captions of train, the first one of the test pictures."""
    import pyarrow.parquet as pq

    file, stamp = folder / "shipped.safetensors", folder / "shipped.json"
    captions = {
        s: pq.read_table(ASSETS / f"data/{s}.parquet", columns=["captions"])["captions"].to_pylist() for s in SPLITS
    }
    wanted = {"clip": zlib.crc32((ASSETS / "clip/model.safetensors").read_bytes())}
    if not file.is_file() or json.loads(stamp.read_text()) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(_embed(captions), file)
        stamp.write_text(json.dumps(wanted))
    tensors = load_file(file)
    result = {}
    for split in SPLITS:
        lists = captions[split] if split == "train" else [c[:1] for c in captions[split]]
        ids = torch.tensor([i for i, c in enumerate(lists) for _ in c])
        texts = [caption for c in lists for caption in c]
        result[split] = Rows(tensors[f"{split}.text"], tensors[f"{split}.image"][ids], ids, texts)
    return result


@torch.no_grad()
def _embed(captions: dict[str, list[list[str]]]) -> dict[str, Tensor]:
    from csdiff.embeddings import load_image_encoder, load_text_encoder

    text, image = load_text_encoder("tiny-clip"), load_image_encoder("tiny-clip")
    tensors = {}
    for split in SPLITS:
        lists = captions[split] if split == "train" else [c[:1] for c in captions[split]]
        texts = [caption for c in lists for caption in c]
        tensors[f"{split}.text"] = torch.cat(
            [text.encode(texts[i : i + 256]).embeds for i in range(0, len(texts), 256)]
        )
        parts = [image.encode(shipped_pictures(split, range(i, i + 64))).embeds for i in range(0, len(lists), 64)]
        tensors[f"{split}.image"] = torch.cat(parts)
    return {name: value.float().contiguous() for name, value in tensors.items()}


def shipped_pictures(split: str, places) -> list:
    """Pictures of a split by place; places behind the end are left out."""
    from PIL import Image

    files = _files(split)
    return [Image.open(io.BytesIO(files[i]["bytes"])).convert("RGB") for i in places if i < len(files)]


@cache
def _files(split: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(ASSETS / f"data/{split}.parquet", columns=["image"])["image"].to_pylist()
