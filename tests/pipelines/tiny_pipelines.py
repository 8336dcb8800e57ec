"""Tiny, random, real pipelines of every kind that an adapter drives; all take image embeddings of `DIM` numbers."""

import inspect
import json
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import UNet2DConditionModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPTokenizer

from csdiff.adapters import MLPAdapter, TransformerAdapter
from csdiff.embeddings.encoders import quiet_loading

PROMPT = "a red apple"
# Also the width of the decoders' own text towers.
DIM = 16

_PHOTO, _MASK, _HINT = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255), torch.rand(1, 3, 64, 64)
_FLUX_PHOTO = {"image": _PHOTO, "strength": 1.0}
CALLS = {
    "KandinskyV22Pipeline": {},
    "KandinskyV22Img2ImgPipeline": {"image": _PHOTO, "strength": 0.6},
    "KandinskyV22InpaintPipeline": {"image": _PHOTO, "mask_image": _MASK},
    "KandinskyV22ControlnetPipeline": {"hint": _HINT},
    "KandinskyV22ControlnetImg2ImgPipeline": {"hint": _HINT, "image": _PHOTO, "strength": 0.6},
    "StableDiffusionPipeline": {},
    "StableDiffusionControlNetPipeline": {"image": _PHOTO},
    "AnimateDiffPipeline": {"num_frames": 2},
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLControlNetPipeline": {"image": _PHOTO},
    "FluxPipeline": {},
    "FluxImg2ImgPipeline": _FLUX_PHOTO,
    "FluxInpaintPipeline": {**_FLUX_PHOTO, "mask_image": _MASK},
    "FluxControlNetPipeline": {"control_image": _PHOTO},
    "FluxKontextPipeline": {"image": _PHOTO, "_auto_resize": False, "max_area": 64 * 64},
    "KandinskyV22CombinedPipeline": {},
    "KandinskyV22Img2ImgCombinedPipeline": {"image": _PHOTO, "strength": 0.6},
    "KandinskyV22InpaintCombinedPipeline": {"image": _PHOTO, "mask_image": _MASK},
}
"""Pipeline classes, and what a call needs beside the prompt and the embedding."""


def random_adapter(metadata: dict | None = None, dim: int = DIM, **options) -> MLPAdapter:
    """An MLP adapter whose answers differ from its input, with statistics to un-whiten by."""
    generator = torch.Generator().manual_seed(0)
    adapter = MLPAdapter(embedding_dim=dim, **options).eval()
    for parameter in adapter.parameters():
        parameter.data.normal_(std=0.3, generator=generator)
    adapter.set_statistics(torch.randn(dim, generator=generator), torch.rand(dim, generator=generator) + 0.5)
    adapter.metadata = dict(metadata or {})
    return adapter


def random_transformer(text, metadata: dict, **options) -> TransformerAdapter:
    """A small transformer adapter for a text encoder."""
    size = {"embedding_dim": DIM, "states_dim": text.states_dim, "num_embeddings": text.max_length}
    adapter = TransformerAdapter.from_preset("tiny", **size, **options).eval()
    torch.nn.init.normal_(adapter.proj_to_clip_embeddings.weight)
    adapter.metadata = dict(metadata)
    return adapter


def build(name: str, clip: Path):
    """A pipeline by the name of its class, over the vocabulary of a CLIP folder."""
    if "Kandinsky" in name:
        prior = prior_parts(clip)
        parts = _kandinsky(name) | {f"prior_{part}": value for part, value in prior.items()}
        parts |= prior if "Prior" in name else {}
    else:
        make = {"Flux": _flux, "UnCLIP": _stable_unclip, "XL": _sdxl, "Cascade": _cascade, "": _stable_diffusion}
        parts = next(value for word, value in make.items() if word in name)(clip)
    if "ControlNet" in name:
        parts["controlnet"] = (
            diffusers.FluxControlNetModel.from_transformer(parts["transformer"], 1, 1, 16, 2)
            if "Flux" in name
            else diffusers.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(8, 16))
        )
    pipeline_class = getattr(diffusers, name)
    taken = inspect.signature(pipeline_class.__init__).parameters
    return pipeline_class(**{part: value for part, value in parts.items() if part in taken})


def save_decoder(name: str, clip: Path, folder: Path) -> dict[str, str]:
    """Writes a decoder folder; returns the options of `generate` that draw with it."""
    if name == "UnCLIPPipeline":
        return {"decoder": str(karlo_folder(folder, clip))}
    pipe = build(name, clip)
    pipe.save_pretrained(folder)
    if "ip_adapter_image_embeds" not in inspect.signature(pipe.__call__).parameters:
        return {"decoder": str(folder)}
    return {"decoder": str(folder), "ip_adapter": str(ip_adapter_weights(folder.with_name("weights"), pipe))}


