"""Every option of a training run: the command line, the YAML file, the help text and the checks come from here."""

from dataclasses import dataclass, field
from typing import Any, Literal

from csdiff.errors import CSDiffError


@dataclass
class DataConfig:
    """What is trained on."""

    train: str = ""
    """Embedding store, or a captioned dataset (parquet, image folder, ...) that is embedded once before training."""
    validation: str | None = None
    """Held-out store or captioned dataset; without it a fixed part of the training data is held out."""
    validation_fraction: float = 0.1
    """Part of the training pictures to hold out when there is no validation data; 0 trains without validation."""
    unpaired_text: str | None = None
    """Store whose captions have no pictures; they enter the distribution term only."""
    unpaired_image: str | None = None
    """Store whose pictures have no captions; they enter the distribution term only."""
    unpaired_batch_size: int | None = None
    """Unpaired rows a global batch, from each unpaired store; as many as pairs by default."""
    one_caption_per_image: bool = True
    """One random caption of each picture an epoch, so that no batch has two of one picture, which the objective would
    push apart; needs a store that knows its pictures (`image_id`), others give all their rows."""
    text: Literal["auto", "cached", "online"] = "auto"
    """Text embeddings from the store, or from the text encoder at every step; auto asks the adapter."""
    image: Literal["auto", "cached", "online"] = "auto"
    """Image tokens from the store, or from the image encoder at every step; auto asks the objective."""
    images: str | None = None
    """Dataset with the pictures of the store, for an image encoder at every step; by default the one embedded."""
    text_encoder: str | None = None
    """Text encoder (folder, hub id or tiny-clip); by default the one the store was made with."""
    image_encoder: str | None = None
    """Image encoder (folder, hub id or tiny-clip); by default the one the store was made with."""
    store: str | None = None
    """Folder for the embeddings of a captioned dataset; by default `store` inside the output folder."""
    accept_normalized: bool = False
    """Train on unit-norm embeddings, for retrieval; image decoders need the norms that such a store has lost."""


@dataclass
class OptimizerConfig:
    """AdamW, fused where the device has it."""

    weight_decay: float = 0.01
    """Decay of weight matrices; norms, biases and temperatures have none."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.99
    """Decay of the second moment."""
    epsilon: float = 1e-8
    """Added to the denominator."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""


