"""Tiny, random, real components of every decoder an adapter drives; all take image embeddings of `dim` numbers."""

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DDPMWuerstchenScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PriorTransformer,
    StableCascadePriorPipeline,
    StableCascadeUNet,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    StableUnCLIPImg2ImgPipeline,
    StableUnCLIPPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from csdiff.adapters import MLPAdapter
from csdiff.embeddings.encoders import quiet_loading

TEXT_WIDTH = 16
PROMPT = "a red apple"
DIM = 16


def random_adapter(dim: int = DIM, seed: int = 0, **options) -> MLPAdapter:
    """An MLP adapter whose answers differ from its input, with statistics to un-whiten by."""
    generator = torch.Generator().manual_seed(seed)
    adapter = MLPAdapter(embedding_dim=dim, **options).eval()
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    mean, std = torch.randn(dim, generator=generator), torch.rand(dim, generator=generator) + 0.5
    adapter.set_statistics(mean, std)
    return adapter


def clip_parts(clip: Path) -> dict:
    """The towers and processors of a CLIP folder, under the names that prior pipelines use."""
    with quiet_loading():
        return {
            "text_encoder": CLIPTextModelWithProjection.from_pretrained(clip).eval(),
            "tokenizer": CLIPTokenizer.from_pretrained(clip),
            "image_encoder": CLIPVisionModelWithProjection.from_pretrained(clip).eval(),
            "image_processor": CLIPImageProcessor.from_pretrained(clip),
        }


def prior_transformer(clip: Path, dim: int) -> PriorTransformer:
    """A stock diffusion prior."""
    config = CLIPConfig.from_pretrained(clip).text_config
    return PriorTransformer(
        num_attention_heads=2,
        # as wide as the token states, which then need no projection
        attention_head_dim=config.hidden_size // 2,
        num_layers=1,
        embedding_dim=dim,
        num_embeddings=config.max_position_embeddings,
        encoder_hid_proj_type=None,
    )


def kandinsky_unet(dim: int, in_channels: int = 4, hint: bool = False) -> UNet2DConditionModel:
    """A Kandinsky 2.2 UNet; nine channels for inpainting, a hint for controlnet."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=8,
        addition_embed_type="image_hint" if hint else "image",
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        encoder_hid_dim=dim,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=dim,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        norm_num_groups=8,
    ).eval()


def movq() -> VQModel:
    """A MoVQ with Kandinsky's factor of 8."""
    return VQModel(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        num_vq_embeddings=12,
        vq_embed_dim=4,
        norm_num_groups=8,
        norm_type="spatial",
    ).eval()


def kandinsky_parts(dim: int, **unet_options) -> dict:
    """`unet`, `scheduler` and `movq` of a Kandinsky 2.2 decoder."""
    scheduler = DDPMScheduler(beta_schedule="linear", clip_sample=False, variance_type="learned_range")
    return {"unet": kandinsky_unet(dim, **unet_options), "scheduler": scheduler, "movq": movq()}


def vae() -> AutoencoderKL:
    """An autoencoder of factor 2."""
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()


def text_tower(clip: Path, projected: bool = False) -> CLIPTextModel:
    """A text encoder for the decoder itself, over the vocabulary of `clip`."""
    base = CLIPConfig.from_pretrained(clip).text_config
    config = CLIPTextConfig(
        vocab_size=base.vocab_size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=base.max_position_embeddings,
        projection_dim=TEXT_WIDTH,
        bos_token_id=base.bos_token_id,
        eos_token_id=base.eos_token_id,
        pad_token_id=base.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def stable_unclip_parts(clip: Path, dim: int) -> dict:
    """What both stable unCLIP pipelines share; at noise level 0 the embedding goes through unchanged."""
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        class_embed_type="projection",
        # image embedding and embedded noise level
        projection_class_embeddings_input_dim=2 * dim,
        cross_attention_dim=TEXT_WIDTH,
        use_linear_projection=True,
        norm_num_groups=8,
    ).eval()
    return {
        "image_normalizer": StableUnCLIPImageNormalizer(embedding_dim=dim),
        "image_noising_scheduler": DDPMScheduler(beta_start=1e-12, beta_schedule="linear"),
        "tokenizer": CLIPTokenizer.from_pretrained(clip),
        "text_encoder": text_tower(clip),
        "unet": unet,
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        "vae": vae(),
    }


def stable_unclip(clip: Path, dim: int) -> StableUnCLIPPipeline:
    """Stable unCLIP with a stock prior."""
    parts = clip_parts(clip)
    return StableUnCLIPPipeline(
        prior_tokenizer=parts["tokenizer"],
        prior_text_encoder=parts["text_encoder"],
        prior=prior_transformer(clip, dim),
        prior_scheduler=UnCLIPScheduler(prediction_type="sample"),
        **stable_unclip_parts(clip, dim),
    )


def stable_unclip_img2img(clip: Path, dim: int) -> StableUnCLIPImg2ImgPipeline:
    """Stable unCLIP that takes images or image embeddings."""
    parts = clip_parts(clip)
    return StableUnCLIPImg2ImgPipeline(
        feature_extractor=parts["image_processor"],
        image_encoder=parts["image_encoder"],
        **stable_unclip_parts(clip, dim),
    )


