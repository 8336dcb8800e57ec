"""What is trained, and what for: the adapter and the objective of a configuration."""

import inspect
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from csdiff.adapters.base import Adapter
from csdiff.adapters.folder import on_hub
from csdiff.adapters.linear import METHODS, LinearAdapter
from csdiff.adapters.registry import ADAPTERS, AutoAdapter, build_adapter, check_adapter_options
from csdiff.errors import CSDiffError, did_you_mean
from csdiff.losses.objectives import OBJECTIVES, ObjectiveOutput, build_objective, objective_options
from csdiff.losses.process_group import global_sum
from csdiff.training.config import TrainConfig
from csdiff.training.data import TrainingData, reads_states, wants_tokens
from csdiff.training.inputs import Inputs, Rows

DIFFUSION = "diffusion"
_FIT_ROWS = 200_000


def check_names(config: TrainConfig) -> None:
    """Refuse unknown names and options, and what does not go together, before any data is opened."""
    objectives = {*OBJECTIVES, DIFFUSION}
    for option, known in (("adapter", ADAPTERS), ("image_adapter", ADAPTERS), ("objective", objectives)):
        name = getattr(config, option)
        if name is not None and name not in known:
            near = did_you_mean(name, known) or "."
            raise CSDiffError(f"--{option} {name}: expected one of {', '.join(sorted(known))}{near}")
        if name is not None and known is ADAPTERS:
            try:
                check_adapter_options(name, getattr(config, f"{option}_options"))
            except CSDiffError as error:
                raise CSDiffError(f"--{option}_options: {error}") from error
    begin = config.init_from
    if begin is not None and begin not in METHODS and not Path(begin).exists() and not on_hub(begin):
        near = did_you_mean(begin, METHODS) or "."
        raise CSDiffError(f"--init_from {begin}: expected {', '.join(METHODS)}, or an adapter folder{near}")
    if ADAPTERS[config.adapter].one_shot is (config.objective == DIFFUSION):
        raise CSDiffError(
            f"--adapter {config.adapter} and --objective {config.objective} do not go together: {DIFFUSION} goes with "
            f"{DIFFUSION} only."
        )
    if config.objective == DIFFUSION and config.objective_options:
        raise CSDiffError(f"--objective_options: {DIFFUSION} takes none, found {sorted(config.objective_options)}.")
    make_objective(config, None)
    if config.batch_size < 2 and config.objective not in ("mse", DIFFUSION):
        raise CSDiffError(f"--batch_size {config.batch_size}: {config.objective} compares pairs, expected at least 2.")
    able = sorted(name for name, objective in OBJECTIVES.items() if objective.uses_unpaired)
    for name in ("unpaired_text", "unpaired_image"):
        if getattr(config.data, name) is not None and config.objective not in able:
            raise CSDiffError(
                f"--data.{name}: {config.objective} has no term for unpaired data; use {', '.join(able)}, or leave it "
                "out."
            )