@dataclass
class ScheduleConfig:
    """Learning rate over the run."""

    name: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; by default 5% of the run, at most 500."""
    final_ratio: float = 0.01
    """Last learning rate as a part of the peak, for cosine and linear."""


@dataclass
class EMAConfig:
    """Running average of the weights, used for validation and export."""

    decay: float = 0.999
    """Weight of the past; 0 exports the online weights."""


@dataclass
class ValidationConfig:
    """Measurement on held-out data."""

    every: int = 250
    """Steps between validations; 0 validates at the end only."""
    limit: int = 5000
    """At most this many held-out rows."""
    metric: str = "text_to_image.r@1"
    """Metric that picks the best checkpoint, a dotted key of the validation result of the exported weights."""
    mode: Literal["auto", "max", "min"] = "auto"
    """Whether larger is better; auto: max for recalls and cosines, min for gaps, distances and divergences."""
    decoder: str | None = None
    """Decoder preset or folder: pictures of the prompts at every validation."""
    prompts: list[str] = field(default_factory=lambda: ["a red apple", "a smiling cat", "a green tree"])
    """Prompts of these pictures."""


@dataclass
class CheckpointConfig:
    """Checkpoints in `OUTPUT_DIR/checkpoints`."""

    every: int = 500
    """Steps between checkpoints; 0 keeps only the one at the end."""
    keep: int = 3
    """Newest checkpoints to keep beside the best one; 0 keeps all."""


@dataclass
class LoggingConfig:
    """Where numbers go, besides `metrics.jsonl`."""

    every: int = 10
    """Steps between log lines."""
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])
    """Accelerate trackers by name: tensorboard, wandb, trackio, mlflow, ...; none for `metrics.jsonl` alone."""
    curves: bool = True
    """Draw `curves.png` of what is in `metrics.jsonl`, and `samples.png` of the pictures where a decoder is given."""
    project: str = "csdiff"
    """Project name for the trackers that have projects."""
    progress: bool = True
    """Show a progress bar."""


@dataclass
class TrainConfig:
    """Train an adapter from text embeddings to image embeddings."""

    output_dir: str = "runs/adapter"
    """Folder of the run: the finished adapter, checkpoints, metrics and the resolved configuration."""
    adapter: str = "mlp"
    """Adapter by name: mlp, transformer, linear, lora, diffusion."""
    objective: str = "cs_aligner"
    """Objective by name: cs_aligner, cs, info_nce, mse, eclipse, mmd, sinkhorn, coral, kl, uniform_align, or
    diffusion for the diffusion prior."""
    data: DataConfig = field(default_factory=DataConfig)
    max_steps: int = 2000
    """Optimizer steps."""
    batch_size: int = 1024
    """Global batch: the pairs that the objective sees at once, over all processes."""
    micro_batch_size: int | None = None
    """Rows of a process with a graph in memory at once (gradient cache); by default the whole batch."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Seed of initial weights, sample order, dropout and noise."""
    resume: str = "auto"
    """auto continues the run in the output folder, never starts anew, a checkpoint folder starts from there."""
    adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the adapter, as its class takes them."""
    objective_options: dict[str, Any] = field(default_factory=dict)
    """Options of the objective, as its class takes them. Those of cs_aligner that are left open follow the data."""
    init_from: str | None = None
    """Adapter folder to begin at, of the same kind and shape."""
    image_adapter: str | None = None
    """Adapter on the image side too, by name, for retrieval; saved in `OUTPUT_DIR/image_adapter`."""
    image_adapter_options: dict[str, Any] = field(default_factory=dict)
    """Options of the image-side adapter."""
    calibrate_norm: bool = True
    """In what is exported, match mean and spread of predicted norms to the real ones: on held-out rows, or on training
    rows where fewer than 256 are held out."""
    export: Literal["last", "best"] = "last"
    """Weights of the finished adapter: those of the last step, or of the best checkpoint by --validation.metric. A
    finished run started again with the other one exports that, without training."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Computation type of the adapter; weights, losses and averages stay float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, where the adapter supports it."""
    compile: bool = False
    """Compile the adapter with torch.compile."""
    max_skipped_steps: int = 20
    """Steps in a row with a non-finite loss or gradient after which the run stops."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)


def check(config: TrainConfig) -> None:
    """Refuse values that no run can have, before anything is read or written.

    Raises:
        CSDiffError: naming the option, the value found and what is allowed.
    """
    positive = {
        "max_steps": config.max_steps,
        "batch_size": config.batch_size,
        "learning_rate": config.learning_rate,
        "max_skipped_steps": config.max_skipped_steps,
        "logging.every": config.logging.every,
    }
    if config.micro_batch_size is not None:
        positive["micro_batch_size"] = config.micro_batch_size
    if config.data.unpaired_batch_size is not None:
        positive["data.unpaired_batch_size"] = config.data.unpaired_batch_size
    for name, value in positive.items():
        if not value > 0:
            raise CSDiffError(f"--{name} must be positive, found {value}.")
    not_negative = {
        "optimizer.weight_decay": config.optimizer.weight_decay,
        "optimizer.max_grad_norm": config.optimizer.max_grad_norm,
        "schedule.warmup_steps": config.schedule.warmup_steps or 0,
        "validation.every": config.validation.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep": config.checkpoint.keep,
        "seed": config.seed,
    }
    for name, value in not_negative.items():
        if not value >= 0:
            raise CSDiffError(f"--{name} must not be negative, found {value}.")
    below_one = {
        "data.validation_fraction": config.data.validation_fraction,
        "ema.decay": config.ema.decay,
        "optimizer.beta1": config.optimizer.beta1,
        "optimizer.beta2": config.optimizer.beta2,
    }
    for name, value in below_one.items():
        if not 0 <= value < 1:
            raise CSDiffError(f"--{name} must be in [0, 1), found {value}.")
    if not 0 <= config.schedule.final_ratio <= 1:
        raise CSDiffError(f"--schedule.final_ratio must be in [0, 1], found {config.schedule.final_ratio}.")
    if not config.data.train:
        raise CSDiffError(
            "--data.train is missing: give an embedding store or a captioned dataset, for example "
            "--data.train runs/my-store (`csdiff embed` makes one)."
        )
    if not config.output_dir:
        raise CSDiffError("--output_dir is empty: give the folder that the run is written to.")
