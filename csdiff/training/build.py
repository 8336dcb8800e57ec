"""From a configuration and its data to what is trained: adapter, objective, task."""

import inspect
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import METHODS, LinearAdapter
from csdiff.adapters.registry import ADAPTERS, AutoAdapter, build_adapter
from csdiff.errors import CSDiffError
from csdiff.losses.objectives import OBJECTIVES, build_objective, objective_options
from csdiff.training.config import TrainConfig
from csdiff.training.data import TrainingData, wants_tokens
from csdiff.training.inputs import Inputs
from csdiff.training.task import AlignmentTask, DenoisingObjective, Embedder

DIFFUSION = "diffusion"
_FIT_ROWS = 200_000
_DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def check_names(config: TrainConfig) -> None:
    """Refuse unknown adapters and objectives, and those that do not go together, before any data is opened."""
    objectives = {*OBJECTIVES, DIFFUSION}
    for option, known in (("adapter", ADAPTERS), ("image_adapter", ADAPTERS), ("objective", objectives)):
        name = getattr(config, option)
        if name is not None and name not in known:
            raise CSDiffError(f"--{option} {name}: expected one of {', '.join(sorted(known))}.")
    if ADAPTERS[config.adapter].one_shot is (config.objective == DIFFUSION):
        raise CSDiffError(
            f"--adapter {config.adapter} and --objective {config.objective} do not go together: {DIFFUSION} goes with "
            f"{DIFFUSION} only."
        )
    if config.objective == DIFFUSION and config.objective_options:
        raise CSDiffError(f"--objective_options: {DIFFUSION} takes none, found {sorted(config.objective_options)}.")
    if config.batch_size < 2 and config.objective not in ("mse", DIFFUSION):
        raise CSDiffError(f"--batch_size {config.batch_size}: {config.objective} compares pairs, expected at least 2.")
    able = sorted(name for name, objective in OBJECTIVES.items() if objective.uses_unpaired)
    for name in ("unpaired_text", "unpaired_image"):
        if getattr(config.data, name) is not None and config.objective not in able:
            raise CSDiffError(
                f"--data.{name}: {config.objective} has no term for unpaired data; use {', '.join(able)}, or leave it "
                "out."
            )


def all_objective_options(config: TrainConfig) -> dict:
    """Every option of the objective with the value that the run trains with: as given, else its default."""
    if config.objective == DIFFUSION:
        return {}
    options = {**objective_options(config.objective), **config.objective_options}
    # Without tokens the term is left out, whatever its default weight.
    return options | ({"token_weight": 0.0} if "token_weight" in options and not wants_tokens(config) else {})


def build_embedder(config: TrainConfig, data: TrainingData, inputs: Inputs) -> Embedder:
    """Adapter (and image adapter) with the statistics of the training data, at its starting point."""
    torch.manual_seed(config.seed)
    image, captions = (data.train.statistics(f"{side}_embeds") for side in ("image", "text"))
    options = {"text_encoder": inputs.inside}
    if inputs.states_shape is not None:
        options |= dict(zip(("num_embeddings", "states_dim"), inputs.states_shape, strict=True))
    accepted = inspect.signature(ADAPTERS[config.adapter].__init__).parameters
    options = {name: value for name, value in options.items() if name in accepted and value is not None}
    dims = data.store.image_dim, data.store.text_dim
    adapter = _build(config, "adapter", *dims, options)
    adapter.set_statistics(image.mean, image.std, captions.mean, captions.std)
    _start(adapter, config, data)
    image_adapter = None
    if config.image_adapter is not None:
        image_adapter = _build(config, "image_adapter", dims[0], dims[0], {})
        image_adapter.set_statistics(image.mean, image.std, image.mean, image.std)
    embedder = Embedder(adapter, image_adapter)
    if wants_tokens(config):
        embedder.project_text = inputs.project_text or adapter.text_encoder.text_projection.forward
    for parameter in embedder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return embedder.train()


def _build(config: TrainConfig, option: str, image_dim: int, text_dim: int, options: dict) -> Adapter:
    options |= getattr(config, f"{option}_options")
    try:
        adapter = build_adapter(getattr(config, option), embedding_dim=image_dim, text_dim=text_dim, **options)
    except (CSDiffError, TypeError) as error:
        raise CSDiffError(f"--{option}_options: {error}") from error
    if config.gradient_checkpointing:
        if not adapter._supports_gradient_checkpointing:
            raise CSDiffError(f"--gradient_checkpointing: {type(adapter).__name__} has none, switch it off.")
        adapter.enable_gradient_checkpointing()
    return adapter


def _start(adapter: Adapter, config: TrainConfig, data: TrainingData) -> None:
    """Begin at a closed-form map fitted on the training pairs, or at the weights of an adapter folder."""
    begin = config.init_from
    if isinstance(adapter, LinearAdapter):
        begin = begin or adapter.config.method
    # Between spaces of two widths nothing is near the identity; adapters that can begin at a linear map do.
    can_start = type(adapter).init_from is not Adapter.init_from
    if begin is None and adapter.config.text_dim != adapter.config.embedding_dim and can_start:
        begin = "ridge"
    if begin is None:
        return
    if begin in METHODS:
        given = LinearAdapter.fit(data.train.sample(_FIT_ROWS), begin, calibrate=False)
    else:
        given = AutoAdapter.from_pretrained(begin)
    if isinstance(given, LinearAdapter) and not isinstance(adapter, LinearAdapter):
        adapter.init_from(given)
        return
    try:
        adapter.load_state_dict(given.state_dict())
    except RuntimeError as error:
        raise CSDiffError(
            f"--init_from {begin}: expected an adapter of the kind and adapter_options to be trained, found another "
            f"({' '.join(str(error).split())[:200]})."
        ) from error


def build_task(config: TrainConfig, embedder: Embedder, accelerator: Accelerator) -> AlignmentTask:
    """The task on the device, for the processes there are."""
    device, precision = accelerator.device, config.mixed_precision
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    objective: nn.Module = DenoisingObjective(group)
    if config.objective != DIFFUSION:
        try:
            objective = build_objective(config.objective, **all_objective_options(config), group=group)
        except (ValueError, TypeError) as error:
            raise CSDiffError(f"--objective_options: {error}") from error
    autocast = partial(torch.autocast, device.type, dtype=_DTYPES[precision], enabled=precision != "no")
    task = AlignmentTask(embedder.to(device), objective.to(device).train(), config.ema.decay, autocast, group)
    if not task.parameters:
        raise CSDiffError(f"--adapter {config.adapter} has no weights to train.")
    if config.compile:
        embedder.compile()
    return task
