"""Every option of `csdiff evaluate`: the command line, the YAML file, the help text and the checks come from here."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from jsonargparse.typing import restricted_number_type

from csdiff.errors import CSDiffError
from csdiff.files import absolute
from csdiff.options import PositiveFloat, PositiveInt, Seed, Steps, check_options

PictureBaseline = Literal["raw_text", "mean_shift", "ridge", "image"]
Rows = restricted_number_type("Rows", int, (">=", 8), docstring="A whole number from 8.")
Resamplings = restricted_number_type("Resamplings", int, (">=", 100), docstring="A whole number from 100.")
Prompts = restricted_number_type("Prompts", int, (">=", 2), docstring="A whole number from 2.")


@dataclass
class EvaluateConfig:
    """Says how good an adapter is, on held-out embeddings and on pictures."""

    adapter: str | None = None
    """Folder of a trained adapter (or a hub repository). Default: the one shipped with csdiff."""
    compare: list[str] = field(default_factory=list)
    """Several adapters, side by side on the same rows, with intervals for their differences."""
    data: str | None = None
    """Held-out pairs: an embedding store, or captions with images in any form that `csdiff embed` reads."""
    train: str | None = None
    """Pairs to fit the baselines to, in the same forms. Default: the store that the adapter was trained on, where it
    is still there; else they are cross-fitted on the held-out pairs. The table says which."""
    split: str = "test"
    """Split of --data and --pictures where they have several."""
    json: str | None = None
    """File for all the numbers and the manifest."""
    report: str | None = None
    """HTML file with the numbers and plots, complete in itself."""
    full: bool = False
    """Measure on all rows. Default: at most --max_rows are read, and above 5,000 ranks and kernels are estimated from
    some of them, with standard errors."""
    max_rows: Rows = 20000
    """Rows of a larger data set are sampled evenly, unless --full."""
    bandwidths: list[PositiveFloat] = field(default_factory=lambda: [0.25, 0.35, 0.5, 1.0])
    """Kernel widths, on unit vectors, at which the Cauchy-Schwarz divergence is given."""
    concepts: str | None = None
    """Metadata column of --data that names what an image shows, for the groups by concept. Default: concept or label,
    where there is one."""
    bootstrap: Resamplings = 1000
    """Resamplings behind the intervals of --compare."""
    seed: Seed = 0
    """Of random splits, of adapters that sample, and of the first picture of each prompt."""
    text_encoder: str | None = None
    """Where the adapter's text encoder is (a folder or a hub id), if not where its csdiff.json says."""
    image_encoder: str | None = None
    """Where the adapter's image encoder is, likewise."""
    decoder: str | None = None
    """Also draw pictures with this decoder (a preset, a folder or a hub repository) and measure them."""
    prompts: str | None = None
    """Text file with one prompt a line. Default: the first caption of each picture of --pictures."""
    pictures: str | None = None
    """Reference pictures, with captions, in any form that `csdiff embed` reads. Default: --data, when it has some."""
    num_prompts: Prompts | None = None
    """Draw so many of the prompts, evenly spread. Default: all."""
    num_images: PositiveInt = 1
    """Pictures for each prompt, of seeds seed, seed + 1, ...; two and more tell the diversity among seeds."""
    picture_baselines: list[PictureBaseline] = field(
        default_factory=lambda: ["raw_text", "mean_shift", "ridge", "image"]
    )
    """Draw these beside the adapters: raw_text, mean_shift, ridge, and image (the true image embeddings: the most that
    the decoder can do); [] for none. They are drawn once and kept."""
    extractors: list[str] = field(default_factory=list)
    """Feature spaces of the distances between pictures: efficientnet-lite0, inception, or the id of an image
    encoder. Default: efficientnet-lite0."""
    clip: str = "tiny-clip"
    """CLIP model of CMMD, CLIP score and retrieval."""
    output: str = "outputs/evaluate"
    """Folder of the drawn pictures; those that are there already, drawn with the same settings, are kept."""
    steps: Steps | None = None
    """Denoising steps of the decoder. Default: what the decoder is made for."""
    guidance: float | None = None
    """Classifier-free guidance scale of the decoder. Default: what the decoder is made for."""
    size: PositiveInt | None = None
    """Height and width of the drawn pictures in pixels. Default: what the decoder is made for."""
    batch_size: PositiveInt = 16
    """Pictures drawn at once."""
    device: str = "auto"
    """Where the models run: auto (the accelerator if there is one), cpu, cuda, mps."""
    progress: bool = True
    """Show progress bars on stderr."""


def check(config: EvaluateConfig) -> None:
    """Every option against its type, and what crosses two of them; a CSDiffError names the option."""
    check_options(config)
    if config.data is None and (config.decoder is None or config.pictures is None):
        raise CSDiffError(
            "data: expected held-out pairs (a store, or captions with images), or --decoder and reference --pictures, "
            "found neither."
        )
    if config.prompts is not None and config.decoder is None:
        raise CSDiffError("prompts: expected a decoder to draw them with, found none; give --decoder.")
    names = config.compare
    if len({absolute(name) for name in names}) != len(names) or (len(names) == 1 and config.adapter is None):
        raise CSDiffError(f"compare: expected two or more different adapters, found {', '.join(names)}.")
    if config.size is not None and config.size % 8:
        raise CSDiffError(f"size: expected a multiple of 8 pixels, found {config.size}.")
    for option in ("json", "report"):
        path = getattr(config, option)
        if path is None:
            continue
        folder = Path(path).absolute().parent
        if Path(path).is_dir() or not folder.is_dir():
            raise CSDiffError(f"{option}: expected the name of a file in an existing folder, found {path!r}.")
        try:
            # Before anything is measured; permission bits do not tell of read-only disks and special folders.
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise CSDiffError(f"{option}: {path} cannot be written ({error.strerror}); name another.") from error
