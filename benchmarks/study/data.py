"""The data of the study, as embedding stores: the shipped images, and real CLIP pairs where there are some."""

import hashlib
import zlib
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from csdiff.embeddings import EmbeddingStore, embed, write_store
from csdiff.embeddings.config import EmbedConfig

ROOT = Path(__file__).resolve().parent.parent.parent
ASSETS, COCO = ROOT / "assets", ROOT.parent / "shared/data/coco500"
SPLITS = ("train", "combination", "concept")
COCO_DEVELOPMENT = 400
FEW = 512
HELD_OUT = 600


@dataclass
class Rows:
    """A store, in memory when it is asked for.

    Attributes:
        path: The store.
        rows: Those of its rows that are meant; None for all.
    """

    path: Path
    rows: np.ndarray | None = None

    @cached_property
    def store(self) -> EmbeddingStore:
        return EmbeddingStore.open(self.path)

    @cached_property
    def index(self) -> np.ndarray:
        return np.arange(len(self.store)) if self.rows is None else self.rows

    @cached_property
    def ids(self) -> Tensor:
        """`(N,)` image of each row."""
        numbers = self.store.image_numbers() if self.store.knows_images else np.arange(len(self.store))
        return torch.from_numpy(numbers[self.index])

    @cached_property
    def values(self) -> dict[str, Tensor]:
        return self.store.read(self.index)

    @property
    def text(self) -> Tensor:
        return self.values["text_embeds"].float()

    @property
    def image(self) -> Tensor:
        return self.values["image_embeds"].float()

    @property
    def captions(self) -> list[str] | None:
        known = self.store.metadata is not None and "caption" in self.store.metadata.names
        return self.store.captions(self.index) if known else None

    @property
    def concepts(self) -> list[str] | None:
        known = self.store.metadata is not None and "concept" in self.store.metadata.names
        return self.store.column("concept", self.index) if known else None

    @property
    def distinct(self) -> Tensor:
        """`(P, D)` image embeddings, each image once."""
        _, first = np.unique(self.ids.numpy(), return_index=True)
        return self.image[np.sort(first)]

    def images(self, chosen: Tensor) -> "Rows":
        """All captions of the given images."""
        return Rows(self.path, self.index[torch.isin(self.ids, chosen).numpy()])

    def first_captions(self) -> "Rows":
        """One row an image."""
        _, first = np.unique(self.ids.numpy(), return_index=True)
        return Rows(self.path, self.index[np.sort(first)])

    def written(self, folder: Path) -> Path:
        """A store of these rows alone, written if it is not there yet; the store itself where they are all."""
        if self.rows is None:
            return self.path
        if not folder.exists():
            write_store(
                folder,
                **self.values,
                captions=self.captions,
                image_ids=[str(number) for number in self.ids.tolist()],
                fingerprint=self.store.fingerprint,
                dtype="float32",
            )
        return folder


@dataclass
class Study:
    """One data set: what is fitted, and what is measured, by name of the split.

    Attributes:
        fit: Rows that methods are fitted to.
        held_out: Rows that they are measured on.
        config: Configuration file whose recipe and budget all methods get.
        gallery: Images among which validation rows find theirs; None for their own. The tiny CLIP was trained on the
            validation rows of the shipped data, so that they find theirs too easily among few.
    """

    fit: Rows
    held_out: dict[str, Rows]
    config: str
    gallery: Rows | None = None


def available() -> list[str]:
    """Names of the data sets that are on this machine."""
    return ["shipped", "few", *(["coco500"] if COCO.is_dir() else [])]


@cache
def assets_sha256() -> str:
    """Hash of the data and the encoders that the study is made on."""
    digest = hashlib.sha256()
    for file in sorted([*ASSETS.glob("data/*.parquet"), *ASSETS.glob("clip/*.safetensors")]):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def load(name: str, seed: int, folder: Path, validation: bool = False) -> Study:
    """A data set.

    Args:
        name: "shipped", "few" (512 images of it), "coco500", or "random" (small random pairs, to test the script).
        seed: Of the subsample that is fitted to, where it is one.
        folder: Folder that keeps the stores.
        validation: Measure on a part held out of the *fitted* rows, as the sweeps do; otherwise on the test splits.
    """
    if name == "random":
        path = _written(folder / "random", _random)
        rows = np.arange(160)
        return Study(Rows(path, rows[:120]), {"test": Rows(path, rows[120:])}, "embeddings.yaml")
    if name == "coco500":
        path = _written(folder / "coco500", _coco)
        order = torch.randperm(COCO_DEVELOPMENT, generator=torch.Generator().manual_seed(seed)).numpy()
        if validation:
            return Study(Rows(path, order[100:]), {"validation": Rows(path, order[:100])}, "embeddings.yaml")
        # Nine tenths of the development part: seeds differ by their data too, and so do the error bars.
        test = np.arange(COCO_DEVELOPMENT, 500)
        return Study(Rows(path, order[: COCO_DEVELOPMENT * 9 // 10]), {"test": Rows(path, test)}, "embeddings.yaml")
    config = "tiny.yaml" if name == "shipped" else "embeddings.yaml"
    train = Rows(shipped("train", folder))
    held_out = {split: Rows(shipped(split, folder)).first_captions() for split in SPLITS[1:]}
    fitted = train
    if validation:
        out = torch.tensor([(zlib.crc32(concept.encode()) + seed) % 8 == 0 for concept in train.concepts])
        fitted, order = train.images(train.ids[~out].unique()), _shuffled(train.ids[~out], seed)
        held_out = {"concept": train.images(train.ids[out].unique()), "combination": fitted.images(order[:HELD_OUT])}
        held_out = {split: rows.first_captions() for split, rows in held_out.items()}
        fitted = fitted.images(order[HELD_OUT:])
    if name == "few":
        fitted = fitted.images(_shuffled(fitted.ids, seed)[:FEW])
    return Study(fitted, held_out, config, train.first_captions() if validation else None)


def _shuffled(ids: Tensor, seed: int) -> Tensor:
    known = ids.unique()
    return known[torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))]


def shipped(split: str, folder: Path) -> Path:
    """A store of a split of the shipped data, embedded once by the tiny CLIP with all captions."""
    path = folder / f"shipped-{split}-{assets_sha256()}"
    embed(
        EmbedConfig(
            source=str(ASSETS / f"data/{split}.parquet"),
            output=str(path),
            metadata_columns=["concept"],
            dtype="float32",
            progress=False,
        )
    )
    return path


def _written(path: Path, make) -> Path:
    if not path.exists():
        text, image = make()
        write_store(path, text_embeds=text, image_embeds=image, dtype="float32")
    return path


def _coco() -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(np.load(COCO / f"{side}_embeddings.npy")).float() for side in ("text", "image"))


def _random() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(160, 16, generator=generator) + 1
    return image + 0.5 * torch.randn(160, 16, generator=generator) - 2, image
