"""From a configuration to the parts of a run: adapter, objective, task, inputs."""

from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from csdiff.adapters.base import Adapter
from csdiff.adapters.linear import METHODS, LinearAdapter
from csdiff.adapters.registry import ADAPTERS, AutoAdapter, build_adapter
from csdiff.embeddings.encoders import load_image_encoder, load_text_encoder
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.losses.registry import OBJECTIVES, build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.data import is_store
from csdiff.training.denoising import DIFFUSION, DenoisingObjective
from csdiff.training.inputs import Inputs, Tokenize
from csdiff.training.pictures import Pictures
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


def build_embedder(config: TrainConfig, sources: Sources) -> Embedder:
    """Adapter (and image adapter) with the statistics of the training data, at its starting point."""
    torch.manual_seed(config.seed)
    adapter = _build(
        config.adapter, "adapter_options", config.adapter_options, sources.store.image_dim, sources.store.text_dim
    )
    image = sources.train.statistics("image_embeds")
    text = sources.train.statistics("text_embeds")
    adapter.set_statistics(image.mean, image.std, text.mean, text.std)
    _start(adapter, config, sources)
    image_adapter = None
    if config.image_adapter is not None:
        image_adapter = _build(
            config.image_adapter,
            "image_adapter_options",
            config.image_adapter_options,
            sources.store.image_dim,
            sources.store.image_dim,
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


def build_task(config: TrainConfig, embedder: Embedder, accelerator: Accelerator) -> AlignmentTask:
    """The task on the device, for the processes there are."""
    group = dist.group.WORLD if accelerator.num_processes > 1 else None
    objective = _objective(config, group)
    embedder.to(accelerator.device)
    objective.to(accelerator.device).train()
    task = AlignmentTask(embedder, objective, config.ema.decay, autocast_of(config, accelerator.device), group)
    if not task.parameters:
        raise CSDiffError(f"--adapter {config.adapter} has no weights to train.")
    if config.compile:
        embedder.compile()
    return task


def _objective(config: TrainConfig, group: dist.ProcessGroup | None) -> nn.Module:
    if config.objective == DIFFUSION:
        if config.objective_options:
            raise CSDiffError(
                f"--objective_options: {DIFFUSION} takes none, found {sorted(config.objective_options)}."
            )
        return DenoisingObjective(group)
    try:
        return build_objective(config.objective, **config.objective_options, group=group)
    except (ValueError, TypeError) as error:
        raise CSDiffError(f"--objective_options: {error}") from error


def autocast_of(config: TrainConfig, device: torch.device):
    """Context factory of the computation type."""
    types = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return partial(
        torch.autocast, device.type, dtype=types[config.mixed_precision], enabled=config.mixed_precision != "no"
    )


def wants_tokens(config: TrainConfig) -> bool:
    """Whether the objective is to see tokens: its `token_weight` is given and not 0."""
    return bool(config.objective_options.get("token_weight"))


def wants_states(config: TrainConfig) -> bool:
    """Whether token states of the text are to be cached when a dataset is embedded."""
    adapter = ADAPTERS[config.adapter]
    return (
        config.data.text != "online"
        and not adapter.uses_input_ids
        and (adapter.uses_text_states is not False or wants_tokens(config))
    )


def build_inputs(config: TrainConfig, sources: Sources, embedder: Embedder, device: torch.device) -> Inputs:
    """What is read and what is encoded at every step; gives the embedder its projection of tokens.

    Raises:
        CSDiffError: a combination that cannot be: an adapter inside the text encoder on cached text, token states that
            are neither cached nor encoded, captions or pictures that are not there.
    """
    adapter, keys, data, tokens = embedder.adapter, sources.store.keys, config.data, wants_tokens(config)
    states = (
        ("text_states", "text_mask") if adapter.uses_text_states or (tokens and not adapter.uses_input_ids) else ()
    )
    cached = set(states) <= set(keys)
    text_encoder = tokenize = image_encoder = pictures = None
    if adapter.uses_input_ids:
        if data.text == "cached":
            raise CSDiffError(
                f"--adapter {config.adapter} changes the text encoder itself, so it cannot be trained on cached text: "
                "set --data.text online."
            )
        tokenize = Tokenize(adapter.config.text_encoder)
    elif data.text == "cached" and not cached:
        raise CSDiffError(
            f"--adapter {config.adapter} needs token states, and {sources.store.path} has none: embed again with "
            "--text_states true, or set --data.text online."
        )
    online = data.text == "online" or not cached
    if tokenize is None and (online or tokens):
        text_encoder = load_text_encoder(text_encoder_id(config, sources), device)
        _check_encoder(text_encoder.describe(), sources, "text")
    if (tokenize or online) and not has_captions(sources.store):
        raise CSDiffError(
            f"--adapter {config.adapter} encodes captions at every step, and {sources.store.path} has no captions: "
            "expected the column caption in metadata/*.parquet."
        )
    image_keys = ("image_embeds",)
    if tokens:
        image_encoder, pictures = _image_tokens(config, sources, device)
        image_keys = ("image_embeds",) if pictures else ("image_embeds", "image_tokens")
        embedder.project_text_with(adapter.text_encoder.text_projection if tokenize else text_encoder.project)
    return Inputs(
        device,
        ("text_embeds", *(() if online else states)),
        image_keys,
        text_encoder if online and tokenize is None else None,
        tokenize,
        image_encoder,
        pictures,
    )


def _image_tokens(config: TrainConfig, sources: Sources, device: torch.device):
    """The image encoder that projects tokens, and the pictures it is to see where tokens are not cached."""
    name = config.data.image_encoder or (sources.fingerprint.get("image_encoder") or {}).get("id")
    if name is None:
        raise CSDiffError(
            f"--objective_options.token_weight: {sources.store.path} does not say which image encoder made it, and "
            "its projection is needed for the tokens: name it with --data.image_encoder."
        )
    encoder = load_image_encoder(name, device)
    _check_encoder(encoder.describe(), sources, "image")
    cached = "image_tokens" in sources.store.keys
    if config.data.image != "online" and cached:
        return encoder, None
    path = config.data.images or (None if is_store(config.data.train) else config.data.train)
    if config.data.image == "cached" or path is None:
        raise CSDiffError(
            f"--objective_options.token_weight: the token term needs image tokens, and {sources.store.path} has none: "
            "embed again with --image_tokens true, or name the dataset with the pictures with --data.images."
        )
    return encoder, Pictures(path)


def text_encoder_id(config: TrainConfig, sources: Sources) -> str:
    """The text encoder by the configuration, else the one the store was made with."""
    name = config.data.text_encoder or (sources.fingerprint.get("text_encoder") or {}).get("id")
    if name is None:
        raise CSDiffError(
            f"{sources.store.path} does not say which text encoder made it, and the text is to be encoded at every "
            "step: name it with --data.text_encoder."
        )
    return name


def has_captions(store: EmbeddingStore) -> bool:
    """Whether a store knows its captions."""
    return store.metadata is not None and "caption" in store.metadata.names


def _check_encoder(found: dict, sources: Sources, side: str) -> None:
    """Refuse to train with another encoder than the store's."""
    stated = sources.fingerprint.get(f"{side}_encoder") or {}
    hashes = stated.get("weights_sha256"), found.get("weights_sha256")
    if all(hashes) and hashes[0] != hashes[1]:
        raise CSDiffError(
            f"--data.{side}_encoder {found['id']}: {sources.store.path} was made with {stated.get('id')}, whose "
            f"weights differ ({hashes[0][:12]}, found {hashes[1][:12]}): use that encoder, or embed the data again."
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
