"""Every Python snippet of docs/decoders.md runs, tiny models standing in for the repositories it names.

So do the three commands for FLUX.1.
"""

import re
import shlex

import pytest
import torch
from PIL import Image
from tiny_pipelines import build, ip_adapter_weights, karlo_folder

from csdiff.cli import run_command

PAGE = "docs/decoders.md"
PIPELINES = {
    "kandinsky-community/kandinsky-2-2-decoder": "KandinskyV22CombinedPipeline",
    "kandinsky-community/kandinsky-2-2-decoder-inpaint": "KandinskyV22InpaintPipeline",
    "kandinsky-community/kandinsky-2-2-controlnet-depth": "KandinskyV22ControlnetPipeline",
    "stabilityai/stable-diffusion-2-1-unclip-small": "StableUnCLIPImg2ImgPipeline",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "StableDiffusionPipeline",
    "stabilityai/stable-diffusion-xl-base-1.0": "StableDiffusionXLPipeline",
    "black-forest-labs/FLUX.1-dev": "FluxPipeline",
    "stabilityai/stable-cascade-prior": "StableCascadePriorPipeline",
}


def snippets(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.fixture(scope="module")
def stand_ins(tiny_clip, tmp_path_factory) -> dict[str, str]:
    """A tiny folder for each repository."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("hub")
    pipes = {class_name: build(class_name, tiny_clip) for class_name in PIPELINES.values()}
    folders = {name: pipes[class_name] for name, class_name in PIPELINES.items()} | {
        "lllyasviel/control_v11f1p_sd15_depth": build("StableDiffusionControlNetPipeline", tiny_clip).controlnet,
        "guoyww/animatediff-motion-adapter-v1-5-2": build("AnimateDiffPipeline", tiny_clip).motion_adapter,
    }
    for name, part in folders.items():
        part.save_pretrained(root / name)
    karlo_folder(root / "kakaobrain/karlo-v1-alpha", tiny_clip)
    for place, class_name in (
        ("h94/IP-Adapter/models/ip-adapter_sd15.safetensors", "StableDiffusionPipeline"),
        ("h94/IP-Adapter/sdxl_models/ip-adapter_sdxl_vit-h.safetensors", "StableDiffusionXLPipeline"),
        ("XLabs-AI/flux-ip-adapter-v2/ip_adapter.safetensors", "FluxPipeline"),
    ):
        ip_adapter_weights((root / place).parent, pipes[class_name]).rename(root / place)
    names = [*folders, "kakaobrain/karlo-v1-alpha", "h94/IP-Adapter", "XLabs-AI/flux-ip-adapter-v2"]
    return {f'"{name}"': f'"{root / name}"' for name in names}


@pytest.mark.parametrize("index", range(12))
def test_snippet(index, root, stand_ins, adapter_folder, tmp_path, monkeypatch):
    found = snippets((root / PAGE).read_text())
    assert len(found) == 12
    code = found[index]
    for name, folder in stand_ins.items():
        code = code.replace(name, folder)
    # the adapter of every recipe is the tiny one; its pipeline is saved elsewhere
    code = code.replace('"runs/kandinsky22-prior"', '"saved-prior"')
    code = re.sub(r'"runs/[\w-]+"', repr(str(adapter_folder)), code)
    # a processor, few pixels, three steps
    code = code.replace('"cuda"', '"cpu"').replace("512", "64").replace("num_frames=16", "num_frames=2")
    code = re.sub(r"b?float16", "float32", code)
    code = re.sub(r"num_inference_steps=\d+", "num_inference_steps=3", code)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("photo.png")
    Image.new("L", (64, 64), 255).save("mask.png")
    Image.new("RGB", (32, 32), "gray").save("depth.png")
    if "karlo" in code:
        # Karlo's own text tower is another one than the tiny CLIP
        code = code.replace("dtype=", "check=False, dtype=")
    names = {}
    exec(compile(code, f"{PAGE}, snippet {index}", "exec"), names)
    if "image" in names:
        assert isinstance(names["image"], Image.Image)


def test_three_commands_from_a_folder_of_pictures_to_an_image_of_flux(
    root, stand_ins, tiny_clip, pictures, tmp_path, monkeypatch
):
    text = (root / PAGE).read_text()
    commands = re.search(r"```bash\n(csdiff train.*?)```", text, re.DOTALL)[1].strip().splitlines()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(root / "configs")
    (tmp_path / "my-images").symlink_to(pictures)
    base, weights = (
        stand_ins[f'"{name}"'].strip('"') for name in ("black-forest-labs/FLUX.1-dev", "XLabs-AI/flux-ip-adapter-v2")
    )
    small = {
        "train": [
            f"--data.text_encoder={tiny_clip}", f"--data.image_encoder={tiny_clip}", "--max_steps=2", "--batch_size=8",
            "--mixed_precision=no", "--adapter_options.num_layers=1", "--logging.progress=false",
            "--adapter_options.num_attention_heads=2", "--adapter_options.attention_head_dim=8",
        ],
        "info": [],
        "generate": [f"--ip_adapter={weights}", "--steps=2", "--height=32", "--width=32", "--progress=false"],
    }  # fmt: skip
    for words in map(shlex.split, commands):
        words = [base if word == "flux-ip-adapter-v2" else word for word in words]
        assert run_command(words[1], [*words[2:], *small.pop(words[1])], prog="csdiff") == 0
    assert not small
    assert (tmp_path / "outputs" / "a-red-apple-on-a-table-0.png").is_file()
