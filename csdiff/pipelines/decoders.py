"""Decoders: presets, recognition of folders and hub repositories, and the check of an adapter against them."""

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path

from csdiff.embeddings.fingerprint import HUB_ID, check_same_encoder
from csdiff.errors import CSDiffError
from csdiff.hub import unreachable
from csdiff.pipelines.pairing import AdapterCard, check_dimensions, read_json
from csdiff.resources import assets_dir


@dataclass(frozen=True)
class DecoderPreset:
    """A published decoder and the encoders it belongs to.

    Attributes:
        name: of the preset.
        repo: hub repository (or "tiny", the shipped one).
        hand_over: how embeddings reach it: "kandinsky" (`image_embeds=` and `negative_image_embeds=`), "unclip" (the
            prior's place in `UnCLIPPipeline`), "stable-unclip" (`image_embeds=` beside the prompt) or "ip-adapter"
            (`ip_adapter_image_embeds=` beside the prompt).
        embedding_dim: D, the width of the image embeddings.
        text_encoder: id of the text tower adapters for it start from; also names its tokenizer.
        image_encoder: id of the image tower whose raw embeddings it decodes; their statistics are the adapter's.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        ip_adapter: repository, subfolder and file of the IP-Adapter weights.
    """

    name: str
    repo: str
    hand_over: str
    embedding_dim: int | None
    text_encoder: str
    image_encoder: str
    steps: int
    guidance: float
    ip_adapter: tuple[str, str, str] | None = None


VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
VIT_BIGG = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
SD15_IP_ADAPTER = ("h94/IP-Adapter", "models", "ip-adapter_sd15.safetensors")
SDXL_IP_ADAPTER = ("h94/IP-Adapter", "sdxl_models", "ip-adapter_sdxl.safetensors")

PRESETS = {
    preset.name: preset
    for preset in (
        # the width of the tiny decoder is read from its folder
        DecoderPreset("tiny", "tiny", "kandinsky", None, "tiny-clip", "tiny-clip", 25, 3.0),
        DecoderPreset(
            "kandinsky22", "kandinsky-community/kandinsky-2-2-decoder", "kandinsky", 1280, VIT_BIGG, VIT_BIGG, 50, 4.0
        ),
        DecoderPreset("karlo", "kakaobrain/karlo-v1-alpha", "unclip", 768, VIT_L, VIT_L, 25, 8.0),
        DecoderPreset(
            "sd-unclip-s",
            "stabilityai/stable-diffusion-2-1-unclip-small",
            "stable-unclip",
            768,
            VIT_L,
            VIT_L,
            20,
            10.0,
        ),
        DecoderPreset(
            "sd-unclip-h", "stabilityai/stable-diffusion-2-1-unclip", "stable-unclip", 1024, VIT_H, VIT_H, 20, 10.0
        ),
        DecoderPreset(
            "ip-adapter-sd15",
            "stable-diffusion-v1-5/stable-diffusion-v1-5",
            "ip-adapter",
            1024,
            VIT_H,
            VIT_H,
            50,
            7.5,
            SD15_IP_ADAPTER,
        ),
        DecoderPreset(
            "ip-adapter-sdxl",
            "stabilityai/stable-diffusion-xl-base-1.0",
            "ip-adapter",
            1280,
            VIT_BIGG,
            VIT_BIGG,
            50,
            5.0,
            SDXL_IP_ADAPTER,
        ),
    )
}

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
}
# Where each kind states the width of its image embeddings.
DIMENSION_FILES = {
    "kandinsky": ("unet/config.json", "encoder_hid_dim"),
    "unclip": ("text_proj/config.json", "clip_embeddings_dim"),
    "stable-unclip": ("image_normalizer/config.json", "embedding_dim"),
}


