"""Pictures of every adapter and baseline, drawn with one decoder and measured against reference pictures."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from csdiff.embeddings import load_text_encoder
from csdiff.embeddings.encoders import encoder_files
from csdiff.embeddings.layout import is_store
from csdiff.errors import CSDiffError
from csdiff.evaluation.baselines import baseline_predictions, cross_fitted_predictions
from csdiff.evaluation.config import EvaluateConfig
from csdiff.evaluation.drawing import PictureFolder, decoder_record, draw_missing, jobs
from csdiff.evaluation.extractors import ClipExtractor, Extractor, load_extractor
from csdiff.evaluation.picture_metrics import picture_metrics
from csdiff.evaluation.references import References, read_prompts
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.decoders import AdapterCard, check_pairing, resolve_decoder
from csdiff.pipelines.decoding import DrawingOptions, load_decoder
from csdiff.pipelines.embedding import PromptEmbedder, known_text_encoder, text_encoder_options
from csdiff.pipelines.generate import check_output_folder, sampling

SHOWN = 16
"""Prompts on the contact sheet."""
# No name of an extractor.
_CLIP = "CLIP of --clip"


class PictureRun:
    """Draws and measures pictures.

    Options, pairing and sources are checked here, networks that measure are loaded by :meth:`prepare`, and those that
    draw by :meth:`measure`.

    Args:
        config: Every option.
        cards: Adapters by name.

    Attributes:
        only: There is nothing but pictures to measure.
        sheet: After :meth:`measure`, pictures by name of their source, `reference` first, prompt by prompt.
        sheet_prompts: Prompts of the sheet.

    Raises:
        CSDiffError: bad input.
    """

    def __init__(self, config: EvaluateConfig, cards: dict[str, AdapterCard]):
        self.config, self.cards = config, cards
        source = config.pictures or config.data
        if is_store(source):
            raise CSDiffError(
                f"--pictures: expected captioned reference pictures, found the embedding store {source}; give the "
                "pictures it was made from."
            )
        if not Path(source).exists() and ("/" in source.strip("/") or Path(source).suffix):
            raise CSDiffError(f"--pictures {source}: expected captioned pictures, found nothing there.")
        self.decoder = resolve_decoder(config.decoder)
        self.first = next(iter(cards.values()))
        for card in cards.values():
            check_pairing(card, self.decoder)
            known_text_encoder(card, self.decoder)
        check_output_folder(config.output)
        self.steps, self.guidance = sampling(
            GenerateConfig(steps=config.steps, guidance=config.guidance), self.decoder
        )
        self.references = References.open(source, config.split, "pictures" if config.pictures else "data")
        self.own_prompts = config.prompts is None
        prompts = self.references.captions if self.own_prompts else read_prompts(config.prompts)
        count = min(config.num_prompts or len(prompts), len(prompts))
        self.places = torch.linspace(0, len(prompts) - 1, count).round().long().unique().tolist()
        self.prompts = [prompts[place] for place in self.places]
        self.jobs = jobs(self.prompts, config.num_images, config.seed)
        self.only = config.data is None
        self.baselines = [name for name in config.picture_baselines if name != "image" or self.own_prompts]
        if self.decoder.embedding_dim != self.first.text_dim:
            self.baselines = [name for name in self.baselines if name in ("ridge", "image")]
        self.extractors: dict[str, Extractor] = {}
        self.sheet: dict[str, list[Image.Image]] = {}
        self.shown = torch.linspace(0, len(self.prompts) - 1, min(SHOWN, len(self.prompts))).long().tolist()
        self.sheet_prompts = [self.prompts[row] for row in self.shown]

    def prepare(self, device: str) -> None:
        """Load what measures pictures, and see that the encoders are there: nothing is drawn in vain.

        Raises:
            CSDiffError: a package, an extractor or an encoder is missing.
        """
        if self.baselines:
            for side, known in self._encoders().items():
                encoder_files(known["id"], side, known.get("revision"))
        for card in self.cards.values():
            known = known_text_encoder(card, self.decoder)
            encoder_files(known["id"], "text", known.get("revision"))
        names = self.config.extractors or ["efficientnet-lite0"]
        self.extractors = {name: load_extractor(name, device) for name in dict.fromkeys(names)}
        self.clip = ClipExtractor(self.config.clip, device)
        self.texts = self._encode(load_text_encoder(self.config.clip, device), self.prompts)
        if self.texts.shape[1] != self.clip.dim:
            raise CSDiffError(f"clip: expected a CLIP model with one space for both sides, found {self.config.clip}.")

    def measure(self, device: str) -> tuple[dict, dict]:
        """Draw what is missing, and measure; after :meth:`prepare`.

        Returns:
            `{"adapters": {name: metrics}, "real": metrics}` and this part of the manifest.
        """
        extractors, clip, texts = self.extractors, self.clip, self.texts
        shown = [self.places[row] for row in self.shown] if self.own_prompts else []
        # The decoder's own image encoder is needed for baselines: usually the same model, read only once.
        self.references.extract({**extractors, _CLIP: clip}, shown, self.config.batch_size, self.config.progress)
        folders = self._draw(device)
        ids = torch.tensor([job.row for job in self.jobs])
        real = {name: self.references.features[name] for name in extractors}
        result = {}
        for name, folder in folders.items():
            features = self._features(name, folder, {**extractors, _CLIP: clip})
            drawn_clip = features.pop(_CLIP)
            result[name] = picture_metrics(
                features, real, drawn_clip, self.references.features[_CLIP], texts[ids], ids, self.config.seed
            )
        if self.own_prompts:
            self.sheet = {"reference": [self.references.thumbnails[place] for place in shown], **self.sheet}
        return {"adapters": result, "real": self._real(real, texts)}, self._manifest(extractors, clip, folders)

    def _real(self, features: dict[str, Tensor], texts: Tensor) -> dict:
        """Half of the reference pictures against the other half; prompts by their own reference pictures."""
        order = torch.randperm(
            len(self.references.captions), generator=torch.Generator().manual_seed(self.config.seed)
        )
        left, right = order[: len(order) // 2], order[len(order) // 2 :]
        clip = self.references.features[_CLIP]
        own = torch.tensor(self.places)
        ids = torch.arange(len(own))
        halves = {name: (value[left], value[right]) for name, value in features.items()}
        result = picture_metrics(
            {name: a for name, (a, _) in halves.items()},
            {name: b for name, (_, b) in halves.items()},
            clip[left],
            clip[right],
            clip[left],
            torch.arange(len(left)),
            self.config.seed,
        )
        for name in ("clip_score", "picture_to_prompt", "diversity"):
            result[name] = None
        if self.own_prompts and len(own) > 1:
            whole = picture_metrics({}, {}, clip[own], clip, texts, ids, self.config.seed)
            result |= {name: whole[name] for name in ("clip_score", "picture_to_prompt")}
        return result

    @torch.no_grad()
    def _draw(self, device: str) -> dict[str, PictureFolder]:
        config, folders = self.config, {}
        dtype = self.decoder.dtype("auto", torch.device(device))
        fitted = {
            "cross_fitted": self.own_prompts,
            "references": self.references.sha256,
            "prompts": _hash(self.prompts),
            "seed": config.seed,
            "encoders": {side: self.first.metadata.get(f"{side}_encoder") for side in ("text", "image")},
        }
        for name in [*self.cards, *self.baselines]:
            card = self.cards.get(name)
            made_by = {"adapter": card.sha256} if card else {"baseline": name, **fitted}
            settings = {
                **made_by,
                "decoder": self.decoder_record,
                "steps": self.steps,
                "guidance": self.guidance,
                "negative": self._negative_encoder(),
                "size": config.size,
                "dtype": str(dtype).removeprefix("torch."),
            }
            folders[name] = PictureFolder(config.output, name, settings)
        missing = {name: folder for name, folder in folders.items() if folder.missing(self.jobs)}
        if not missing:
            return folders
        embedded: dict[str, Tensor] = {}
        negative = None
        for name, card in self.cards.items():
            # One negative for all, whichever pictures are missing.
            guides = card is self.first and self.guidance > 1
            if name in missing or guides:
                embedder = PromptEmbedder(card, self.decoder, torch.device(device), dtype)
                negative = embedder.negative(None) if guides else negative
            if name in missing:
                embedded[name] = self._embed(embedder)
        if any(name in self.baselines for name in missing):
            embedded |= self._baselines(device, dtype)
        decoder = load_decoder(self.decoder, torch.device(device), dtype, offload=False, progress=False)
        options = DrawingOptions(self.steps, self.guidance, None, config.size, config.size)
        for name, folder in missing.items():
            draw_missing(
                folder, self.jobs, embedded[name], negative, decoder, options, config.batch_size, config.progress
            )
        return folders

    @cached_property
    def decoder_record(self) -> dict:
        """What the decoder is; its files are read once."""
        return decoder_record(self.decoder)

    def _negative_encoder(self) -> dict | None:
        """The image encoder behind the default negative, where there is one."""
        if self.guidance <= 1 or self.decoder.hand_over != "kandinsky":
            return None
        known = self.decoder.encoder("image") or self.first.metadata.get("image_encoder") or {}
        return {key: known.get(key) for key in ("id", "revision", "weights_sha256")}

    def _encoders(self) -> dict[str, dict]:
        """The encoders of the baselines, by side."""
        known = {
            side: self.first.metadata.get(f"{side}_encoder") or self.decoder.encoder(side)
            for side in ("text", "image")
        }
        if not all((value or {}).get("id") for value in known.values()):
            raise CSDiffError(
                f"picture_baselines: neither the adapter {self.first.path} nor the decoder {self.decoder.source} "
                "names the encoders they need; give --picture_baselines []."
            )
        return known

    def _embed(self, embedder: PromptEmbedder) -> Tensor:
        if embedder.samples:
            # Not the decoder's numbers again.
            generators = [torch.Generator("cpu").manual_seed(job.noise_seed + 1) for job in self.jobs]
            return embedder.embed([job.prompt for job in self.jobs], generators)
        return embedder.embed(self.prompts)[[job.row for job in self.jobs]]

    def _baselines(self, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
        """Image embeddings of the baselines, cross-fitted on the references where the prompts are their captions."""
        known = self._encoders()
        options = text_encoder_options(known["text"], self.first)
        encoder = load_text_encoder(known["text"]["id"], device, **options)
        captions = self._encode(encoder, self.references.captions)
        if known["image"]["id"] == self.config.clip:
            image = self.references.features[_CLIP]
        else:
            other = References(self.references.source, self.config.split, self.references.captions)
            extractor = ClipExtractor(known["image"]["id"], device, known["image"].get("revision"))
            other.extract({_CLIP: extractor}, [], self.config.batch_size, self.config.progress)
            image = other.features[_CLIP]
        if self.own_prompts:
            ids = torch.arange(len(captions))
            made = {
                name: value[self.places]
                for name, value in cross_fitted_predictions(captions, image, ids, seed=self.config.seed).items()
            }
            made["image"] = image[self.places]
        else:
            made = baseline_predictions(captions, image, self._encode(encoder, self.prompts))
        rows = [job.row for job in self.jobs]
        return {name: value[rows].to(device, dtype) for name, value in made.items()}

    @staticmethod
    def _encode(encoder, texts: list[str]) -> Tensor:
        parts = [
            encoder.encode(texts[start : start + 128]).embeds.float().cpu() for start in range(0, len(texts), 128)
        ]
        return torch.cat(parts)

    def _features(self, name: str, folder: PictureFolder, extractors: dict[str, Extractor]) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {key: [] for key in extractors}
        shown: dict[int, Image.Image | None] = dict.fromkeys(self.shown)
        for start in tqdm(
            range(0, len(self.jobs), self.config.batch_size),
            desc=f"features of {name}",
            disable=not self.config.progress,
        ):
            batch = self.jobs[start : start + self.config.batch_size]
            pictures = [folder.read(job) for job in batch]
            for job, picture in zip(batch, pictures, strict=True):
                if job.row in shown and job.image == 0:
                    shown[job.row] = picture
            for key, extractor in extractors.items():
                parts[key].append(extractor(pictures))
        self.sheet[name] = list(shown.values())
        return {key: torch.cat(values) for key, values in parts.items()}

    def _manifest(self, extractors: dict[str, Extractor], clip: Extractor, folders: dict[str, PictureFolder]) -> dict:
        return {
            "prompts": {
                "source": self.config.prompts or self.references.source,
                "count": len(self.prompts),
                "sha256": _hash(self.prompts),
            },
            "references": {
                "source": self.references.source,
                "count": len(self.references.captions),
                "sha256": self.references.sha256,
            },
            "seeds": [self.config.seed + image for image in range(self.config.num_images)],
            "noise": "one torch generator a picture, on the CPU, seeded with the first 12 hexadecimal digits of "
            "sha256(prompt, number of equal prompts before it, seed)",
            "decoder": self.decoder_record,
            "steps": self.steps,
            "guidance": self.guidance,
            "size": self.config.size,
            "batch_size": self.config.batch_size,
            "extractors": {name: extractor.describe() for name, extractor in extractors.items()},
            "clip": clip.describe(),
            "folders": {name: str(folder.path) for name, folder in folders.items()},
        }


def _hash(prompts: list[str]) -> str:
    """Hash of a list of prompts, in order."""
    return hashlib.sha256(json.dumps(prompts, ensure_ascii=False).encode()).hexdigest()
