"""Adapters as the image prompt of every pipeline that takes a pooled embedding beside the prompt."""

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxImg2ImgPipeline,
    FluxInpaintPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    MotionAdapter,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from PIL import Image
from tiny_pipelines import (
    DIM,
    PROMPT,
    flux_ip_adapter_weights,
    flux_parts,
    ip_adapter_weights,
    stable_cascade_prior,
    stable_diffusion,
    stable_diffusion_xl,
)

from csdiff import CSDiffError
from csdiff.pipelines import ip_adapter_arguments, ip_adapter_image_embeds

SMALL = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "latent"}
PHOTO, MASK = Image.new("RGB", (32, 32), "red"), Image.new("L", (32, 32), 255)


@pytest.fixture(scope="module")
def stable(tiny_clip, tmp_path_factory):
    """Stable Diffusion 1.5 and SDXL with an IP-Adapter, and AnimateDiff and ControlNet of their parts."""
    torch.manual_seed(0)
    sd15, sdxl = stable_diffusion(tiny_clip), stable_diffusion_xl(tiny_clip)
    parts = {name: part for name, part in sd15.components.items() if name not in ("safety_checker", "unet")}
    motion = MotionAdapter(
        block_out_channels=(16, 32), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=8
    )
    options = {"conditioning_embedding_out_channels": (8, 16)}
    pipes = {
        "StableDiffusionPipeline": sd15,
        "StableDiffusionControlNetPipeline": StableDiffusionControlNetPipeline(
            **parts, unet=sd15.unet, safety_checker=None, requires_safety_checker=False,
            controlnet=ControlNetModel.from_unet(sd15.unet, **options),
        ),
        "AnimateDiffPipeline": AnimateDiffPipeline(**parts, unet=sd15.unet, motion_adapter=motion),
        "StableDiffusionXLPipeline": sdxl,
        "StableDiffusionXLControlNetPipeline": StableDiffusionXLControlNetPipeline(
            **sdxl.components, controlnet=ControlNetModel.from_unet(sdxl.unet, **options)
        ),
    }  # fmt: skip
    for unet, names in (
        (sd15.unet, ("StableDiffusionPipeline", "AnimateDiffPipeline")),
        (sdxl.unet, ("StableDiffusionXLPipeline",)),
    ):
        weights = ip_adapter_weights(tmp_path_factory.mktemp("ip-adapter"), unet, DIM)
        for name in names:
            pipes[name].load_ip_adapter(
                str(weights.parent), subfolder="", weight_name=weights.name, image_encoder_folder=None
            )
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


@pytest.fixture(scope="module")
def fluxes(tiny_clip, tmp_path_factory):
    """FLUX.1 with an IP-Adapter, and the other pipelines of the same parts."""
    torch.manual_seed(0)
    parts = flux_parts(tiny_clip)
    pipe = FluxPipeline(**parts)
    weights = flux_ip_adapter_weights(tmp_path_factory.mktemp("ip-adapter"), pipe.transformer, DIM)
    pipe.load_ip_adapter(
        str(weights.parent), weight_name=weights.name, image_encoder_pretrained_model_name_or_path=None
    )
    names = ("num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads", "joint_attention_dim")
    names += ("pooled_projection_dim", "guidance_embeds", "axes_dims_rope", "in_channels")
    control = FluxControlNetModel(**{name: pipe.transformer.config[name] for name in names})
    pipes = {
        "FluxPipeline": pipe,
        "FluxImg2ImgPipeline": FluxImg2ImgPipeline(**parts),
        "FluxInpaintPipeline": FluxInpaintPipeline(**parts),
        "FluxControlNetPipeline": FluxControlNetPipeline(**parts, controlnet=control),
        "FluxKontextPipeline": FluxKontextPipeline(**parts),
    }
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    return pipes


STABLE = {
    "StableDiffusionPipeline": {},
    "StableDiffusionControlNetPipeline": {"image": PHOTO},
    "AnimateDiffPipeline": {"num_frames": 2},
    "StableDiffusionXLPipeline": {},
    "StableDiffusionXLControlNetPipeline": {"image": PHOTO},
}
FLUX = {
    "FluxPipeline": {},
    "FluxImg2ImgPipeline": {"image": PHOTO, "strength": 1.0},
    "FluxInpaintPipeline": {"image": PHOTO, "mask_image": MASK, "strength": 1.0},
    "FluxControlNetPipeline": {"control_image": PHOTO},
    "FluxKontextPipeline": {"image": PHOTO, "_auto_resize": False, "max_area": 32 * 32},
}


