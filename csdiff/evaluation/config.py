"""Every option of `csdiff evaluate`: the command line, the YAML file, the help text and the checks come from here."""

from dataclasses import dataclass, field

from csdiff.errors import CSDiffError

PICTURE_BASELINES = ("raw_text", "mean_shift", "ridge", "image")


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
    """Pairs to fit the baselines to, in the same forms. Default: they are cross-fitted on the held-out pairs."""
    split: str = "test"
    """Split of --data and --pictures where they have several."""
    json: str | None = None
    """File for all the numbers and the manifest."""
    report: str | None = None
    """HTML file with the numbers and plots, complete in itself."""
    bandwidths: list[float] = field(default_factory=lambda: [0.25, 0.35, 0.5, 1.0])
    """Kernel widths, on unit vectors, at which the Cauchy-Schwarz divergence is given."""
    max_rows: int = 20000
    """Rows of a larger data set are sampled evenly."""
    bootstrap: int = 1000
    """Resamplings behind the intervals of --compare."""
    seed: int = 0
    """Of random splits, of adapters that sample, and of the first picture of each prompt."""
    decoder: str | None = None
    """Also draw pictures with this decoder (a preset, a folder or a hub repository) and measure them."""
    prompts: str | None = None
    """Text file with one prompt a line. Default: the first caption of each picture of --pictures."""
    pictures: str | None = None
    """Reference pictures, with captions, in any form that `csdiff embed` reads. Default: --data, when it has some."""
    num_prompts: int | None = None
    """Draw so many of the prompts, evenly spread. Default: all."""
    num_images: int = 1
    """Pictures for each prompt, of seeds seed, seed + 1, ...; two and more tell the diversity among seeds."""
    picture_baselines: list[str] = field(default_factory=lambda: ["raw_text", "mean_shift", "ridge", "image"])
    """Draw these beside the adapters: raw_text, mean_shift, ridge, and image (the true image embeddings: the most that
    the decoder can do); [] for none. They are drawn once and kept."""
    extractors: list[str] = field(default_factory=list)
    """Feature spaces of the distances between pictures: efficientnet-lite0, inception, or the id of an image
    encoder. Default: efficientnet-lite0."""
    clip: str = "tiny-clip"
    """CLIP model of CMMD, CLIP score and retrieval."""
    output: str = "outputs/evaluate"
    """Folder of the drawn pictures; those that are there already, drawn with the same settings, are kept."""
    steps: int | None = None
    """Denoising steps of the decoder. Default: what the decoder is made for."""
    guidance: float | None = None
    """Classifier-free guidance scale of the decoder. Default: what the decoder is made for."""
    size: int | None = None
    """Height and width of the drawn pictures in pixels. Default: what the decoder is made for."""
    batch_size: int = 16
    """Pictures drawn at once."""
    device: str | None = None
    """Where the models run. Default: the GPU if there is one."""
    progress: bool = True
    """Show progress bars on stderr."""

    def __post_init__(self):
        if self.data is None and self.decoder is None:
            raise CSDiffError("data: expected held-out pairs (a store, or captions with images), found nothing.")
        if self.decoder is not None and self.pictures is None and self.data is None:
            raise CSDiffError("pictures: expected reference pictures to measure the drawn ones by, found nothing.")
        for name, least in {
            "max_rows": 8,
            "bootstrap": 100,
            "num_images": 1,
            "batch_size": 1,
            "num_prompts": 2,
            "steps": 1,
        }.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise CSDiffError(f"{name}: expected at least {least}, found {value}.")
        if len(set(self.compare)) != len(self.compare) or (len(self.compare) == 1 and self.adapter is None):
            raise CSDiffError(f"compare: expected two or more different adapters, found {', '.join(self.compare)}.")
        if self.size is not None and (self.size < 8 or self.size % 8):
            raise CSDiffError(f"size: expected a multiple of 8 pixels, found {self.size}.")
        if self.steps is not None and self.steps > 1000:
            raise CSDiffError(f"steps: expected at most 1000, found {self.steps}.")
        if not 0 <= self.seed <= 2**63 - self.num_images:
            raise CSDiffError(f"seed: expected a whole number from 0 to 2**63 - num_images, found {self.seed}.")
        # As the command line hands on the empty list.
        if self.picture_baselines == ["[]"]:
            self.picture_baselines = []
        if unknown := set(self.picture_baselines) - set(PICTURE_BASELINES):
            raise CSDiffError(
                f"picture_baselines: expected some of {', '.join(PICTURE_BASELINES)}, found {', '.join(unknown)}."
            )
        if not self.bandwidths or min(self.bandwidths) <= 0:
            raise CSDiffError(f"bandwidths: expected widths above 0, found {self.bandwidths}.")
        if self.prompts is not None and self.decoder is None:
            raise CSDiffError("prompts: expected a decoder to draw them with, found none; give --decoder.")
