"""Decoders as their files describe them, and which adapters fit them; no weights are read."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csdiff.adapters.folder import AdapterCard, read_adapter_card
from csdiff.embeddings.fingerprint import HUB_ID, check_same_encoder
from csdiff.errors import CSDiffError, did_you_mean
from csdiff.files import read_json, read_safetensors_header
from csdiff.hub import download
from csdiff.kinds import described
from csdiff.pipelines.config import GenerateConfig
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


@dataclass(frozen=True)
class DecoderSource:
    """A decoder: a published one, or one that was found, with nothing of it loaded yet.

    Attributes:
        name: Of the preset; empty for a decoder that is none.
        source: Folder or hub repository.
        hand_over: How embeddings reach it: "kandinsky" (`image_embeds=` and `negative_image_embeds=`), "unclip" (the
            prior's place in `UnCLIPPipeline`), "stable-unclip" (`image_embeds=` beside the prompt), "ip-adapter"
            (`ip_adapter_image_embeds=` beside the prompt) or "flux-ip-adapter" (that, and the negative's list).
        embedding_dim: D, the width of the image embeddings; None for a preset whose folder says it.
        text_encoder: What is known of the text tower that adapters for it start from, `{"id", "weights_sha256", ...}`.
        image_encoder: The same of the image tower whose raw embeddings it decodes; their statistics are the adapter's.
        steps: Denoising steps it is made for.
        guidance: Classifier-free guidance scale it is made for.
        ip_adapter: Folder or repository, subfolder and file of the IP-Adapter weights.
        recipe: Name of the training recipe in `configs/`.
        class_name: Pipeline class in its `model_index.json`, once it was found.
    """

    name: str
    source: str
    hand_over: str
    embedding_dim: int | None
    text_encoder: dict | None
    image_encoder: dict | None
    steps: int
    guidance: float
    ip_adapter: tuple[str, str, str] | None = None
    recipe: str = ""
    class_name: str = ""

    def sampling(self, config: GenerateConfig) -> GenerateConfig:
        """The options with steps and guidance: as asked for, else what it is made for.

        Raises:
            CSDiffError: an option that it does not read.
        """
        if self.hand_over == "flux-ip-adapter" and config.negative_prompt is not None and config.true_cfg <= 1:
            raise CSDiffError(
                "negative_prompt: FLUX.1 reads one only with --true_cfg above 1, at twice the time; give both or none."
            )
        if self.hand_over == "unclip" and (config.negative_prompt is not None or config.height or config.width):
            raise CSDiffError("Karlo takes no negative prompt, height or width; leave these options out.")
        steps = self.steps if config.steps is None else config.steps
        guidance = self.guidance if config.guidance is None else config.guidance
        return replace(config, steps=steps, guidance=float(guidance))

    def dtype(self, name: str, device: torch.device) -> torch.dtype:
        """The number format of an option's name; "auto" is float16 on CUDA (FLUX.1: bfloat16), else float32."""
        import torch

        if name == "auto":
            # FLUX.1 was trained in bfloat16 and overflows float16.
            half = "bfloat16" if self.hand_over == "flux-ip-adapter" else "float16"
            name = half if device.type == "cuda" else "float32"
        return getattr(torch, name)


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
    name: DecoderSource(name, source, hand_over, width, {"id": encoder}, {"id": encoder}, *rest)
    for name, (source, hand_over, width, encoder, *rest) in _TABLE.items()
}
"""The published decoders that have a name here."""
# The IP-Adapter of a folder for which none is named.
_USUAL = {"StableDiffusionPipeline": SD15_IP_ADAPTER, "StableDiffusionXLPipeline": SDXL_IP_ADAPTER}


def find_models(config: GenerateConfig) -> tuple[AdapterCard | None, DecoderSource]:
    """The adapter's card (None for the raw text embedding) and the decoder of a drawing, which must fit each other."""
    decoder = resolve_decoder(config.decoder, config.ip_adapter)
    if config.adapter == "none":
        return None, decoder
    card = read_adapter_card(config.adapter or assets_dir() / "adapter")
    check_pairing(card, decoder)
    return card, decoder


def resolve_decoder(decoder: str | os.PathLike, ip_adapter: str | os.PathLike | None = None) -> DecoderSource:
    """Finds a decoder by preset, folder or hub repository; reads JSON and headers only.

    A folder is recognised by its `model_index.json`, and taken for a published decoder when class and width agree
    with a preset's and it has no `csdiff.json` of its own. What that states goes before what a preset says.

    Args:
        decoder: Name of a preset, folder saved by diffusers, or hub repository.
        ip_adapter: IP-Adapter weights for a Stable Diffusion or FLUX.1 decoder: a safetensors file, a folder with one,
            or `owner/name` or `owner/name/subfolder/file` on the hub.

    Raises:
        CSDiffError: nothing there, a pipeline of another class, or a configuration that does not state its width.
    """
    source, preset = str(decoder), PRESETS.get(str(decoder))
    if preset is not None:
        source = str(assets_dir() / "decoder") if preset.name == "tiny" else preset.source
    elif not Path(source).is_dir() and not HUB_ID.fullmatch(source):
        raise CSDiffError(
            f"decoder: expected a preset ({', '.join(PRESETS)}), a folder saved by diffusers, or a hub repository "
            f"(owner/name), found {source!r}{did_you_mean(source, PRESETS) or '.'}"
        )
    if Path(source).is_dir() and not (Path(source) / "model_index.json").is_file():
        raise CSDiffError(
            f"decoder: expected model_index.json, as diffusers saves it, but {source} {described(Path(source))}."
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
        weights = (preset and preset.ip_adapter) or _USUAL.get(class_name, FLUX_IP_ADAPTER_V2)
        if ip_adapter is not None:
            weights = _ip_adapter_place(ip_adapter, weights)
        width = _ip_adapter_dim(weights, hand_over)
    elif ip_adapter is not None:
        raise CSDiffError(f"ip_adapter: a {class_name} takes image embeddings as it is; leave --ip_adapter out.")
    else:
        file, key = _DIMENSION_FILES[hand_over]
        width = read_json(_file(source, file)).get(key)
        if not isinstance(width, int):
            raise CSDiffError(
                f"decoder: {source}/{file} states no {key}; this {class_name} is not conditioned on image embeddings."
            )
    own = Path(source) / "csdiff.json"
    stated = read_json(own) if own.is_file() else {}
    if not own.is_file() and (preset is None or preset.ip_adapter != weights):
        kind = (hand_over, width, weights)
        preset = next((p for p in PRESETS.values() if (p.hand_over, p.embedding_dim, p.ip_adapter) == kind), None)
    if preset is None:
        # Steps and guidance of its kind, and nothing else.
        like = next(p for p in PRESETS.values() if p.hand_over == hand_over)
        preset = replace(like, name="", text_encoder=None, image_encoder=None, recipe="")
    sampling = stated.get("sampling") or {}
    return replace(
        preset,
        source=source,
        class_name=class_name,
        embedding_dim=width,
        ip_adapter=weights,
        text_encoder=stated.get("text_encoder") or preset.text_encoder,
        image_encoder=stated.get("image_encoder") or preset.image_encoder,
        steps=sampling.get("steps", preset.steps),
        guidance=sampling.get("guidance", preset.guidance),
    )


def _file(source: str, file: str) -> Path:
    """A file of a folder or of a hub repository."""
    return Path(source) / file if Path(source).is_dir() else download(source, file, file)


def _ip_adapter_place(location: str | os.PathLike, usual: tuple[str, str, str]) -> tuple[str, str, str]:
    """Folder or repository, subfolder and file; those that are not said are the usual ones."""
    path, name = Path(location), str(location)
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if len(files) == 1 and files[0].is_file() and files[0].suffix == ".safetensors":
        return str(files[0].parent), "", files[0].name
    if HUB_ID.fullmatch(name) and not path.exists() and path.suffix not in (".safetensors", ".bin"):
        known = [usual, *(preset.ip_adapter for preset in PRESETS.values() if preset.ip_adapter)]
        return next((place for place in known if place[0] == name), (name, "", usual[2]))
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
    for preset in PRESETS.values():
        if (preset.ip_adapter, preset.hand_over) == (weights, hand_over):
            return preset.embedding_dim
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


def check_pairing(card: AdapterCard, decoder: DecoderSource) -> None:
    """Refuses an adapter of unit-norm embeddings, another width, or another image encoder than the decoder's."""
    if card.metadata.get("normalized"):
        raise CSDiffError(
            f"adapter: {card.path} was trained on unit-norm embeddings, for retrieval; decoders want raw ones. "
            "Train on a store that kept the norms."
        )
    image = (decoder.embedding_dim, decoder.image_encoder)
    check_encoders(card.config, card.metadata, f"the decoder {decoder.source}", image=image)


def check_encoders(
    config: Any,
    metadata: dict,
    where: str,
    *,
    image: tuple[int | None, dict | None],
    text: tuple[int | None, dict | None] = (None, None),
) -> None:
    """Refuses an adapter, of this `config.json` and `csdiff.json`, that does not fit the encoders of `where`.

    These are `(width, record)` of the image embeddings taken there and of the text embeddings given there; None is not
    checked. The CSDiffError names what was expected and what was found.
    """
    image_dim = config.get("embedding_dim")
    text_dim = config.get("text_dim") or image_dim
    if image[0] not in (None, image_dim):
        raise CSDiffError(
            f"The adapter makes image embeddings of {image_dim} dimensions, but {where} takes {image[0]}: "
            "use an adapter trained on this decoder's image encoder."
        )
    if text[0] not in (None, text_dim):
        raise CSDiffError(
            f"The adapter takes text embeddings of {text_dim} dimensions, but {where} gives {text[0]}: "
            "use the text encoder the adapter was trained on."
        )
    for tower, (_, encoder) in (("text", text), ("image", image)):
        check_same_encoder(metadata.get(f"{tower}_encoder"), encoder, tower, "the adapter", where)
