"""Decoders and adapters as their files describe them, and which fit together; no weights are read."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from csdiff.embeddings.fingerprint import HUB_ID, check_same_encoder
from csdiff.errors import CSDiffError
from csdiff.files import read_json, read_safetensors_header
from csdiff.hub import unreachable
from csdiff.pipelines.config import GenerateConfig
from csdiff.pipelines.presets import FLUX_IP_ADAPTER_V2, PRESETS, SD15_IP_ADAPTER, SDXL_IP_ADAPTER, DecoderPreset
from csdiff.resources import assets_dir

if TYPE_CHECKING:
    import torch

# Pipeline classes that generate from text alone, by how they take an image embedding.
HAND_OVER = {
    "KandinskyV22Pipeline": "kandinsky",
    "KandinskyV22CombinedPipeline": "kandinsky",
    "KandinskyV22Img2ImgPipeline": "kandinsky",
    "UnCLIPPipeline": "unclip",
    "StableUnCLIPPipeline": "stable-unclip",
    "StableUnCLIPImg2ImgPipeline": "stable-unclip",
    "StableDiffusionPipeline": "ip-adapter",
    "StableDiffusionXLPipeline": "ip-adapter",
    "FluxPipeline": "flux-ip-adapter",
    "FluxKontextPipeline": "flux-ip-adapter",
}
# Where each kind states the width of its image embeddings.
_DIMENSION_FILES = {
    "kandinsky": ("unet/config.json", "encoder_hid_dim"),
    "unclip": ("text_proj/config.json", "clip_embeddings_dim"),
    "stable-unclip": ("image_normalizer/config.json", "embedding_dim"),
}
# What the projection of the image embedding is called in IP-Adapter files, of h94 and of XLabs.
_PROJECTIONS = {
    "ip-adapter": "image_proj.proj.weight",
    "flux-ip-adapter": "ip_adapter_proj_model.proj.weight",
}
# The IP-Adapter of a folder for which none is named.
_USUAL = {"StableDiffusionPipeline": SD15_IP_ADAPTER, "StableDiffusionXLPipeline": SDXL_IP_ADAPTER}


@dataclass(frozen=True)
class DecoderSource:
    """A decoder that was found, with nothing of it loaded yet.

    Attributes:
        source: Folder or hub repository.
        class_name: Pipeline class in its `model_index.json`.
        hand_over: See `DecoderPreset`.
        embedding_dim: D, from its configuration files.
        preset: The published decoder it is, if any.
        fingerprint: Its `csdiff.json`, if any.
        ip_adapter: Folder or repository, subfolder and file of IP-Adapter weights.
    """

    source: str
    class_name: str
    hand_over: str
    embedding_dim: int
    preset: DecoderPreset | None = None
    fingerprint: dict | None = None
    ip_adapter: tuple[str, str, str] | None = None

    def encoder(self, tower: str) -> dict | None:
        """What is known of its "text" or "image" encoder: `{"id", "weights_sha256", ...}`; None for nothing."""
        known = (self.fingerprint or {}).get(f"{tower}_encoder")
        return known or (self.preset and {"id": getattr(self.preset, f"{tower}_encoder")})

    def dtype(self, name: str, device: torch.device) -> torch.dtype:
        """The number format of an option's name; "auto" is float16 on CUDA (FLUX.1: bfloat16), else float32."""
        import torch

        if name == "auto":
            # FLUX.1 was trained in bfloat16 and overflows float16.
            half = "bfloat16" if self.hand_over == "flux-ip-adapter" else "float16"
            name = half if device.type == "cuda" else "float32"
        return getattr(torch, name)


