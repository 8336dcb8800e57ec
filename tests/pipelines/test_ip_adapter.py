"""Adapters as the image prompt of Stable Diffusion with IP-Adapter."""

import pytest
import torch
from tiny_pipelines import DIM, PROMPT, ip_adapter_weights, stable_diffusion, stable_diffusion_xl

from csdiff import CSDiffError
from csdiff.pipelines import ip_adapter_image_embeds

PIPELINES = {"SD 1.5": stable_diffusion, "SDXL": stable_diffusion_xl}


@pytest.fixture(scope="module", params=PIPELINES)
def pipe(request, tiny_clip, tmp_path_factory):
    torch.manual_seed(0)
    pipe = PIPELINES[request.param](tiny_clip)
    folder = tmp_path_factory.mktemp("ip-adapter")
    weights = ip_adapter_weights(folder, pipe.unet, DIM)
    pipe.load_ip_adapter(str(folder), subfolder="", weight_name=weights.name, image_encoder_folder=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image_embeds_seen(pipe, **arguments) -> torch.Tensor:
    """Runs the pipeline; returns the image embeddings that the UNet projects."""
    seen = []
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    hook = projection.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        pipe(prompt=PROMPT, num_inference_steps=1, height=32, width=32, output_type="np", **arguments)
    finally:
        hook.remove()
    return seen[0]


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("negative", [None, "blurry"])
def test_the_unet_is_prompted_by_the_adapter(pipe, adapter, embed, guidance, negative):
    positive = embed(adapter, PROMPT)
    negative = None if negative is None else embed(adapter, negative)
    embeds = ip_adapter_image_embeds(positive, negative, guidance=guidance > 1)
    seen = image_embeds_seen(pipe, ip_adapter_image_embeds=embeds, guidance_scale=guidance).reshape(-1, DIM)
    if guidance > 1:
        expected = torch.zeros_like(positive) if negative is None else negative
        torch.testing.assert_close(seen[:1], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[-1:], positive, atol=1e-5, rtol=0)


def test_the_picture_depends_on_the_embedding(pipe, adapter, embed):
    def draw(*prompt):
        embeds = ip_adapter_image_embeds(embed(adapter, *prompt))
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 1, "height": 32, "width": 32, "output_type": "np", "generator": generator}
        return pipe(prompt="", ip_adapter_image_embeds=embeds, **options).images

    assert (draw("a cat") == draw("a cat")).all()
    assert (draw("a cat") != draw(PROMPT)).any()
    # two image prompts for one picture
    assert draw("a cat", PROMPT).shape == (1, 32, 32, 3)


def test_shapes():
    one, three = torch.randn(DIM), torch.randn(3, DIM)
    assert ip_adapter_image_embeds(one)[0].shape == (2, 1, DIM)
    assert ip_adapter_image_embeds(three)[0].shape == (2, 3, DIM)
    assert ip_adapter_image_embeds(three, guidance=False)[0].shape == (1, 3, DIM)
    embeds = ip_adapter_image_embeds(three, one, dtype=torch.float16)[0]
    assert embeds.dtype == torch.float16
    torch.testing.assert_close(embeds[0], one.half().expand(3, -1))
    torch.testing.assert_close(embeds[1], three.half())


def test_other_shapes_are_refused():
    with pytest.raises(CSDiffError, match=r"found \(1, 2, 16\)"):
        ip_adapter_image_embeds(torch.zeros(1, 2, DIM))
    with pytest.raises(CSDiffError, match=r"expected \(3, 16\), found \(2, 16\)"):
        ip_adapter_image_embeds(torch.zeros(3, DIM), torch.zeros(2, DIM))