def clip_parts(clip: Path) -> dict:
    """The towers and processors of a CLIP folder, under the names that prior pipelines use."""
    with quiet_loading():
        return {
            "text_encoder": transformers.CLIPTextModelWithProjection.from_pretrained(clip).eval(),
            "tokenizer": CLIPTokenizer.from_pretrained(clip),
            "image_encoder": transformers.CLIPVisionModelWithProjection.from_pretrained(clip).eval(),
            "image_processor": transformers.CLIPImageProcessor.from_pretrained(clip),
        }


def prior_transformer(clip: Path) -> diffusers.PriorTransformer:
    """A stock diffusion prior."""
    config = CLIPConfig.from_pretrained(clip).text_config
    return diffusers.PriorTransformer(
        num_attention_heads=2,
        # as wide as the token states, which then need no projection
        attention_head_dim=config.hidden_size // 2,
        num_layers=1,
        embedding_dim=DIM,
        num_embeddings=config.max_position_embeddings,
        encoder_hid_proj_type=None,
    )


def prior_parts(clip: Path) -> dict:
    """Every component of a stock prior pipeline."""
    scheduler = diffusers.UnCLIPScheduler(prediction_type="sample")
    return {"prior": prior_transformer(clip), "scheduler": scheduler, **clip_parts(clip)}


def _unet(**options) -> UNet2DConditionModel:
    usual = {
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "cross_attention_dim": DIM,
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    return UNet2DConditionModel(**{**usual, **options}).eval()


# The blocks of Kandinsky and of Karlo.
_RESNET = {
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "resnet_time_scale_shift": "scale_shift",
}


def _blocks(count: int = 2) -> dict:
    """Those of an autoencoder of factor 2, or of more blocks."""
    down, up = ("DownEncoderBlock2D",) * count, ("UpDecoderBlock2D",) * count
    return {"down_block_types": down, "up_block_types": up, "block_out_channels": (8,) * count, "norm_num_groups": 4}


def _kandinsky(name: str) -> dict:
    hint = "Controlnet" in name
    unet = _unet(
        **_RESNET,
        in_channels=9 if "Inpaint" in name else 8 if hint else 4,
        out_channels=8,
        addition_embed_type="image_hint" if hint else "image",
        encoder_hid_dim=DIM,
        encoder_hid_dim_type="image_proj",
    )
    # a hint has eight times the size of the latents
    movq = diffusers.VQModel(
        **_blocks(4 if hint else 2), latent_channels=4, num_vq_embeddings=8, vq_embed_dim=4
    ).eval()
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    return {"unet": unet, "scheduler": scheduler, "movq": movq}


def _text_tower(clip: Path, projected: bool = False):
    """A text encoder for the decoder itself, over the vocabulary of `clip`."""
    config = transformers.CLIPTextConfig.from_pretrained(clip, hidden_size=DIM)
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def _stable_diffusion(clip: Path, **unet_options) -> dict:
    """Stable Diffusion 1.5, and AnimateDiff."""
    motion = {"block_out_channels": (16, 32), "motion_layers_per_block": 1, "motion_num_attention_heads": 2}
    return {
        "unet": _unet(**unet_options),
        "scheduler": diffusers.DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        "vae": diffusers.AutoencoderKL(**_blocks()).eval(),
        "text_encoder": _text_tower(clip),
        "tokenizer": CLIPTokenizer.from_pretrained(clip),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
        "motion_adapter": diffusers.MotionAdapter(**motion, motion_norm_num_groups=8),
    }


def _sdxl(clip: Path) -> dict:
    unet = {
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "transformer_layers_per_block": (1, 1),
        # six embedded sizes and the pooled text
        "projection_class_embeddings_input_dim": 6 * 8 + DIM,
        "cross_attention_dim": 2 * DIM,
    }
    second = {"text_encoder_2": _text_tower(clip, projected=True), "tokenizer_2": CLIPTokenizer.from_pretrained(clip)}
    return _stable_diffusion(clip, **unet) | second


def _stable_unclip(clip: Path) -> dict:
    """Both stable unCLIP pipelines; at noise level 0 the embedding goes through unchanged."""
    # image embedding and embedded noise level
    unet = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 2 * DIM}
    prior = prior_parts(clip)
    return _stable_diffusion(clip, **unet, use_linear_projection=True) | {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=DIM),
        "image_noising_scheduler": diffusers.DDPMScheduler(beta_start=1e-12, beta_schedule="linear"),
        "feature_extractor": prior["image_processor"],
        "image_encoder": prior["image_encoder"],
        "prior": prior["prior"],
        **{f"prior_{name}": prior[name] for name in ("scheduler", "text_encoder", "tokenizer")},
    }


