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
    """Embedding store to train on, or a captioned dataset (parquet, image folder, ...) that is embedded once."""
    validation: Place | None = None
    """Held-out store or captioned dataset; without it a fixed part of the training data is held out."""
    validation_fraction: Decay = 0.1
    """Part of the training images to hold out when there is no validation data; 0 trains without validation."""
    unpaired_text: Place | None = None
    """Store of captions without images; they enter the distribution term only."""
    unpaired_image: Place | None = None
    """Store of images without captions; they enter the distribution term only."""
    unpaired_batch_size: PositiveInt | None = None
    """Unpaired rows in a global batch, from each unpaired store; as many as pairs by default."""
    one_caption_per_image: bool = True
    """Take one random caption of each image an epoch, so that no batch has two of one image, which the objective would
    push apart; needs a store that knows its images (`image_id`), others give all their rows."""
    text: Literal["auto", "cached", "online"] = "auto"
    """Whether text embeddings come from the store or from the text encoder at every step; auto asks the adapter."""
    image: Literal["auto", "cached", "online"] = "auto"
    """Whether image tokens come from the store or from the image encoder at every step; auto asks the objective."""
    images: Place | None = None
    """Dataset with the images of the store, for an image encoder at every step; by default the one embedded."""
    text_encoder: NameOrPlace | None = None
    """Text encoder (folder, hub id or tiny-clip); by default the one the store was made with."""
    image_encoder: NameOrPlace | None = None
    """Image encoder (folder, hub id or tiny-clip); by default the one the store was made with."""
    store: Place | None = None
    """Folder for the embeddings of a captioned dataset; by default `store` inside the output folder."""
    allow_outside: bool = False
    """Read images that a captioned dataset names outside its folder."""
    accept_normalized: bool = False
    """Train on unit-norm embeddings, for retrieval; image decoders need the norms that such a store has lost."""


@dataclass
class OptimizerConfig:
    """AdamW, fused where the device has it."""

    weight_decay: NonNegativeFloat = 0.01
    """Decay of weight matrices; norms, biases and temperatures have none."""
    beta1: Decay = 0.9
    """Decay of AdamW's first moment."""
    beta2: Decay = 0.99
    """Decay of AdamW's second moment."""
    epsilon: PositiveFloat = 1e-8
    """Number that AdamW adds to the denominator."""
    max_grad_norm: NonNegativeFloat = 1.0
    """Global norm that gradients are scaled down to; 0 leaves them."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup_steps: NonNegativeInt | None = None
    """Steps of linear warm-up; by default 5% of the run, at most 500."""
    final_ratio: ClosedUnitInterval = 0.01
    """Last learning rate as a part of the peak, for cosine and linear."""


@dataclass
class EMAConfig:
    """Running average of the weights, used for validation and export."""

    decay: Decay = 0.999
    """Weight of the past in the running average of the weights; 0 exports the online weights."""


@dataclass
class ValidationConfig:
    """Measurement on held-out data."""

    every: NonNegativeInt = 250
    """Steps between validations; 0 validates at the end only."""
    limit: PositiveInt = 5000
    """Most held-out rows to measure on."""
    metric: str = "text_to_image.r@1"
    """Metric that picks the best checkpoint, a dotted key of the validation result of the exported weights."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether a larger metric is better; auto knows it from the table of metrics."""
    decoder: NameOrPlace | None = None
    """Decoder (preset or folder) that draws the prompts at every validation."""
    prompts: list[str] = field(default_factory=lambda: ["a red apple", "a smiling cat", "a green tree"])
    """Prompts to draw at every validation, where a decoder is given."""


@dataclass
class CheckpointConfig:
    """Checkpoints in `OUTPUT_DIR/checkpoints`."""

    every: NonNegativeInt = 500
    """Steps between checkpoints; 0 keeps only the one at the end."""
    keep: NonNegativeInt = 3
    """Newest checkpoints to keep beside the best one; 0 keeps all."""


@dataclass
class LoggingConfig:
    """Where numbers go, besides `metrics.jsonl`."""

    every: PositiveInt = 10
    """Steps between log lines."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers by name: tensorboard, wandb, trackio, mlflow, ...; none for `metrics.jsonl` alone."""
    project: str = "csdiff"
    """Project name for the trackers that have projects."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class TrainConfig:
    """Train an adapter from text embeddings to image embeddings."""

    output_dir: Place = "runs/adapter"
    """Folder of the run: the finished adapter, checkpoints, metrics and the resolved configuration."""
    adapter: str = "mlp"
    """Adapter by name: mlp, transformer, linear, lora, diffusion."""
    objective: str = "cs_aligner"
    """Objective by name: cs_aligner, cs, info_nce, mse, eclipse, mmd, sinkhorn, coral, kl, uniform_align, modgap, or
    diffusion for the diffusion prior."""
    max_steps: PositiveInt = 2000
    """Optimizer steps of the whole run."""
    batch_size: PositiveInt = 1024
    """Global batch: the pairs that the objective sees at once, over all processes."""
    micro_batch_size: PositiveInt | None = None
    """Rows of a process with a graph in memory at once (gradient cache); by default the whole batch."""
    learning_rate: PositiveFloat = 1e-3
    """Peak learning rate."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Computation type of the adapter; weights, losses and averages stay float32."""
    seed: Seed = 0
    """Seed of initial weights, sample order, dropout and noise."""
    resume: NameOrPlace = "auto"
    """auto continues the run in the output folder, never starts anew, a checkpoint folder starts from there."""
    export: Literal["last", "best"] = "last"
    """Weights of the finished adapter: those of the last step, or of the best checkpoint by --validation.metric. A
    finished run started again with the other one exports that, without training."""
    adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the adapter, as its class takes them."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, as its class takes them."""
    init_from: NameOrPlace | None = None
    """Where to begin: a closed form fitted on the data (mean_shift, ridge, procrustes, ...), or an adapter folder of
    the same kind and shape."""
    image_adapter: str | None = None
    """Adapter on the image side too, by name, for retrieval; saved in `OUTPUT_DIR/image_adapter`."""
    image_adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the image-side adapter."""
    calibrate_norm: bool = True
    """In what is exported, match mean and spread of predicted norms to the real ones: on held-out rows, or on training
    rows where fewer than 256 are held out."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, where the adapter supports it."""
    compile: bool = False
    """Compile the adapter with torch.compile."""
    max_skipped_steps: PositiveInt = 20
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    threads: PositiveInt | None = None
    """Processor threads of a process: sums on a CPU depend on their number in the last bits. By default those the run
    was started with, at first all cores shared among the processes of a machine, whatever OMP_NUM_THREADS says."""
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
