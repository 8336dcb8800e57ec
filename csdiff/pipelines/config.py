"""Options of `generate.py` and `csdiff generate`: the command line, the YAML file and the help text come from here."""

from dataclasses import dataclass, field


@dataclass
class GenerateConfig:
    """Turns prompts into pictures with an adapter and a decoder."""

    prompt: list[str] = field(default_factory=list)
    """Text to draw; give the option again for more pictures."""
    prompts_file: str | None = None
    """A text file with one prompt a line, drawn after those of --prompt. Empty lines are skipped."""
    adapter: str | None = None
    """Folder of a trained adapter (or a hub repository). none hands the raw text embedding to the decoder, which
    shows what the adapter does. Default: the one shipped with csdiff."""
    decoder: str = "tiny"
    """A preset (tiny, kandinsky22, karlo, sd-unclip-s, sd-unclip-h, ip-adapter-sd15, ip-adapter-sdxl), a folder saved
    by diffusers, or a hub repository."""
    ip_adapter: str | None = None
    """IP-Adapter weights (a .safetensors file, or REPO/PATH/FILE on the hub), for Stable Diffusion folders and
    repositories that are no preset."""
    num_images: int = 1
    """Pictures for each prompt."""
    seed: int = 0
    """Seed of a prompt's first picture; its next ones use seed + 1, seed + 2, ..."""
    steps: int | None = None
    """Denoising steps of the decoder. Default: what the decoder is made for."""
    guidance: float | None = None
    """Classifier-free guidance scale of the decoder; 1 turns it off. Default: what the decoder is made for."""
    negative_prompt: str | None = None
    """What the pictures should not show. Default: the decoder's own negative."""
    height: int | None = None
    """Height in pixels. Default: what the decoder is made for."""
    width: int | None = None
    """Width in pixels. Default: what the decoder is made for."""
    output: str = "outputs"
    """Folder for the pictures, made when it does not exist."""
    batch_size: int = 1
    """Pictures drawn at once. 1 gives the same bytes whatever else is drawn; more is faster on a GPU and may change
    the last bit of some pixels."""
    device: str = "auto"
    """Where the models run: auto, cpu, cuda, cuda:1, mps, ..."""
    dtype: str = "auto"
    """Number format of the models: auto (float16 on CUDA, float32 elsewhere), float32, float16 or bfloat16."""
    offload: bool = False
    """Keep models in main memory and bring each to the GPU only while it works."""
    grid: bool = True
    """Also write all pictures as one grid when there are several."""
    progress: bool = True
    """Show the decoder's progress bar."""
