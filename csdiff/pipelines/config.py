"""Options of `generate.py` and `csdiff generate`: the command line, the YAML file and the help text come from here."""

from dataclasses import dataclass, field
from typing import Literal

from csdiff.options import ClosedUnitInterval, NonEmpty, NonNegativeFloat, PositiveFloat, PositiveInt, Seed, Steps


@dataclass
class GenerateConfig:
    """Turns prompts into images with an adapter and a decoder."""

    prompt: list[str] = field(default_factory=list)
    """Text to draw; give the option again for more images."""
    prompts_file: str | None = None
    """A text file with one prompt a line, drawn after those of --prompt. Empty lines are skipped."""
    adapter: str | None = None
    """Folder of a trained adapter (or a hub repository). none hands the raw text embedding to the decoder, which
    shows what the adapter does. Default: the one shipped with csdiff."""
    decoder: str = "tiny"
    """A preset (tiny, kandinsky22, karlo, sd-unclip-s, sd-unclip-h, ip-adapter-sd15, ip-adapter-sdxl, sdxl-vit-h,
    flux-ip-adapter, flux-ip-adapter-v2), a folder saved by diffusers, or a hub repository."""
    ip_adapter: str | None = None
    """IP-Adapter weights for a Stable Diffusion or FLUX.1 decoder that is no preset: a .safetensors file, a folder
    with one, REPO or REPO/PATH/FILE on the hub."""
    num_images: PositiveInt = 1
    """Images for each prompt."""
    seed: Seed = 0
    """Seed of a prompt's first image; its next ones use seed + 1, seed + 2, ..."""
    spread: ClosedUnitInterval = 0.0
    """Share of noise in the image embedding, for more variety among the images of a prompt: 0.3 varies details, 1 is
    an image of anything. For adapters with one answer a prompt."""
    steps: Steps | None = None
    """Denoising steps of the decoder. Default: what the decoder is made for."""
    guidance: NonNegativeFloat | None = None
    """Classifier-free guidance scale of the decoder; 1 turns it off. Default: what the decoder is made for. FLUX.1
    reads it as a number beside the prompt and draws once a step at any value."""
    true_cfg: PositiveFloat = 1.0
    """Classifier-free guidance for FLUX.1, at twice the time; the first IP-Adapter of XLabs (v1) wants about 4."""
    negative_prompt: str | None = None
    """What the images should not show. Default: the decoder's own negative."""
    height: PositiveInt | None = None
    """Height in pixels. Default: what the decoder is made for."""
    width: PositiveInt | None = None
    """Width in pixels. Default: what the decoder is made for."""
    output: NonEmpty = "outputs"
    """Folder for the images, made when it does not exist."""
    batch_size: PositiveInt = 1
    """Images drawn at once. 1 gives the same pixels whatever else is drawn; more is faster on a GPU and may change
    the last bit of some."""
    text_encoder: str | None = None
    """Where the adapter's text encoder is now, if not where its csdiff.json says: a folder or a hub repository."""
    image_encoder: str | None = None
    """The same for the image encoder, which gives Kandinsky 2.2 and FLUX.1 their default negative."""
    device: str = "auto"
    """Where the models run: auto, cpu, cuda, cuda:1, mps, ..."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the models. auto: float16 on CUDA (FLUX.1: bfloat16), float32 elsewhere."""
    offload: bool = False
    """Keep models in main memory and bring each to the GPU only while it works."""
    grid: bool = True
    """Also write all images as one grid when there are several."""
    progress: bool = True
    """Show the decoder's progress bar."""
