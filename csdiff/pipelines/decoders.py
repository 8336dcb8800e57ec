"""Decoders: presets, recognition of folders and hub repositories, and the check of an adapter against them."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from csdiff.embeddings.fingerprint import HUB_ID, check_same_encoder
from csdiff.errors import CSDiffError
from csdiff.files import read_json, read_safetensors_header
from csdiff.hub import unreachable
from csdiff.pipelines.pairing import AdapterCard, check_dimensions
from csdiff.resources import assets_dir


@dataclass(frozen=True)
class DecoderPreset:
    """A published decoder and the encoders it belongs to.

    Attributes:
        name: Of the preset.
        repo: Hub repository (or "tiny", the shipped one).
        hand_over: How embeddings reach it: "kandinsky" (`image_embeds=` and `negative_image_embeds=`), "unclip" (the
            prior's place in `UnCLIPPipeline`), "stable-unclip" (`image_embeds=` beside the prompt), "ip-adapter"
            (`ip_adapter_image_embeds=` beside the prompt) or "flux-ip-adapter" (that, and the negative's list).
        embedding_dim: D, the width of the image embeddings; None where the folder says it.
        text_encoder: Id of the text tower adapters for it start from; also names its tokenizer.
        image_encoder: Id of the image tower whose raw embeddings it decodes; their statistics are the adapter's.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale.
        ip_adapter: Repository, subfolder and file of the IP-Adapter weights.
        recipe: Name of the training recipe in `configs/`.
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
    recipe: str = ""


_VIT_L = "openai/clip-vit-large-patch14"
_VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_VIT_BIGG = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k"
_SDXL, _FLUX = "stabilityai/stable-diffusion-xl-base-1.0", "black-forest-labs/FLUX.1-dev"
SD15_IP_ADAPTER = ("h94/IP-Adapter", "models", "ip-adapter_sd15.safetensors")
SDXL_IP_ADAPTER = ("h94/IP-Adapter", "sdxl_models", "ip-adapter_sdxl.safetensors")
SDXL_VIT_H_IP_ADAPTER = ("h94/IP-Adapter", "sdxl_models", "ip-adapter_sdxl_vit-h.safetensors")
FLUX_IP_ADAPTER = ("XLabs-AI/flux-ip-adapter", "", "ip_adapter.safetensors")
FLUX_IP_ADAPTER_V2 = ("XLabs-AI/flux-ip-adapter-v2", "", "ip_adapter.safetensors")

# name: repository, hand-over, width, encoder, steps, guidance, IP-Adapter, recipe
_TABLE = {
    # The width of the tiny decoder is read from its folder.
    "tiny": ("tiny", "kandinsky", None, "tiny-clip", 25, 3.0, None, "tiny"),
    "kandinsky22": (
        "kandinsky-community/kandinsky-2-2-decoder", "kandinsky", 1280, _VIT_BIGG, 50, 4.0, None, "kandinsky22",
    ),
    "karlo": ("kakaobrain/karlo-v1-alpha", "unclip", 768, _VIT_L, 25, 8.0, None, "karlo"),
    "sd-unclip-s": (
        "stabilityai/stable-diffusion-2-1-unclip-small", "stable-unclip", 768, _VIT_L, 20, 10.0, None, "sd-unclip-s",
    ),
    "sd-unclip-h": (
        "stabilityai/stable-diffusion-2-1-unclip", "stable-unclip", 1024, _VIT_H, 20, 10.0, None, "sd-unclip-h",
    ),
    "ip-adapter-sd15": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "ip-adapter", 1024, _VIT_H, 50, 7.5, SD15_IP_ADAPTER,
        "ip-adapter-sd15",
    ),
    "ip-adapter-sdxl": (_SDXL, "ip-adapter", 1280, _VIT_BIGG, 50, 5.0, SDXL_IP_ADAPTER, "ip-adapter-sdxl"),
    "sdxl-vit-h": (_SDXL, "ip-adapter", 1024, _VIT_H, 50, 5.0, SDXL_VIT_H_IP_ADAPTER, "ip-adapter-sd15"),
    "flux-ip-adapter": (_FLUX, "flux-ip-adapter", 768, _VIT_L, 28, 3.5, FLUX_IP_ADAPTER, "karlo"),
    "flux-ip-adapter-v2": (_FLUX, "flux-ip-adapter", 768, _VIT_L, 28, 3.5, FLUX_IP_ADAPTER_V2, "karlo"),
}  # fmt: skip
PRESETS = {
    name: DecoderPreset(name, repo, hand_over, width, encoder, encoder, *rest)
    for name, (repo, hand_over, width, encoder, *rest) in _TABLE.items()
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
        if known or self.preset is None:
            return known
        return {"id": getattr(self.preset, f"{tower}_encoder")}


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
    preset = PRESETS.get(str(decoder))
    source = str(decoder)
    if preset is not None:
        source = str(assets_dir() / "decoder") if preset.name == "tiny" else preset.repo
    elif not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise CSDiffError(
            f"decoder: expected a preset ({', '.join(PRESETS)}), a folder saved by diffusers, or a hub repository "
            f"(owner/name), found {source!r}."
        )
    class_name = _read(source, "model_index.json").get("_class_name", "nothing")
    hand_over = HAND_OVER.get(class_name)
    if hand_over is None:
        raise CSDiffError(
            f"decoder: {source} holds a {class_name}; expected one of {', '.join(HAND_OVER)}. "
            "Other pipelines take the embeddings from CSDiffPriorPipeline in Python."
        )
    weights = None
    if hand_over in _PROJECTIONS:
        weights = _ip_adapter_place(ip_adapter, hand_over) or (preset and preset.ip_adapter) or _usual(class_name)
        embedding_dim = _ip_adapter_dim(weights, hand_over)
    elif ip_adapter is not None:
        raise CSDiffError(f"ip_adapter: a {class_name} takes image embeddings as it is; leave --ip_adapter out.")
    else:
        file, key = _DIMENSION_FILES[hand_over]
        embedding_dim = _read(source, file).get(key)
        if not isinstance(embedding_dim, int):
            raise CSDiffError(
                f"decoder: {source}/{file} states no {key}; this {class_name} is not conditioned on image embeddings."
            )
    fingerprint = read_json(Path(source) / "csdiff.json") if (Path(source) / "csdiff.json").is_file() else None
    if fingerprint is None and (preset is None or preset.ip_adapter != weights):
        preset = _published(hand_over, embedding_dim, weights)
    return DecoderSource(source, class_name, hand_over, embedding_dim, preset, fingerprint, weights)


def check_pairing(card: AdapterCard, decoder: DecoderSource) -> None:
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


def _published(hand_over: str, embedding_dim: int, weights: tuple | None) -> DecoderPreset | None:
    """The preset that a repository, or a folder without a fingerprint, is a copy of."""
    for preset in PRESETS.values():
        same_kind = preset.hand_over == hand_over and preset.embedding_dim == embedding_dim
        if same_kind and weights == preset.ip_adapter:
            return preset
    return None


def _usual(class_name: str) -> tuple[str, str, str]:
    if HAND_OVER[class_name] == "flux-ip-adapter":
        return FLUX_IP_ADAPTER_V2
    return SDXL_IP_ADAPTER if class_name == "StableDiffusionXLPipeline" else SD15_IP_ADAPTER


def _read(source: str, file: str) -> dict:
    return read_json(Path(source) / file if Path(source).is_dir() else Path(_download(source, file)))


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


def _ip_adapter_place(location: str | os.PathLike | None, hand_over: str) -> tuple[str, str, str] | None:
    """Folder or repository, subfolder and file."""
    if location is None:
        return None
    path = Path(location)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise CSDiffError(f"ip_adapter: expected one .safetensors file in {path}, found {len(files)}; name it.")
        path = files[0]
    if path.is_file() and path.suffix == ".safetensors":
        return str(path.parent), "", path.name
    parts = path.parts
    if HUB_ID.fullmatch(str(location)) and path.suffix not in (".safetensors", ".bin"):
        known = [p.ip_adapter for p in PRESETS.values() if p.ip_adapter and p.hand_over == hand_over]
        return next((place for place in known if place[0] == str(location)), (str(location), "", known[-1][2]))
    if path.suffix != ".safetensors":
        raise CSDiffError(f"ip_adapter: expected a .safetensors file, found {location}; pickled weights are not read.")
    if path.is_absolute() or len(parts) < 3:
        raise CSDiffError(
            f"ip_adapter: expected a file or owner/name/subfolder/file on the hub, found nothing at {location}."
        )
    return "/".join(parts[:2]), "/".join(parts[2:-1]), parts[-1]


def _ip_adapter_dim(weights: tuple[str, str, str], hand_over: str) -> int:
    """Width of the image embeddings: a preset's, or from the header of the weights file."""
    for preset in PRESETS.values():
        if preset.ip_adapter == weights:
            return preset.embedding_dim
    folder, subfolder, name = weights
    local = Path(folder) / subfolder / name
    path = local if local.is_file() else Path(_download(folder, f"{subfolder}/{name}" if subfolder else name))
    header = read_safetensors_header(path)
    found = next((kind for kind, key in _PROJECTIONS.items() if key in header), None)
    if found is None:
        raise CSDiffError(
            f"ip_adapter: {path} has no projection of one image embedding ({' or '.join(_PROJECTIONS.values())}); "
            "only IP-Adapters that take pooled image embeddings can be driven by an adapter (not the plus, full-face "
            "or FaceID kinds)."
        )
    if found != hand_over:
        kinds = {"ip-adapter": "Stable Diffusion", "flux-ip-adapter": "FLUX.1"}
        raise CSDiffError(
            f"ip_adapter: expected weights for {kinds[hand_over]}, found those of an IP-Adapter for {kinds[found]} in "
            f"{path}; give the decoder or the weights that belong together."
        )
    return header[_PROJECTIONS[found]][1][1]
