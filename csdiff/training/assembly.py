"""From a configuration to the parts of a run: adapter, objective, task, inputs."""

from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import METHODS, LinearAdapter
from csdiff.adapters.registry import ADAPTERS, AutoAdapter, build_adapter
from csdiff.errors import CSDiffError
from csdiff.losses.registry import OBJECTIVES, build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.denoising import DIFFUSION, DenoisingObjective
from csdiff.training.feeding import TextSide
from csdiff.training.recipe import run_options
from csdiff.training.sources import Sources
from csdiff.training.task import AlignmentTask, Embedder

_FIT_ROWS = 200_000


def check_names(config: TrainConfig) -> None:
    """Refuse unknown adapters and objectives before any data is opened."""
    for option, name, known in (
        ("adapter", config.adapter, ADAPTERS),
        ("image_adapter", config.image_adapter, ADAPTERS),
        ("objective", config.objective, {*OBJECTIVES, DIFFUSION}),
    ):
        if name is not None and name not in known:
            raise CSDiffError(f"--{option} {name}: expected one of {', '.join(sorted(known))}.")
    if ADAPTERS[config.adapter].one_shot is (config.objective == DIFFUSION):
        raise CSDiffError(
            f"--adapter {config.adapter} and --objective {config.objective} do not go together: the objective "
            f"{DIFFUSION} trains the adapter diffusion, and nothing else does."
        )


def build_embedder(config: TrainConfig, sources: Sources, text: TextSide) -> Embedder:
    """Adapter (and image adapter) with the statistics of the training data, at its starting point."""
    torch.manual_seed(config.seed)
    store = sources.store
    options = {**text.adapter_options(config), **config.adapter_options}
    adapter = _build(config.adapter, "adapter_options", options, store.image_dim, store.text_dim)
    image = sources.train.statistics("image_embeds")
    text_statistics = sources.train.statistics("text_embeds")
    adapter.set_statistics(image.mean, image.std, text_statistics.mean, text_statistics.std)
    _start(adapter, config, sources)
    image_adapter = None
    if config.image_adapter is not None:
        options = config.image_adapter_options
        image_adapter = _build(
            config.image_adapter, "image_adapter_options", options, store.image_dim, store.image_dim
        )
        image_adapter.set_statistics(image.mean, image.std, image.mean, image.std)
    for part in (adapter, image_adapter):
        if part is not None and config.gradient_checkpointing:
            if not part._supports_gradient_checkpointing:
                raise CSDiffError(
                    f"--gradient_checkpointing: {type(part).__name__} does not support it, switch it off."
                )
            part.enable_gradient_checkpointing()
    embedder = Embedder(adapter, image_adapter)
    for parameter in embedder.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return embedder.train()


def _build(name: str, option: str, options: dict, embedding_dim: int, text_dim: int) -> Adapter:
    try:
        return build_adapter(name, embedding_dim=embedding_dim, text_dim=text_dim, **options)
    except (CSDiffError, TypeError) as error:
        raise CSDiffError(f"--{option}: {error}") from error


def _start(adapter: Adapter, config: TrainConfig, sources: Sources) -> None:
    """Begin at a closed-form map fitted on the training pairs, or at the weights of an adapter folder."""
    begin = config.init_from
    if isinstance(adapter, LinearAdapter):
        begin = begin or adapter.config.method
    if begin is None and adapter.config.text_dim != adapter.config.embedding_dim and can_start(adapter):
        begin = "ridge"
    if begin is None:
        return
    if begin in METHODS:
        fitted = LinearAdapter.fit(sources.train.sample(_FIT_ROWS), begin, calibrate=False)
        if isinstance(adapter, LinearAdapter):
            adapter.load_state_dict(fitted.state_dict())
        else:
            adapter.init_from(fitted)
        return
    given = AutoAdapter.from_pretrained(begin)
    if isinstance(given, LinearAdapter) and not isinstance(adapter, LinearAdapter):
        adapter.init_from(given)
        return
    theirs, mine = ({n: tuple(t.shape) for n, t in a.state_dict().items()} for a in (given, adapter))
    if theirs != mine:
        odd = min(set(theirs.items()) ^ set(mine.items()))
        raise CSDiffError(
            f"--init_from {begin}: expected an adapter like the one to be trained, found {type(given).__name__} where "
            f"{odd[0]} of shape {list(odd[1])} is on one side only: give the same kind and adapter_options."
        )
    adapter.load_state_dict(given.state_dict())


def can_start(adapter: Adapter) -> bool:
    """Whether an adapter can begin at a linear map."""
    return type(adapter).init_from is not Adapter.init_from


def build_task(config: TrainConfig, embedder: Embedder, sources: Sources, accelerator: Accelerator) -> AlignmentTask:
    """The task on the device, for the processes there are."""
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    objective = _objective(config, sources, group)
    embedder.to(accelerator.device)
    objective.to(accelerator.device).train()
    task = AlignmentTask(embedder, objective, config.ema.decay, autocast_of(config, accelerator.device), group)
    if not task.parameters:
        raise CSDiffError(f"--adapter {config.adapter} has no weights to train.")
    if config.compile:
        embedder.compile()
    return task


def _objective(config: TrainConfig, sources: Sources, group: dist.ProcessGroup | None) -> nn.Module:
    if config.objective == DIFFUSION:
        if config.objective_options:
            raise CSDiffError(
                f"--objective_options: {DIFFUSION} takes none, found {sorted(config.objective_options)}."
            )
        return DenoisingObjective(group)
    try:
        return build_objective(config.objective, **run_options(config, sources), group=group)
    except (ValueError, TypeError) as error:
        raise CSDiffError(f"--objective_options: {error}") from error


def autocast_of(config: TrainConfig, device: torch.device):
    """Context factory of the computation type."""
    types = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return partial(
        torch.autocast, device.type, dtype=types[config.mixed_precision], enabled=config.mixed_precision != "no"
    )


def check_objective(config: TrainConfig, sources: Sources) -> None:
    """Refuse data that the objective would ignore."""
    cls = OBJECTIVES.get(config.objective, DenoisingObjective)
    for name in ("unpaired_text", "unpaired_image"):
        if getattr(sources, name) is not None and not cls.uses_unpaired:
            able = sorted(known for known, c in OBJECTIVES.items() if c.uses_unpaired)
            raise CSDiffError(
                f"--data.{name}: the objective {config.objective} has no term for unpaired data; use "
                f"{', '.join(able)}, or leave it out."
            )
