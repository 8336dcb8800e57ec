"""The published decoders that have a name here, and what belongs to each."""

from __future__ import annotations

from dataclasses import dataclass


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
