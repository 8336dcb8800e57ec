"""Options of `csdiff export`."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class ExportConfig:
    """Takes an adapter out of a training run, into a folder of its own or a complete diffusers pipeline."""

    source: str = ""
    """Output folder of a training run, checkpoint, adapter folder, or hub repository."""
    output: str = ""
    """Folder to write; it appears when it is whole. It may be left out with --push_to_hub."""
    checkpoint: str | None = None
    """Of a run: best, latest or a step. Default: the finished adapter, before there is one the latest checkpoint."""
    weights: Literal["average", "online"] = "average"
    """The running average of the weights, or the weights of the last step themselves."""
    dtype: Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"] | None = None
    """Number format of the weights; statistics stay float32. Default: as they are."""
    format: Literal["adapter", "prior", "pipeline"] = "adapter"
    """adapter: the adapter alone; prior: with its encoders, as KandinskyV22PriorPipeline loads it; pipeline: with the
    decoder too, as AutoPipelineForText2Image loads it."""
    decoder: str = "tiny"
    """Kandinsky decoder of a pipeline: preset, folder or hub repository."""
    merge_lora: bool = False
    """Add the updates of a LoRA adapter into the text encoder, which is saved in OUTPUT/text_encoder. A prior and a
    pipeline are always merged."""
    overwrite: bool = False
    """Replace an adapter or pipeline folder that is there; never a training run."""
    push_to_hub: str | None = None
    """Also upload to this hub repository (owner/name), made when there is none."""
    private: bool = False
    """Make a new hub repository private."""
