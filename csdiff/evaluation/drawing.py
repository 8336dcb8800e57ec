"""The pictures of a list of prompts, kept on disk, so that an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from csdiff.embeddings.fingerprint import file_sha256
from csdiff.errors import CSDiffError
from csdiff.files import write_json, writing
from csdiff.pipelines.decoders import DecoderSource


@dataclass(frozen=True)
class Job:
    """One picture to draw."""

    prompt: str
    row: int
    """Number of the prompt in the list."""
    key: str
    """Names the picture; follows from the prompt, its repetition and the seed."""

    @property
    def noise_seed(self) -> int:
        """Seed of the decoder's noise: another one for every picture, the same for every adapter."""
        return int(self.key[:12], 16)


def jobs(prompts: list[str], num_images: int, seed: int) -> list[Job]:
    """The pictures of a prompt list, prompt by prompt; an equal prompt further down has other noise."""
    seen: Counter[str] = Counter()
    result = []
    for row, prompt in enumerate(prompts):
        for image in range(num_images):
            text = f"{prompt}\n{seen[prompt]}\n{seed + image}"
            result.append(Job(prompt, row, hashlib.sha256(text.encode()).hexdigest()[:32]))
        seen[prompt] += 1
    return result


class PictureFolder:
    """Pictures of one source of embeddings, drawn with one decoder and one setting.

    The name of the folder, for people the name of the adapter or baseline, ends with a hash of everything that decides
    the pictures but prompt and seed, so that those of another adapter, decoder or setting are never taken for these.
    """

    def __init__(self, output: str | Path, name: str, settings: dict):
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in name).strip(".")[-40:] or "adapter"
        self.path, self.settings = Path(output) / f"{readable}-{digest}", settings

    def file(self, job: Job) -> Path:
        """Where a picture is, or will be."""
        return self.path / f"{job.key}.png"

    def missing(self, wanted: list[Job]) -> list[int]:
        """Places in the list of those that are not drawn yet."""
        return [place for place, job in enumerate(wanted) if not self.file(job).is_file()]

    def write(self, job: Job, picture: Image.Image) -> None:
        """Write a picture, whole or not at all."""
        if not self.path.is_dir():
            self.path.mkdir(parents=True)
            write_json(self.path / "settings.json", self.settings)
        with writing(self.file(job), "wb") as file:
            picture.save(file, format="PNG")

    def read(self, job: Job) -> Image.Image:
        """A picture that is there; CSDiffError for a file that is none."""
        try:
            with Image.open(self.file(job)) as picture:
                return picture.convert("RGB")
        except OSError as error:
            raise CSDiffError(
                f"{self.file(job)}: expected a drawn picture, found a damaged file ({error}); delete it to have it "
                f"drawn again."
            ) from error


def decoder_record(decoder: DecoderSource) -> dict:
    """What a decoder is; of a local folder the hash of all its weights and settings."""
    record = {"source": decoder.source, "class": decoder.class_name, "ip_adapter": decoder.ip_adapter, "sha256": None}
    if Path(decoder.source).is_dir():
        digest = hashlib.sha256()
        for file in sorted(Path(decoder.source).rglob("*")):
            if file.suffix in (".safetensors", ".json"):
                digest.update(f"{file.relative_to(decoder.source).as_posix()} {file_sha256(file)}\n".encode())
        record["sha256"] = digest.hexdigest()
    return record