def resolve_decoder(decoder: str | os.PathLike, ip_adapter: str | os.PathLike | None = None) -> DecoderSource:
    """Finds a decoder by preset, folder or hub repository; reads JSON and headers only.

    A folder is recognised by its `model_index.json`, and taken for a published decoder when class and width agree
    with a preset's and it has no `csdiff.json` of its own.

    Args:
        decoder: Name of a preset, folder saved by diffusers, or hub repository.
        ip_adapter: IP-Adapter weights for a Stable Diffusion or FLUX.1 decoder: a safetensors file, a folder with one,
            or `owner/name` or `owner/name/subfolder/file` on the hub.

    Raises:
        CSDiffError: nothing there, a pipeline of another class, or a configuration that does not state its width.
    """
    source, preset = str(decoder), PRESETS.get(str(decoder))
    if preset is not None:
        source = str(assets_dir() / "decoder") if preset.name == "tiny" else preset.repo
    elif not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise CSDiffError(
            f"decoder: expected a preset ({', '.join(PRESETS)}), a folder saved by diffusers, or a hub repository "
            f"(owner/name), found {source!r}."
        )
    class_name = read_json(_file(source, "model_index.json")).get("_class_name", "nothing")
    hand_over = HAND_OVER.get(class_name)
    if hand_over is None:
        raise CSDiffError(
            f"decoder: {source} holds a {class_name}; expected one of {', '.join(HAND_OVER)}. "
            "Other pipelines take the embeddings from CSDiffPriorPipeline in Python."
        )
    weights = None
    if hand_over in _PROJECTIONS:
        weights = ip_adapter and _ip_adapter_place(ip_adapter, hand_over)
        weights = weights or (preset and preset.ip_adapter) or _USUAL.get(class_name, FLUX_IP_ADAPTER_V2)
        embedding_dim = _ip_adapter_dim(weights, hand_over)
    elif ip_adapter is not None:
        raise CSDiffError(f"ip_adapter: a {class_name} takes image embeddings as it is; leave --ip_adapter out.")
    else:
        file, key = _DIMENSION_FILES[hand_over]
        embedding_dim = read_json(_file(source, file)).get(key)
        if not isinstance(embedding_dim, int):
            raise CSDiffError(
                f"decoder: {source}/{file} states no {key}; this {class_name} is not conditioned on image embeddings."
            )
    fingerprint = read_json(Path(source) / "csdiff.json") if (Path(source) / "csdiff.json").is_file() else None
    if fingerprint is None and (preset is None or preset.ip_adapter != weights):
        kind = (hand_over, embedding_dim, weights)
        alike = [p for p in PRESETS.values() if (p.hand_over, p.embedding_dim, p.ip_adapter) == kind]
        preset = alike[0] if alike else None
    return DecoderSource(source, class_name, hand_over, embedding_dim, preset, fingerprint, weights)


def _file(source: str, file: str) -> Path:
    """A file of a folder or of a hub repository."""
    if Path(source).is_dir():
        return Path(source) / file
    from huggingface_hub import hf_hub_download

    silent = unreachable()
    try:
        return Path(hf_hub_download(source, file, local_files_only=silent is not None))
    # every reason (no network, no such repository or file, gated) has one cure
    except Exception as error:
        raise CSDiffError(
            f"decoder: expected {file} of the hub repository {source}, found neither a local copy nor the hub "
            f"({silent or type(error).__name__}); download it where there is a network, or give a folder; with "
            "HF_HUB_OFFLINE=1 the hub is not asked."
        ) from error


def _ip_adapter_place(location: str | os.PathLike, hand_over: str) -> tuple[str, str, str]:
    """Folder or repository, subfolder and file."""
    path, name = Path(location), str(location)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) == 1 and files[0].is_file() and files[0].suffix == ".safetensors":
        return str(files[0].parent), "", files[0].name
    if HUB_ID.fullmatch(name) and not path.exists() and path.suffix not in (".safetensors", ".bin"):
        known = [p.ip_adapter for p in PRESETS.values() if p.ip_adapter and p.hand_over == hand_over]
        return next((place for place in known if place[0] == name), (name, "", known[-1][2]))
    parts = path.parts
    if path.exists() or path.is_absolute() or len(parts) < 3 or path.suffix != ".safetensors":
        found = f"a folder with {len(files)} of them" if path.is_dir() else "nothing of the kind"
        raise CSDiffError(
            "ip_adapter: expected a .safetensors file (pickled weights are not read), a folder with one, or "
            f"owner/name or owner/name/subfolder/file.safetensors on the hub, found {found} at {location}."
        )
    return "/".join(parts[:2]), "/".join(parts[2:-1]), parts[-1]