@dataclass(frozen=True)
class DecoderSource:
    """A decoder that was found, with nothing of it loaded yet.

    Attributes:
        source: folder or hub repository.
        class_name: pipeline class in its `model_index.json`.
        hand_over: see `DecoderPreset`.
        embedding_dim: D, from its configuration files.
        preset: the published decoder it is, if any.
        fingerprint: its `csdiff.json`, if any.
        ip_adapter: folder or repository, subfolder and file of IP-Adapter weights.
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
        if known or self.preset is None:
            return known
        return {"id": getattr(self.preset, f"{tower}_encoder")}


def resolve_decoder(decoder: str | os.PathLike, ip_adapter: str | os.PathLike | None = None) -> DecoderSource:
    """Finds a decoder by preset, folder or hub repository; reads JSON only.

    A folder is recognised by its `model_index.json`, and taken for a published decoder when class and width agree
    with a preset's and it has no `csdiff.json` of its own.

    Args:
        decoder: name of a preset, folder saved by diffusers, or hub repository.
        ip_adapter: IP-Adapter weights for a Stable Diffusion decoder that is no preset: a safetensors file, or
            `owner/name/subfolder/file` on the hub.

    Raises:
        CSDiffError: nothing there, a pipeline of another class, or a configuration that does not state its width.
    """
    preset = PRESETS.get(str(decoder))
    source = str(decoder)
    if preset is not None:
        source = str(assets_dir() / "decoder") if preset.name == "tiny" else preset.repo
    elif not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise CSDiffError(
            f"decoder: expected a preset ({', '.join(PRESETS)}), a folder saved by diffusers, or a hub repository "
            f"(owner/name), found {source!r}."
        )
    index = _read(source, "model_index.json")
    class_name = index.get("_class_name", "nothing")
    hand_over = HAND_OVER.get(class_name)
    if hand_over is None:
        raise CSDiffError(
            f"decoder: {source} holds a {class_name}; expected one of {', '.join(HAND_OVER)}. "
            "Other pipelines take the embeddings from CSDiffPriorPipeline in Python."
        )
    weights = _ip_adapter_location(ip_adapter) or (preset.ip_adapter if preset else None)
    if hand_over == "ip-adapter":
        weights = weights or (SDXL_IP_ADAPTER if class_name == "StableDiffusionXLPipeline" else SD15_IP_ADAPTER)
        embedding_dim = _ip_adapter_dim(weights)
    else:
        weights = None
        file, key = DIMENSION_FILES[hand_over]
        embedding_dim = _read(source, file).get(key)
        if not isinstance(embedding_dim, int):
            raise CSDiffError(
                f"decoder: {source}/{file} states no {key}; this {class_name} is not conditioned on image embeddings."
            )
    fingerprint = _read(source, "csdiff.json") if (Path(source) / "csdiff.json").is_file() else None
    if preset is None and fingerprint is None:
        preset = _published(hand_over, embedding_dim, source, weights)
    return DecoderSource(source, class_name, hand_over, embedding_dim, preset, fingerprint, weights)


def check_pairing(card: AdapterCard, decoder: DecoderSource):
    """Refuses an adapter of another width or for another image encoder than the decoder's; reads no weights.

    Raises:
        CSDiffError: naming what was expected and what was found.
    """
    where = f"the decoder {decoder.source}"
    check_dimensions(card.config, image_dim=decoder.embedding_dim, text_dim=None, where=where)
    if card.metadata.get("normalized"):
        raise CSDiffError(
            f"adapter: {card.path} was trained on unit-norm embeddings, for retrieval; decoders want raw ones. "
            "Train on a store that kept the norms."
        )
    check_same_encoder(card.metadata.get("image_encoder"), decoder.encoder("image"), "image", "the adapter", where)


def _published(hand_over: str, embedding_dim: int, source: str, weights: tuple | None) -> DecoderPreset | None:
    """The preset a repository or a folder without a fingerprint is a copy of."""
    for preset in PRESETS.values():
        same_kind = preset.hand_over == hand_over and preset.embedding_dim == embedding_dim
        if source == preset.repo or (same_kind and weights == preset.ip_adapter):
            return preset
    return None


def _read(source: str, file: str) -> dict:
    if Path(source).is_dir():
        return read_json(Path(source) / file)
    return read_json(Path(_download(source, file)))


def _download(repo: str, file: str) -> str:
    from huggingface_hub import hf_hub_download

    silent = unreachable()
    try:
        return hf_hub_download(repo, file, local_files_only=silent is not None)
    # every reason (no network, no such repository or file, gated) has one cure
    except Exception as error:
        raise CSDiffError(
            f"decoder: expected {file} of the hub repository {repo}, found neither a local copy nor the hub "
            f"({silent or type(error).__name__}); download it where there is a network, or give a folder; with "
            "HF_HUB_OFFLINE=1 the hub is not asked."
        ) from error


def _ip_adapter_location(location: str | os.PathLike | None) -> tuple[str, str, str] | None:
    if location is None:
        return None
    path = Path(location)
    if path.suffix != ".safetensors":
        raise CSDiffError(f"ip_adapter: expected a .safetensors file, found {location}; pickled weights are not read.")
    if path.is_file():
        return str(path.parent), "", path.name
    parts = path.parts
    if path.is_absolute() or len(parts) < 3:
        raise CSDiffError(
            f"ip_adapter: expected a file or owner/name/subfolder/file on the hub, found nothing at {location}."
        )
    return "/".join(parts[:2]), "/".join(parts[2:-1]), parts[-1]


def _ip_adapter_dim(weights: tuple[str, str, str]) -> int:
    """Width of the image embeddings: a preset's, or from the header of the weights file."""
    for preset in PRESETS.values():
        if preset.ip_adapter == weights:
            return preset.embedding_dim
    folder, subfolder, name = weights
    local = Path(folder) / subfolder / name
    path = local if local.is_file() else Path(_download(folder, f"{subfolder}/{name}" if subfolder else name))
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(size))
    except (struct.error, UnicodeDecodeError, json.JSONDecodeError, MemoryError, OverflowError) as error:
        raise CSDiffError(f"ip_adapter: {path} is not a safetensors file ({error}); download it again.") from error
    projection = header.get("image_proj.proj.weight")
    if projection is None:
        raise CSDiffError(
            f"ip_adapter: {path} has no image_proj.proj.weight; only IP-Adapters that take pooled image embeddings "
            "can be driven by an adapter (not the plus, full-face or FaceID kinds)."
        )
    return projection["shape"][1]
