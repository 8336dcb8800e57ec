"""Options of `csdiff app`."""

from dataclasses import dataclass, field
from typing import Literal

from csdiff.options import Port, PositiveInt


@dataclass
class AppConfig:
    """Serves a page in the browser: prompts to images, blends, and a look inside adapters and stores."""

    adapter: str | None = None
    """Adapter the page starts with: a folder (or a hub repository), or none for the raw text embedding. Default: the
    one shipped with csdiff."""
    decoder: str = "tiny"
    """Decoder the page starts with: a preset, a folder saved by diffusers, or a hub repository; see `csdiff generate
    --help`."""
    host: str = "127.0.0.1"
    """Address to serve on. Any other than this machine's own (0.0.0.0: all of its addresses) needs a password."""
    port: Port = 7860
    """Port to serve on; 0 takes a free one."""
    password: str | None = None
    """Ask for this password. Other users of this machine can read it in the list of processes; the environment
    variable CSDIFF_APP_PASSWORD does the same without that."""
    allow_host: list[str] = field(default_factory=list)
    """Name under which a proxy offers the page, as browsers send it in Host (example.org); give it again for more.
    Without a password, requests for any other name than this machine's own are refused."""
    max_images: PositiveInt = 8
    """Most images for one press of the button."""
    max_upload_mb: PositiveInt = 200
    """Largest file that can be uploaded, in megabytes."""
    max_waiting: PositiveInt = 32
    """Most presses of the button that may wait; images are drawn one after the other."""
    device: str = "auto"
    """Where the models run: auto, cpu, cuda, cuda:1, mps, ..."""
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    """Number format of the models. auto: float16 on CUDA (FLUX.1: bfloat16), float32 elsewhere."""
    offload: bool = False
    """Keep models in main memory and bring each to the GPU only while it works."""
    open_browser: bool = False
    """Also open the page in this machine's browser."""