def karlo_components(clip: Path, dim: int) -> dict:
    """Every component of Karlo but the prior, under its folder's name."""
    decoder = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=16,
        attention_head_dim=4,
        resnet_time_scale_shift="scale_shift",
        class_embed_type="identity",
        norm_num_groups=8,
    ).eval()

    def super_resolution() -> UNet2DModel:
        return UNet2DModel(
            sample_size=16,
            in_channels=6,
            out_channels=3,
            down_block_types=("ResnetDownsampleBlock2D",) * 2,
            up_block_types=("ResnetUpsampleBlock2D",) * 2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=8,
        ).eval()

    return {
        # Karlo projects token states and embeddings alike, so they have one width
        "text_encoder": text_tower(clip, projected=True),
        "tokenizer": CLIPTokenizer.from_pretrained(clip),
        "text_proj": UnCLIPTextProjModel(clip_embeddings_dim=dim, time_embed_dim=64, cross_attention_dim=16),
        "decoder": decoder,
        "super_res_first": super_resolution(),
        "super_res_last": super_resolution(),
        "prior_scheduler": UnCLIPScheduler(prediction_type="sample", num_train_timesteps=1000),
        "decoder_scheduler": UnCLIPScheduler(variance_type="learned_range", num_train_timesteps=1000),
        "super_res_scheduler": UnCLIPScheduler(num_train_timesteps=1000),
    }


def karlo_folder(folder: Path, clip: Path, dim: int) -> Path:
    """A folder laid out like Karlo's repository, index included."""
    for name, part in karlo_components(clip, dim).items():
        part.save_pretrained(folder / name)
    index = {
        "_class_name": "UnCLIPPipeline",
        "_diffusers_version": "0.12.0",
        "text_proj": ["unclip", "UnCLIPTextProjModel"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _text_to_image_unet(**options) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        **options,
    ).eval()


def stable_diffusion(clip: Path) -> StableDiffusionPipeline:
    """Stable Diffusion 1.5."""
    return StableDiffusionPipeline(
        unet=_text_to_image_unet(cross_attention_dim=TEXT_WIDTH, attention_head_dim=4),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        vae=vae(),
        text_encoder=text_tower(clip),
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(clip: Path) -> StableDiffusionXLPipeline:
    """SDXL."""
    unet = _text_to_image_unet(
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=(1, 1),
        # six embedded sizes and the pooled text
        projection_class_embeddings_input_dim=6 * 8 + TEXT_WIDTH,
        cross_attention_dim=2 * TEXT_WIDTH,
    )
    return StableDiffusionXLPipeline(
        unet=unet,
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        vae=vae(),
        text_encoder=text_tower(clip),
        text_encoder_2=text_tower(clip, projected=True),
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        tokenizer_2=CLIPTokenizer.from_pretrained(clip),
    )


def ip_adapter_weights(folder: Path, unet: UNet2DConditionModel, dim: int, tokens: int = 4) -> Path:
    """IP-Adapter weights for a UNet, in the layout of the published ones."""
    torch.manual_seed(0)
    width = unet.config.cross_attention_dim
    tensors = {
        "image_proj.proj.weight": torch.randn(tokens * width, dim),
        "image_proj.proj.bias": torch.randn(tokens * width),
        "image_proj.norm.weight": torch.ones(width),
        "image_proj.norm.bias": torch.zeros(width),
    }
    # the published files number the attention layers of the UNet, cross-attention on the odd ones
    for index, name in enumerate(unet.attn_processors):
        if name.endswith("attn2.processor"):
            layer = unet.get_submodule(name.removesuffix(".processor"))
            for kind, linear in {"to_k_ip": layer.to_k, "to_v_ip": layer.to_v}.items():
                tensors[f"ip_adapter.{index}.{kind}.weight"] = torch.randn_like(linear.weight) / width**0.5
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ip-adapter.safetensors"
    save_file(tensors, path)
    return path


def flux_parts(clip: Path, in_channels: int = 4) -> dict:
    """Every component of FLUX.1 but its optional image tower, of one double and one single block."""
    tokenizer = CLIPTokenizer.from_pretrained(clip)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=TEXT_WIDTH,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    ).eval()
    t5 = T5Config(vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=37, num_layers=1, num_heads=4)
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=1,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.06,
        scaling_factor=1.5,
    ).eval()
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(),
        "vae": autoencoder,
        "text_encoder": text_tower(clip),
        "tokenizer": tokenizer,
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer_2": tokenizer,
        "transformer": transformer,
    }


def flux(clip: Path) -> FluxPipeline:
    """FLUX.1."""
    return FluxPipeline(**flux_parts(clip))


def flux_ip_adapter_weights(folder: Path, transformer: FluxTransformer2DModel, dim: int, tokens: int = 4) -> Path:
    """IP-Adapter weights for FLUX.1, with the names that XLabs gave them."""
    torch.manual_seed(0)
    width, inner = transformer.config.joint_attention_dim, transformer.inner_dim
    tensors = {
        "ip_adapter_proj_model.proj.weight": torch.randn(tokens * width, dim),
        "ip_adapter_proj_model.proj.bias": torch.randn(tokens * width),
        "ip_adapter_proj_model.norm.weight": torch.ones(width),
        "ip_adapter_proj_model.norm.bias": torch.zeros(width),
    }
    for block in range(transformer.config.num_layers):
        for kind in ("k", "v"):
            name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind}_proj"
            tensors[f"{name}.weight"] = torch.randn(inner, width) / width**0.5
            tensors[f"{name}.bias"] = torch.zeros(inner)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ip_adapter.safetensors"
    save_file(tensors, path)
    return path


def stable_cascade_prior(clip: Path, dim: int) -> StableCascadePriorPipeline:
    """Stage C of Stable Cascade."""
    prior = StableCascadeUNet(
        conditioning_dim=32,
        block_out_channels=(16, 16),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        clip_image_in_channels=dim,
        clip_text_in_channels=TEXT_WIDTH,
        clip_text_pooled_in_channels=TEXT_WIDTH,
        switch_level=(False,),
    ).eval()
    return StableCascadePriorPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(clip),
        text_encoder=text_tower(clip, projected=True),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
    )