def _flux(clip: Path) -> dict:
    """FLUX.1 of one double and one single block."""
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=DIM,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    t5 = transformers.T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    scale = {"latent_channels": 1, "shift_factor": 0.06, "scaling_factor": 1.5, "use_quant_conv": False}
    return {
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(),
        "vae": diffusers.AutoencoderKL(**_blocks(), **scale, use_post_quant_conv=False).eval(),
        "text_encoder": _text_tower(clip),
        "tokenizer": tokenizer,
        "text_encoder_2": transformers.T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer,
        "transformer": transformer,
    }


def _cascade(clip: Path) -> dict:
    """Stage C of Stable Cascade."""
    widths = {f"clip_{name}_channels": DIM for name in ("image_in", "text_in", "text_pooled_in")}
    unet = diffusers.StableCascadeUNet(
        conditioning_dim=32, block_out_channels=(16, 16), up_num_layers_per_block=(1, 1), switch_level=(False,),
        num_attention_heads=(2, 2), down_num_layers_per_block=(1, 1), **widths,
    )  # fmt: skip
    tower, tokenizer = _text_tower(clip, projected=True), CLIPTokenizer.from_pretrained(clip)
    scheduler = diffusers.DDPMWuerstchenScheduler()
    return {"tokenizer": tokenizer, "text_encoder": tower, "prior": unet.eval(), "scheduler": scheduler}


def karlo_folder(folder: Path, clip: Path) -> Path:
    """A folder laid out like Karlo's repository without its prior, index included."""
    scaling = {"down_block_types": ("ResnetDownsampleBlock2D",) * 2, "up_block_types": ("ResnetUpsampleBlock2D",) * 2}
    scaling |= {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
    scaling |= {"sample_size": 16, "in_channels": 6, "out_channels": 3}
    parts = {
        # Karlo projects token states and embeddings alike, so they have one width
        "text_encoder": _text_tower(clip, projected=True),
        "tokenizer": CLIPTokenizer.from_pretrained(clip),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=DIM, time_embed_dim=64, cross_attention_dim=DIM),
        "decoder": _unet(**_RESNET, sample_size=8, in_channels=3, out_channels=6, class_embed_type="identity"),
        "super_res_first": diffusers.UNet2DModel(**scaling),
        "super_res_last": diffusers.UNet2DModel(**scaling),
        "prior_scheduler": diffusers.UnCLIPScheduler(prediction_type="sample"),
        "decoder_scheduler": diffusers.UnCLIPScheduler(variance_type="learned_range"),
        "super_res_scheduler": diffusers.UnCLIPScheduler(),
    }
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    index = {"_class_name": "UnCLIPPipeline", "text_proj": ["unclip", "UnCLIPTextProjModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def ip_adapter_weights(folder: Path, pipe) -> Path:
    """IP-Adapter weights for a pipeline, with the names of h94's, or for FLUX.1 of XLabs'."""
    torch.manual_seed(0)
    model = getattr(pipe, "unet", None) or pipe.transformer
    flux = hasattr(pipe, "transformer")
    width = model.config.joint_attention_dim if flux else model.config.cross_attention_dim
    projection = "ip_adapter_proj_model" if flux else "image_proj"
    tensors = {
        f"{projection}.proj.weight": torch.randn(4 * width, DIM),
        f"{projection}.proj.bias": torch.randn(4 * width),
        f"{projection}.norm.weight": torch.ones(width),
        f"{projection}.norm.bias": torch.zeros(width),
    }
    if flux:
        for kind in ("k", "v"):
            name = f"double_blocks.0.processor.ip_adapter_double_stream_{kind}_proj"
            tensors[f"{name}.weight"] = torch.randn(model.inner_dim, width) / width**0.5
            tensors[f"{name}.bias"] = torch.zeros(model.inner_dim)
    else:
        # the published files number the attention layers of the UNet, cross-attention on the odd ones
        crossed = [name for name in model.attn_processors if name.endswith("attn2.processor") and "motion" not in name]
        for index, name in enumerate(crossed):
            layer = model.get_submodule(name.removesuffix(".processor"))
            for kind, linear in {"to_k_ip": layer.to_k, "to_v_ip": layer.to_v}.items():
                tensors[f"ip_adapter.{2 * index + 1}.{kind}.weight"] = torch.randn_like(linear.weight) / width**0.5
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "ip_adapter.safetensors")
    return folder / "ip_adapter.safetensors"