def _ip_adapter_dim(weights: tuple[str, str, str], hand_over: str) -> int:
    """Width of the image embeddings: a preset's, or from the header of the weights file."""
    known = [preset.embedding_dim for preset in PRESETS.values() if preset.ip_adapter == weights]
    if known:
        return known[0]
    path = _file(weights[0], "/".join(filter(None, weights[1:])))
    header = read_safetensors_header(path)
    found = next((kind for kind, key in _PROJECTIONS.items() if key in header), None)
    if found != hand_over:
        raise CSDiffError(
            f"ip_adapter: expected the projection {_PROJECTIONS[hand_over]} of one pooled image embedding, found "
            f"{'weights for the other kind of decoder' if found else 'none'} in {path}; give an IP-Adapter made for "
            "this decoder (not the plus, full-face or FaceID kinds, which read more than that)."
        )
    return header[_PROJECTIONS[found]][1][1]


@dataclass(frozen=True)
class AdapterCard:
    """What an adapter folder says of itself.

    Attributes:
        path: The folder.
        config: `config.json`, with `embedding_dim` and `text_dim`.
        metadata: `csdiff.json`.
    """

    path: Path
    config: dict
    metadata: dict

    @property
    def kind(self) -> str:
        """Class name of the adapter."""
        return self.config.get("_class_name", "unknown")

    @property
    def embedding_dim(self) -> int | None:
        """D, the width of the image embeddings it makes."""
        return self.config.get("embedding_dim")

    @property
    def text_dim(self) -> int | None:
        """Width of the text embeddings it takes."""
        return self.config.get("text_dim") or self.embedding_dim

    @cached_property
    def sha256(self) -> str:
        """Hash of the configuration and the weights as first read: the same for copies of one adapter."""
        digest = hashlib.sha256()
        files = [file for file in self.path.rglob("*") if file.suffix == ".safetensors" or file.name == "config.json"]
        for file in sorted(files):
            digest.update(file.relative_to(self.path).as_posix().encode())
            digest.update(file.read_bytes())
        return digest.hexdigest()


def read_adapter_card(adapter: str | os.PathLike) -> AdapterCard:
    """Reads the JSON files of an adapter folder or hub repository.

    Raises:
        CSDiffError: no such folder, a file is missing, or a JSON file is broken.
    """
    from csdiff.adapters import folder, hub

    path = hub.locate(adapter)
    config = folder.read_config(path)
    if not isinstance(config.get("embedding_dim"), int):
        raise CSDiffError(f"{path / folder.CONFIG} has no embedding_dim; it is not the configuration of an adapter.")
    return AdapterCard(path, config, folder.read_metadata(path))


def find_models(config: GenerateConfig) -> tuple[AdapterCard | None, DecoderSource]:
    """The adapter's card (None for the raw text embedding) and the decoder of a drawing, checked to fit.

    Raises:
        CSDiffError: nothing there, or the two do not fit.
    """
    decoder = resolve_decoder(config.decoder, config.ip_adapter)
    if config.adapter == "none":
        return None, decoder
    card = read_adapter_card(config.adapter or assets_dir() / "adapter")
    check_pairing(card, decoder)
    return card, decoder


def check_pairing(card: AdapterCard, decoder: DecoderSource) -> None:
    """Refuses an adapter of another width or for another image encoder than the decoder's.

    Raises:
        CSDiffError: naming what was expected and what was found.
    """
    where = f"the decoder {decoder.source}"
    check_dimensions(card.config, where, image_dim=decoder.embedding_dim)
    if card.metadata.get("normalized"):
        raise CSDiffError(
            f"adapter: {card.path} was trained on unit-norm embeddings, for retrieval; decoders want raw ones. "
            "Train on a store that kept the norms."
        )
    check_same_encoder(card.metadata.get("image_encoder"), decoder.encoder("image"), "image", "the adapter", where)


def check_dimensions(config, where: str, *, image_dim: int | None, text_dim: int | None = None) -> None:
    """Refuses an adapter whose embeddings have another width than `where` takes or gives; None is not checked.

    Raises:
        CSDiffError: naming both dimensions.
    """
    embedding_dim = config.get("embedding_dim")
    adapter_text_dim = config.get("text_dim") or embedding_dim
    if image_dim not in (None, embedding_dim):
        raise CSDiffError(
            f"The adapter makes image embeddings of {embedding_dim} dimensions, but {where} takes {image_dim}: "
            "use an adapter trained on this decoder's image encoder."
        )
    if text_dim not in (None, adapter_text_dim):
        raise CSDiffError(
            f"The adapter takes text embeddings of {adapter_text_dim} dimensions, but {where} gives {text_dim}: "
            "use the text encoder the adapter was trained on."
        )
