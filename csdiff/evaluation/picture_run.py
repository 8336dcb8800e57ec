"""Pictures of every adapter and baseline, drawn with one decoder and measured against reference pictures.

A picture is a file named after its prompt and seed, in a folder named after everything else that decides it: an
interrupted run goes on, and what another adapter, decoder or setting drew is never taken for it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from csdiff.data.images import UnreadableImage, decode_image
from csdiff.data.items import Item
from csdiff.data.opening import open_source
from csdiff.embeddings import load_text_encoder
from csdiff.embeddings.encoders import encoder_files, find_encoder
from csdiff.embeddings.fingerprint import file_sha256
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.config import EvaluateConfig
from csdiff.evaluation.extractors import ClipExtractor, Extractor, load_extractor
from csdiff.evaluation.picture_metrics import cmmd, prompt_metrics, space_metrics
from csdiff.files import write_json, writing
from csdiff.kinds import is_store
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, DecoderSource, check_pairing, resolve_decoder
from csdiff.pipelines.decoding import load_decoder
from csdiff.pipelines.embedding import PromptEmbedder, known_text_encoder, noise, text_encoder_options
from csdiff.pipelines.generate import check_output_folder, read_prompts

SHOWN = 16
"""Prompts on the contact sheet."""
# No name of an extractor.
_CLIP = "CLIP of --clip"


class PictureRun:
    """Draws and measures pictures.

    Options, pairing and sources are checked here, networks that measure are loaded by :meth:`load`, and those that
    draw by :meth:`measure`. Bad input is a CSDiffError.
    """

    def __init__(self, config: EvaluateConfig, cards: dict[str, AdapterCard], device: str):
        self.config, self.cards, self.device = config, cards, torch.device(device)
        self.first, self.source = next(iter(cards.values())), config.pictures or config.data
        if is_store(self.source):
            raise CSDiffError(
                f"--pictures: expected captioned reference pictures, found the embedding store {self.source}; give "
                "the pictures it was made from."
            )
        self.decoder = resolve_decoder(config.decoder)
        for card in cards.values():
            check_pairing(card, self.decoder)
        check_output_folder(config.output)
        asked = {name: getattr(config, name) for name in ("steps", "guidance", "batch_size")}
        asked |= {"height": config.size, "width": config.size, "prompts_file": config.prompts}
        self.options = self.decoder.sampling(GenerateConfig(**asked, progress=False))
        self.dtype = self.decoder.dtype(self.options.dtype, self.device)
        self.sampling = {
            "decoder": _decoder_record(self.decoder),
            "size": config.size,
            "steps": self.options.steps,
            "guidance": self.options.guidance,
        }
        self.captions = [item.captions[0] for item in self._items()]
        self.own_prompts = config.prompts is None
        prompts = self.captions if self.own_prompts else read_prompts(self.options)
        # Which of the prompts are drawn.
        self.places = _spread(len(prompts), config.num_prompts or len(prompts))
        self.prompts = [prompts[place] for place in self.places]
        for what, least, found, place in (
            ("pictures with captions", 4, self.captions, self.source),
            ("prompts", 2, self.prompts, config.prompts),
        ):
            if len(found) < least:
                raise CSDiffError(f"{place}: expected at least {least} {what}, found {len(found)}.")
        # Of every picture its file, and the number of its prompt.
        self.files = picture_files(self.prompts, config.num_images, config.seed)
        self.rows = torch.arange(len(self.prompts)).repeat_interleave(config.num_images)
        self.baselines = [name for name in config.picture_baselines if name != "image" or self.own_prompts]
        if self.decoder.embedding_dim != self.first.text_dim:
            self.baselines = [name for name in self.baselines if name in ("ridge", "image")]
        self.references_sha256 = ""

    def load(self) -> None:
        """Load what measures pictures, and see that the encoders are there: nothing is drawn in vain."""
        needed = [("text", known_text_encoder(card, self.decoder)) for card in self.cards.values()]
        if self.baselines:
            needed.append(("image", self._encoders()[1]))
        for side, known in needed:
            encoder_files(known["id"], side, known.get("revision"))
        names = self.config.extractors or ["efficientnet-lite0"]
        self.extractors = {name: load_extractor(name, self.device) for name in dict.fromkeys(names)}
        self.clip = ClipExtractor(self.config.clip, self.device)
        self.networks = {**self.extractors, _CLIP: self.clip}
        self.texts = _encode(load_text_encoder(self.config.clip, self.device), self.prompts)
        if self.texts.shape[1] != self.clip.dim:
            raise CSDiffError(f"clip: expected a CLIP model with one space for both sides, found {self.config.clip}.")

    def measure(self) -> tuple[dict, dict]:
        """Draw what is missing, and measure; after :meth:`load`.

        Returns:
            `{"adapters": {name: metrics}, "real": metrics}` and this part of the manifest. Metrics are `count`,
            `spaces` (by extractor: `fid`, `fid_extrapolated`, `kid`, `kid_std`), `cmmd`, and those of prompts.
        """
        self.real = self._features(self._references(), self.networks, "reference pictures", len(self.captions))
        folders = self.folders()
        self._draw(folders)
        result = {}
        for name, folder in folders.items():
            pictures = (read_picture(folder / file) for file in self.files)
            drawn = self._features(pictures, self.networks, f"features of {name}", len(self.files))
            prompted = prompt_metrics(drawn[_CLIP], self.texts[self.rows], self.rows)
            result[name] = {**self._distances(drawn, self.real), **prompted}
        return {"adapters": result, "real": self._real()}, self._manifest(folders)

    def folders(self) -> dict[str, Path]:
        """Where the pictures of each adapter and baseline are, or will be: for people the folder has its name."""
        found = {}
        for name in (*self.cards, *self.baselines):
            readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")[-40:] or "adapter"
            digest = hashlib.sha256(json.dumps(self._settings(name), sort_keys=True).encode()).hexdigest()[:12]
            found[name] = Path(self.config.output) / f"{readable}-{digest}"
        return found

    def sheet(self) -> tuple[list[str], dict[str, list[Image.Image]]]:
        """Some prompts, and their pictures by name of the source, `reference` first; after :meth:`measure`."""
        rows, columns = _spread(len(self.prompts), SHOWN), {}
        if self.own_prompts:
            shown = {self.places[row] for row in rows}
            items = (item for place, item in enumerate(self._items()) if place in shown)
            columns["reference"] = [decode_image(item.image) for item in items]
        for name, folder in self.folders().items():
            columns[name] = [read_picture(folder / self.files[row * self.config.num_images]) for row in rows]
        return [self.prompts[row] for row in rows], columns

    def _distances(self, drawn: dict[str, Tensor], real: dict[str, Tensor]) -> dict:
        spaces = {name: space_metrics(drawn[name], real[name], self.config.seed) for name in self.extractors}
        return {"count": len(drawn[_CLIP]), "spaces": spaces, "cmmd": cmmd(drawn[_CLIP], real[_CLIP])}

    def _real(self) -> dict:
        """Half of the reference pictures against the other half; prompts by their own reference pictures."""
        count = len(self.captions)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(self.config.seed))
        left, right = (
            {name: value[rows] for name, value in self.real.items()} for rows in order.tensor_split([count // 2])
        )
        own = dict.fromkeys(("clip_score", "picture_to_prompt", "diversity"))
        if self.own_prompts:
            own = prompt_metrics(self.real[_CLIP][self.places], self.texts, torch.arange(len(self.places)))
        return {**self._distances(left, right), **own}

    def _items(self) -> Iterator[Item]:
        """Captioned pictures of the source."""
        source = open_source(self.source, split=self.config.split)
        if not (source.has_images and source.has_captions):
            raise CSDiffError(f"{self.source}: expected pictures with captions, found only one of the two.")
        for item in source:
            if isinstance(item, Item) and item.image is not None and item.captions and item.captions[0].strip():
                yield item

    def _references(self) -> Iterator[Image.Image]:
        """The reference pictures, decoded; at their end the hash of captions and pixels is known."""
        digest = hashlib.sha256()
        for item in self._items():
            try:
                picture = decode_image(item.image)
            except UnreadableImage as error:
                raise CSDiffError(
                    f"{self.source}: the picture {item.id} cannot be decoded ({error}); remove it."
                ) from error
            digest.update(item.captions[0].encode() + np.asarray(picture).tobytes())
            yield picture
        self.references_sha256 = digest.hexdigest()

    def _features(
        self, pictures: Iterable[Image.Image], extractors: dict[str, Extractor], title: str, count: int
    ) -> dict[str, Tensor]:
        """Features `(count, D)` of pictures, by the name of the extractor, one batch at a time."""
        parts: dict[str, list[Tensor]] = {name: [] for name in extractors}
        pictures = iter(tqdm(pictures, title, count, disable=not self.config.progress))
        while batch := list(islice(pictures, self.config.batch_size)):
            for name, extractor in extractors.items():
                parts[name].append(extractor(batch))
        return {name: torch.cat(values) for name, values in parts.items()}

    @torch.no_grad()
    def _draw(self, folders: dict[str, Path]) -> None:
        """Draw what is missing in the folders of these names."""
        missing = {}
        for name, folder in folders.items():
            if places := [place for place, file in enumerate(self.files) if not (folder / file).is_file()]:
                missing[name] = torch.tensor(places)
        if not missing:
            return
        embedded: dict[str, Tensor] = {}
        prompts, negative = [self.prompts[row] for row in self.rows], None
        for name, card in self.cards.items():
            if name in missing or card is self.first:
                embedder = PromptEmbedder(card, self.decoder, self.options, self.device)
                # Not the decoder's numbers again.
                embedded[name] = embedder.embed(prompts, [noise(_seed(file) + 1) for file in self.files])
            if card is self.first:
                # One negative for all, whichever pictures are missing.
                negative = embedder.negative(self.options)
        if any(name in self.baselines for name in missing):
            embedded |= self._baselines()
        decoder = load_decoder(self.decoder, self.options, self.device)
        for name, places in missing.items():
            folders[name].mkdir(parents=True, exist_ok=True)
            write_json(folders[name] / "settings.json", self._settings(name))
            files = [self.files[place] for place in places]
            asked, own = [prompts[place] for place in places], [noise(_seed(file)) for file in files]
            drawn = decoder.draw(asked, embedded[name][places], negative, own, self.options)
            drawn = tqdm(drawn, f"drawing {name}", len(files), disable=not self.config.progress)
            for file, picture in zip(files, drawn, strict=True):
                with writing(folders[name] / file, "wb") as opened:
                    picture.save(opened, format="PNG")

    def _settings(self, name: str) -> dict:
        """Everything that decides the pictures of an adapter or a baseline, but prompt and seed."""
        if name in self.cards:
            made_by = {"adapter": self.cards[name].sha256}
        else:
            made_by = {
                "baseline": name,
                "cross_fitted": self.own_prompts,
                "references": self.references_sha256,
                "prompts": _hash(self.prompts),
                "seed": self.config.seed,
                "encoders": {side: self.first.metadata.get(f"{side}_encoder") for side in ("text", "image")},
            }
        negative = None
        if self.options.guidance > 1 and self.decoder.hand_over == "kandinsky":
            # The image encoder behind the default negative.
            known = self.decoder.image_encoder or self.first.metadata.get("image_encoder") or {}
            negative = {key: known.get(key) for key in ("id", "revision", "weights_sha256")}
        return {**made_by, **self.sampling, "negative": negative, "dtype": str(self.dtype).removeprefix("torch.")}

    def _encoders(self) -> tuple[dict, dict]:
        """The text and the image encoder of the baselines."""
        image = self.first.metadata.get("image_encoder") or self.decoder.image_encoder
        of = f"the adapter {self.first.path}"
        return known_text_encoder(self.first, self.decoder), find_encoder(image, "image", of=of)

    def _baselines(self) -> dict[str, Tensor]:
        """Image embeddings of the baselines, cross-fitted on the references where the prompts are their captions."""
        text, known = self._encoders()
        encoder = load_text_encoder(text["id"], self.device, **text_encoder_options(text, self.first.metadata))
        captions = _encode(encoder, self.captions)
        # Usually the very model of --clip, whose features are there.
        image = self.real[_CLIP]
        if known["id"] != self.config.clip:
            extractor = ClipExtractor(known["id"], self.device, known.get("revision"))
            title = "embedding reference pictures"
            image = self._features(self._references(), {_CLIP: extractor}, title, len(self.captions))[_CLIP]
        if self.own_prompts:
            made = cross_fitted_predictions(captions, image, torch.arange(len(captions)), seed=self.config.seed)
            made = {name: value[self.places] for name, value in {**made, "image": image}.items()}
        else:
            made = baseline_predictions(captions, image, _encode(encoder, self.prompts))
        return {name: value[self.rows].to(self.device, self.dtype) for name, value in made.items()}

    def _manifest(self, folders: dict[str, Path]) -> dict:
        config, prompts, references = self.config, _hash(self.prompts), self.references_sha256
        return {
            "prompts": {"source": config.prompts or self.source, "count": len(self.prompts), "sha256": prompts},
            "references": {"source": self.source, "count": len(self.captions), "sha256": references},
            "seeds": [config.seed + image for image in range(config.num_images)],
            "noise": "one torch generator a picture, on the CPU, seeded with the first 12 hexadecimal digits of "
            "sha256(prompt, number of equal prompts before it, seed)",
            **self.sampling,
            "batch_size": config.batch_size,
            "extractors": {name: extractor.describe() for name, extractor in self.extractors.items()},
            "clip": self.clip.describe(),
            "folders": {name: str(folder) for name, folder in folders.items()},
        }


def picture_files(prompts: list[str], num_images: int, seed: int) -> list[str]:
    """File names of the pictures of a prompt list, prompt by prompt.

    The noise of a picture follows from its name: other noise for an equal prompt further down, the same for every
    adapter.
    """
    seen: Counter[str] = Counter()
    files = []
    for prompt in prompts:
        for image in range(num_images):
            text = f"{prompt}\n{seen[prompt]}\n{seed + image}"
            files.append(f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.png")
        seen[prompt] += 1
    return files


def read_picture(file: Path) -> Image.Image:
    """A picture that was drawn; CSDiffError for a file that is none."""
    try:
        with Image.open(file) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise CSDiffError(
            f"{file}: expected a drawn picture, found a damaged file ({error}); delete it to have it drawn again."
        ) from error


def _seed(file: str) -> int:
    return int(file[:12], 16)


def _spread(count: int, most: int) -> list[int]:
    """At most so many of the first `count` numbers, evenly spread."""
    return torch.linspace(0, count - 1, min(most, count)).round().long().unique().tolist()


def _encode(encoder, texts: list[str]) -> Tensor:
    parts = [encoder.encode(texts[start : start + 128]).embeds.float().cpu() for start in range(0, len(texts), 128)]
    return torch.cat(parts)


def _hash(prompts: list[str]) -> str:
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()


def _decoder_record(decoder: DecoderSource) -> dict:
    """What a decoder is; of a local folder the hash of all its weights and settings."""
    record = {"source": decoder.source, "class": decoder.class_name, "ip_adapter": decoder.ip_adapter, "sha256": None}
    if Path(decoder.source).is_dir():
        digest = hashlib.sha256()
        for file in sorted(Path(decoder.source).rglob("*")):
            if file.suffix in (".safetensors", ".json"):
                digest.update(f"{file.relative_to(decoder.source).as_posix()} {file_sha256(file)}\n".encode())
        record["sha256"] = digest.hexdigest()
    return record
