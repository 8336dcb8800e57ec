"""Every Python snippet of docs/decoders.md runs, tiny models standing in for the repositories it names."""

import re

import pytest
import torch
from diffusers import (
    KandinskyV22CombinedPipeline,
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    UnCLIPScheduler,
)
from PIL import Image
from tiny_pipelines import (
    DIM,
    clip_parts,
    ip_adapter_weights,
    kandinsky_parts,
    karlo_folder,
    prior_transformer,
    stable_diffusion,
    stable_diffusion_xl,
    stable_unclip_img2img,
)

PAGE = "docs/decoders.md"


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tiny_clip, tmp_path_factory) -> dict[str, str]:
    """A tiny folder for each repository."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    prior = {"prior": prior_transformer(tiny_clip, DIM), "scheduler": UnCLIPScheduler(prediction_type="sample")}
    prior = {f"prior_{name}": part for name, part in {**prior, **clip_parts(tiny_clip)}.items()}
    sd15, sdxl = stable_diffusion(tiny_clip), stable_diffusion_xl(tiny_clip)
    pipelines = {
        "kandinsky-community/kandinsky-2-2-decoder": KandinskyV22CombinedPipeline(**kandinsky_parts(DIM), **prior),
        "kandinsky-community/kandinsky-2-2-decoder-inpaint": KandinskyV22InpaintPipeline(
            **kandinsky_parts(DIM, in_channels=9)
        ),
        "kandinsky-community/kandinsky-2-2-controlnet-depth": KandinskyV22ControlnetPipeline(
            **kandinsky_parts(DIM, in_channels=8, hint=True)
        ),
        "stabilityai/stable-diffusion-2-1-unclip-small": stable_unclip_img2img(tiny_clip, DIM),
        "stable-diffusion-v1-5/stable-diffusion-v1-5": sd15,
        "stabilityai/stable-diffusion-xl-base-1.0": sdxl,
    }
    for name, pipe in pipelines.items():
        pipe.save_pretrained(root / name)
    karlo_folder(root / "kakaobrain/karlo-v1-alpha", tiny_clip, DIM)
    for folder, file, unet in (
        ("models", "ip-adapter_sd15.safetensors", sd15.unet),
        ("sdxl_models", "ip-adapter_sdxl.safetensors", sdxl.unet),
    ):
        weights = root / "h94/IP-Adapter" / folder
        ip_adapter_weights(weights, unet, DIM).rename(weights / file)
    names = [*pipelines, "kakaobrain/karlo-v1-alpha", "h94/IP-Adapter"]
    return {f'"{name}"': f'"{root / name}"' for name in names}


def test_the_page_has_a_snippet_for_every_decoder(root):
    text = (root / PAGE).read_text()
    for name in ("kandinsky-2-2-decoder", "unclip-small", "karlo-v1-alpha", "ip-adapter_sd15", "ip-adapter_sdxl"):
        assert any(name in snippet for snippet in snippets(text))


@pytest.mark.parametrize("index", range(9))
def test_snippet(index, root, stand_ins, adapter_folder, tmp_path, monkeypatch):
    found = snippets((root / PAGE).read_text())
    assert len(found) == 9
    code = found[index]
    for name, folder in stand_ins.items():
        code = code.replace(name, folder)
    # the adapter of every recipe is the tiny one; its pipeline is saved elsewhere
    code = code.replace('"runs/kandinsky22-prior"', '"saved-prior"')
    code = re.sub(r'"runs/[\w-]+"', repr(str(adapter_folder)), code)
    # a processor, few pixels, three steps
    code = code.replace('"cuda"', '"cpu"').replace("float16", "float32").replace("512", "64")
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=3", code)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    if "karlo" in code:
        # Karlo's own text tower is another one than the tiny CLIP
        code = code.replace("dtype=", "check=False, dtype=")
    names = {}
    exec(compile(code, f"{PAGE}, snippet {index}", "exec"), names)
    if "image" in names:
        assert isinstance(names["image"], Image.Image)