def seen(pipe, **arguments) -> list[torch.Tensor]:
    """Runs the pipeline; returns what its projection of the image embedding is given, call by call."""
    rows = []
    projection = (getattr(pipe, "unet", None) or pipe.transformer).encoder_hid_proj.image_projection_layers[0]
    hook = projection.register_forward_pre_hook(lambda module, args: rows.append(args[0].reshape(-1, DIM)))
    try:
        pipe(**{"prompt": PROMPT, **SMALL, **arguments})
    finally:
        hook.remove()
    return rows


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize(("guidance", "negative"), [(1.0, None), (5.0, None), (5.0, "blurry")])
def test_stable_diffusion_is_prompted_by_the_adapter(name, guidance, negative, stable, adapter, embed):
    pipe, positive = stable[name], embed(adapter, PROMPT)
    negative = None if negative is None else embed(adapter, negative)
    given = ip_adapter_arguments(pipe, positive, negative, guidance=guidance > 1)
    first = seen(pipe, **given, **STABLE[name], guidance_scale=guidance)[0]
    expected = [positive]
    if guidance > 1:
        expected.insert(0, torch.zeros_like(positive) if negative is None else negative)
    torch.testing.assert_close(first, torch.cat(expected), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FLUX)
@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_flux_is_prompted_by_the_adapter_and_true_cfg_by_the_negative(name, true_cfg, fluxes, adapter, embed):
    pipe, positive, negative = fluxes[name], embed(adapter, PROMPT), embed(adapter, "blurry")
    options = {"true_cfg_scale": true_cfg, "negative_prompt": "blurry"} if true_cfg > 1 else {}
    rows = seen(pipe, **ip_adapter_arguments(pipe, positive, negative), **FLUX[name], **options)
    expected = [positive, negative] if true_cfg > 1 else [positive]
    torch.testing.assert_close(torch.cat(rows), torch.cat(expected), atol=1e-5, rtol=0)
    # Without a negative of one's own there are two lists all the same: no image tower is asked for.
    assert len(seen(pipe, **ip_adapter_arguments(pipe, positive), **FLUX[name])) == 1


def test_stable_cascade_takes_the_embedding(tiny_clip, adapter, embed):
    torch.manual_seed(0)
    pipe, rows = stable_cascade_prior(tiny_clip, DIM), []
    pipe.set_progress_bar_config(disable=True)
    pipe.prior.clip_img_mapper.register_forward_pre_hook(lambda module, args: rows.append(args[0]))
    positive = embed(adapter, PROMPT)
    pipe(PROMPT, **ip_adapter_arguments(pipe, positive), num_inference_steps=1, height=128, width=128)
    torch.testing.assert_close(rows[0], torch.stack([positive, torch.zeros_like(positive)]), atol=1e-5, rtol=0)


def test_several_prompts_are_not_blended_without_a_word(stable, fluxes, adapter, embed):
    both = embed(adapter, "a cat", "a dog")
    for pipe in (stable["StableDiffusionPipeline"], fluxes["FluxPipeline"]):
        with pytest.raises(CSDiffError, match=r"found 2.*blend=True"):
            ip_adapter_arguments(pipe, both)
        rows = seen(pipe, **ip_adapter_arguments(pipe, both, guidance=False, blend=True), guidance_scale=1.0)[0]
        torch.testing.assert_close(rows, both, atol=1e-5, rtol=0)


def test_shapes():
    one, three = torch.randn(DIM), torch.randn(3, DIM)
    assert ip_adapter_image_embeds(one)[0].shape == (2, 1, DIM)
    assert ip_adapter_image_embeds(three, guidance=False, blend=True)[0].shape == (1, 3, DIM)
    (embeds,) = ip_adapter_image_embeds(three.half(), one, blend=True)
    torch.testing.assert_close(embeds, torch.stack([one.half().expand(3, -1), three.half()]))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 2, DIM),), r"found \(1, 2, 16\)"),
        ((torch.zeros(1, DIM), torch.zeros(2, DIM)), r"expected \(1, 16\), found \(2, 16\)"),
        ((torch.zeros(2, DIM),), "one embedding a call, found 2"),
    ],
)
def test_other_shapes_are_refused(arguments, words):
    with pytest.raises(CSDiffError, match=words):
        ip_adapter_image_embeds(*arguments)


def test_other_pipelines_are_refused(tiny_decoder):
    from diffusers import KandinskyV22Pipeline

    with pytest.raises(CSDiffError, match="found KandinskyV22Pipeline"):
        ip_adapter_arguments(KandinskyV22Pipeline.from_pretrained(tiny_decoder), torch.zeros(1, DIM))