class Embedder(nn.Module):
    """Everything with trainable weights, as one module: rows in, embeddings in the image space out.

    Without an image adapter (for retrieval) image embeddings stay as they are.
    """

    def __init__(self, adapter: nn.Module, image_adapter: nn.Module | None = None):
        super().__init__()
        self.adapter, self.image_adapter = adapter, image_adapter
        # For a token-level term the frozen encoder's: token states (B, L, H) to text embeddings (B, L, Dt).
        self.project_text: Callable[[Tensor], Tensor] | None = None

    def forward(self, rows: Rows) -> dict[str, Tensor]:
        """What the objective needs of groups of rows.

        Args:
            rows: `pairs`, `unpaired_text`, `unpaired_image`: dicts with `text_embeds` (B, Dt), `image_embeds` (B, D)
                and, where the adapter uses them, `text_states` (B, L, H), `text_mask` (B, L), `input_ids` (B, L).

        Returns:
            float32 tensors that depend on the weights: `prediction` (B, D); `text_tokens` (B, L, D) with tokens;
            `image` with an image adapter; `unpaired_text`, `unpaired_image`. A diffusion prior has `error` (B,) alone.
        """
        embedded = {}
        for group, values in rows.items():
            if group == "unpaired_text":
                embedded[group] = self.adapter.embed(**self._text(values))
            elif group == "unpaired_image":
                embedded[group] = self.image_adapter.embed(values["image_embeds"])
            elif not self.adapter.one_shot:
                error = self.adapter.training_loss(
                    values["text_embeds"], values["image_embeds"], values.get("text_states"), values.get("text_mask")
                )
                embedded["error"] = error.expand(len(values["image_embeds"]))
            else:
                embedded |= self.predict(values, tokens=self.project_text is not None)
        return {name: value.float() for name, value in embedded.items()}

    def predict(self, pairs: dict, tokens: bool = False) -> dict[str, Tensor]:
        """Predicted image embeddings of pairs, with adapted tokens and images where there are such."""
        text = self._text(pairs)
        if tokens:
            projected = self.project_text(text["text_states"])
            both = self.adapter.embed_with_tokens(token_embeds=projected, **text)
            embedded = dict(zip(("prediction", "text_tokens"), both, strict=True))
        else:
            embedded = {"prediction": self.adapter.embed(**text)}
        if self.image_adapter is not None:
            embedded["image"] = self.image_adapter.embed(pairs["image_embeds"])
        return {name: value.float() for name, value in embedded.items()}

    def _text(self, rows: dict) -> dict[str, Tensor | None]:
        """What the adapter embeds, by the names of its arguments."""
        if self.adapter.uses_input_ids:
            return dict(zip(("text_embeds", "text_states"), self.adapter.encode(rows["input_ids"]), strict=True))
        return {name: rows.get(name) for name in ("text_embeds", "text_states", "text_mask")}


def build_embedder(config: TrainConfig, data: TrainingData, inputs: Inputs) -> Embedder:
    """Adapter (and image adapter) with the statistics of the training data, at its starting point."""
    torch.manual_seed(config.seed)
    image, captions = (data.train.statistics(f"{side}_embeds") for side in ("image", "text"))
    options = {"text_encoder": inputs.inside}
    if reads_states(config):
        states = inputs.read(data.train.sample(1))[0]["text_states"]
        options |= {"num_embeddings": states.shape[1], "states_dim": states.shape[2]}
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
        expected, found = ({"kind": type(a).__name__, **a.config} for a in (adapter, given))
        differ = [name for name in expected if name[0] != "_" and expected[name] != found.get(name)]
        differ = differ[:1] if "kind" in differ else differ
        wanted, other = (", ".join(f"{name} {of.get(name)}" for name in differ) for of in (expected, found))
        raise CSDiffError(
            f"--init_from {begin}: expected an adapter with {wanted}, found {other}; give another, or other --adapter "
            "and --adapter_options."
        ) from error


class DenoisingObjective(nn.Module):
    """The objective of the diffusion prior, the slow baseline: mean of `(f(x_s, s, text) - x0)^2` over the batch."""

    uses_unpaired = uses_tokens = uses_source_text = False

    def __init__(self, group: dist.ProcessGroup | None = None):
        super().__init__()
        self.group = group

    def forward(self, error: Tensor) -> ObjectiveOutput:
        """Errors (B,) of the local rows, which the adapter computes, to the mean over all processes."""
        count = global_sum(error.new_tensor(float(len(error))), self.group)
        loss = global_sum(error.sum(), self.group) / count
        return ObjectiveOutput(loss, {"denoising": loss.detach()})


def all_objective_options(config: TrainConfig) -> dict:
    """Every option of the objective with the value that the run trains with: as given, else its default."""
    if config.objective == DIFFUSION:
        return {}
    options = {**objective_options(config.objective), **config.objective_options}
    # Without tokens the term is left out, whatever its default weight.
    return options | ({"token_weight": 0.0} if "token_weight" in options and not wants_tokens(config) else {})


def make_objective(config: TrainConfig, group: dist.ProcessGroup | None) -> nn.Module:
    """The objective, for the process group that shares the batch; CSDiffError for options that it does not take."""
    if config.objective == DIFFUSION:
        return DenoisingObjective(group)
    try:
        return build_objective(config.objective, **all_objective_options(config), group=group)
    except (ValueError, TypeError) as error:
        raise CSDiffError(f"--objective_options: {error}") from error
