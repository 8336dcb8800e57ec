"""Every option of a training run: the command line, the YAML file, the help text and the checks come from here."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from csdiff.files import absolute
from csdiff.options import (
    ClosedUnitInterval,
    Decay,
    NameOrPlace,
    NonNegativeFloat,
    NonNegativeInt,
    Place,
    PositiveFloat,
    PositiveInt,
    Seed,
    option_types,
)
from csdiff.resources import assets_dir


@dataclass
class DataConfig:
    """What is trained on."""

    train: Place = ""
    """Embedding store, or a captioned dataset (parquet, image folder, ...) that is embedded once."""
    validation: Place | None = None
    """Held-out store or captioned dataset; without it a part of the training data is held out."""
    validation_fraction: Decay = 0.1
    """Part of the images to hold out without validation data; 0 holds out none."""
    unpaired_text: Place | None = None
    """Store of captions without images, for the distribution term."""
    unpaired_image: Place | None = None
    """Store of images without captions, for the distribution term."""
    unpaired_batch_size: PositiveInt | None = None
    """Rows of a batch from each unpaired store; by default as many as pairs."""
    one_caption_per_image: bool = True
    """One random caption of each image (by `image_id`) an epoch: two in a batch would be pushed apart."""
    text: Literal["auto", "cached", "online"] = "auto"
    """Text: cached in the store, or encoded at every step."""
    image: Literal["auto", "cached", "online"] = "auto"
    """Image tokens: of the store, or encoded at every step."""
    images: Place | None = None
    """Images of the store, where its tokens are encoded online."""
    text_encoder: NameOrPlace | None = None
    """By default that of the store, or tiny-clip."""
    image_encoder: NameOrPlace | None = None
    """By default that of the store, or tiny-clip."""
    store: Place | None = None
    """Where a dataset is embedded; by default in the output folder."""
    allow_outside: bool = False
    """Read images outside the folder of a captioned dataset."""
    accept_normalized: bool = False
    """Train on unit-norm embeddings: for retrieval, as image decoders need the norms."""


@dataclass
class OptimizerConfig:
    """AdamW, fused where the device has it."""

    weight_decay: NonNegativeFloat = 0.01
    """Decay of the weight matrices alone."""
    beta1: Decay = 0.9
    """Decay of the first moment."""
    beta2: Decay = 0.99
    """Decay of the second moment."""
    epsilon: PositiveFloat = 1e-8
    """Added to the denominator."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Most global norm of gradients; 0: any."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Linear; by default 5% of the run, at most 500."""
    final_ratio: ClosedUnitInterval = 0.01
    """Last learning rate over the peak."""


@dataclass
class EMAConfig:
    """Running average of the weights, used for validation and export."""

    decay: Decay = 0.999
    """Weight of the past; 0 exports the online weights."""


@dataclass
class ValidationConfig:
    """Measurement on held-out data."""

    every: NonNegativeInt = 250
    """Steps between validations; 0: at the end only."""
    limit: PositiveInt = 5000
    """Most held-out rows to measure on."""
    metric: str = "text_to_image.r@1"
    """Metric that picks the best checkpoint, a dotted key of the validation result."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether more of the metric is better; auto knows it."""
    decoder: NameOrPlace | None = None
    """Preset or folder that draws the prompts."""
    prompts: list[str] = field(default_factory=lambda: ["a red apple", "a smiling cat", "a green tree"])
    """Prompts to draw at every validation."""


@dataclass
class CheckpointConfig:
    """Checkpoints in `OUTPUT_DIR/checkpoints`."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0: at the end only."""
    keep: NonNegativeInt = 3
    """Newest kept beside the best; 0: all."""


@dataclass
class LoggingConfig:
    """Where numbers go, besides `metrics.jsonl`."""

    every: PositiveInt = 10
    """Steps between log lines."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Trackers of accelerate (tensorboard, wandb, trackio, mlflow, ...), or none."""
    project: str = "csdiff"
    """Project name in trackers."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class TrainConfig:
    """Train an adapter from text embeddings to image embeddings."""

    output_dir: Place = "runs/adapter"
    """Folder of the run: adapter, checkpoints, metrics and configuration."""
    adapter: str = "mlp"
    """By name: mlp, transformer, linear, lora, diffusion."""
    objective: str = "cs_aligner"
    """Objective by name: cs_aligner, cs, info_nce, mse, eclipse, mmd, sinkhorn, coral, kl, uniform_align, modgap, or
    diffusion for the diffusion prior."""
    max_steps: PositiveInt = 2000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 1024
    """Pairs that the objective sees at once, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Rows of a process with a graph in memory at once (gradient cache); by default all."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Of the adapter; weights, losses and averages stay float32."""
    seed: Seed = 0
    """Seed of initial weights, sample order, dropout and noise."""
    resume: NameOrPlace = "auto"
    """auto continues the run in the output folder, never starts anew, a checkpoint starts from there."""
    export: Literal["last", "best"] = "last"
    """Step to export: the last, or the best by --validation.metric; of a finished run without training."""
    adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the adapter, as its class takes them."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, as its class takes them."""
    init_from: NameOrPlace | None = None
    """Closed form fitted on the data (mean_shift, ridge, procrustes, ...), or an adapter of this kind and shape."""
    image_adapter: str | None = None
    """Image-side adapter by name, for retrieval: `OUTPUT_DIR/image_adapter`."""
    image_adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the image-side adapter."""
    calibrate_norm: bool = True
    """Export predictions with the mean and spread of the real norms, of held-out rows (of training rows below 256)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    compile: bool = False
    """Compile the adapter with torch.compile."""
    max_skipped_steps: PositiveInt = 20
    """Non-finite steps in a row after which the run stops."""
    threads: PositiveInt | None = None
    """Processor threads of a process: sums depend on them in the last bits. By default those the run began with, at
    first all cores shared among the processes, whatever OMP_NUM_THREADS says."""
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


# Names that stand for themselves, even where there is a file or folder called so.
_WORDS = ("auto", "never", "mean_shift", "whiten", "ridge", "procrustes", "coral", "tiny-clip", "tiny")


def absolute_places(config: TrainConfig) -> TrainConfig:
    """A copy of a configuration with every place absolute, so that a run is the same from any working directory."""
    config = copy.deepcopy(config)
    for name, annotation in option_types(TrainConfig).items():
        kinds = {annotation, *get_args(annotation)}
        section, _, option = name.rpartition(".")
        holder = getattr(config, section) if section else config
        value = getattr(holder, option)
        named = NameOrPlace in kinds and value not in _WORDS and value and Path(value).expanduser().exists()
        if named or (Place in kinds and value):
            place = absolute(value)
            # The shipped recipes name the shipped data as they lie in a checkout.
            if not place.exists() and Path(value).parts[:1] == ("assets",):
                place = assets_dir() / Path(value).relative_to("assets")
            setattr(holder, option, str(place))
    return config
