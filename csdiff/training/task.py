"""What is trained: adapter, objective and running average, behind one `backward(batch)`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from csdiff.errors import CSDiffError
from csdiff.losses.objectives import ObjectiveOutput
from csdiff.losses.process_group import global_sum
from csdiff.training.gradient_cache import Rows, cached_gradients, split
from csdiff.training.optimization import EMA


class NonFinite(ArithmeticError):
    """The embeddings or the loss of a batch are not finite; nothing was added to the gradients that counts."""


class Embedder(nn.Module):
    """Everything with trainable weights, as one module: rows in, embeddings in the image space out.

    Without an image adapter (for retrieval) image embeddings stay as they are.

    Attributes:
        project_text: For a token-level term: token states (B, L, H) to the space of the text embeddings (B, L, Dt),
            a method of the frozen text encoder; None maps no tokens.
    """

    def __init__(self, adapter: nn.Module, image_adapter: nn.Module | None = None):
        super().__init__()
        self.adapter, self.image_adapter = adapter, image_adapter
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
        text, embedded = self._text(pairs), {}
        if tokens:
            projected = self.project_text(text["text_states"])
            embedded["prediction"], embedded["text_tokens"] = self.adapter.embed_with_tokens(
                token_embeds=projected, **text
            )
        else:
            embedded["prediction"] = self.adapter.embed(**text)
        if self.image_adapter is not None:
            embedded["image"] = self.image_adapter.embed(pairs["image_embeds"])
        return {name: value.float() for name, value in embedded.items()}

    def _text(self, rows: dict) -> dict[str, Tensor | None]:
        """What the adapter embeds, by the names of its arguments."""
        if self.adapter.uses_input_ids:
            return dict(zip(("text_embeds", "text_states"), self.adapter.encode(rows["input_ids"]), strict=True))
        return {name: rows.get(name) for name in ("text_embeds", "text_states", "text_mask")}


class AlignmentTask:
    """Adapter, objective and EMA.

    Args:
        embedder: The trainable part.
        objective: Module of `csdiff.losses`, made for the process group that shares the batch.
        ema_decay: See :class:`EMA`.
        autocast: Context the embedder computes in, by default none; the objective always computes in float32.
        group: Process group that shares the batch, or None; all processes get the weights of the first.
    """

    def __init__(
        self,
        embedder: Embedder,
        objective: nn.Module,
        ema_decay: float = 0.0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        group: dist.ProcessGroup | None = None,
    ):
        self.embedder, self.objective, self.autocast, self.group = embedder, objective, autocast, group
        self.parameters = {
            **{f"embedder.{n}": p for n, p in embedder.named_parameters() if p.requires_grad},
            **{f"objective.{n}": p for n, p in objective.named_parameters() if p.requires_grad},
        }
        if group is not None:
            for tensor in (*self.parameters.values(), *embedder.adapter.buffers()):
                dist.broadcast(tensor.detach(), 0, group=group)
        self.ema = EMA(self.parameters, ema_decay)

    def backward(
        self,
        batch: Rows,
        micro_batch_size: int | None = None,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        reseed: Callable[[int], None] = lambda index: None,
    ) -> Any:
        """Adds the gradient of the loss to every weight; in micro-batches where given. Returns loss and terms.

        Raises:
            NonFinite: if embeddings or loss are not finite, on any process; the gradients are then to be thrown away.
        """
        # Images without an adapter pass through no weights: they go to the loss directly.
        trained = self.embedder.image_adapter is not None
        rows = {group: part for group, part in batch.items() if group != "unpaired_image" or trained}
        parts = [rows] if micro_batch_size is None else split(rows, micro_batch_size)
        if len(parts) > 1:
            return cached_gradients(
                forward=self.embed,
                micro_batches=parts,
                loss=lambda embedded: self._finite_loss(embedded, batch),
                backward=lambda loss: scale(loss).backward(),
                reseed=reseed,
            )
        reseed(0)
        output = self._finite_loss(self.embed(rows), batch)
        scale(output.loss).backward()
        return output

    def embed(self, rows: Rows) -> dict[str, Tensor]:
        """What the embedder makes of rows, in the computation type."""
        with self.autocast():
            return self.embedder(rows)

    def _finite_loss(self, embedded: dict[str, Tensor], batch: Rows) -> Any:
        checked = [*embedded.values(), *(rows["image_embeds"] for rows in batch.values() if "image_embeds" in rows)]
        if not self.agree(all(bool(value.detach().isfinite().all()) for value in checked)):
            raise NonFinite("an embedding is not finite")
        output = self.loss(embedded, batch)
        if not self.agree(bool(output.loss.detach().isfinite())):
            raise NonFinite("the loss is not finite")
        return output

    def loss(self, embedded: dict[str, Tensor], batch: Rows) -> Any:
        """The objective of embedded rows and of what in the batch does not depend on the weights."""
        if "error" in embedded:
            return self.objective(embedded["error"])
        pairs = batch["pairs"]
        inputs: dict[str, Tensor | None] = {}
        if self.objective.uses_source_text:
            inputs["source_text"] = pairs["text_embeds"]
        if self.objective.uses_unpaired:
            fixed = batch.get("unpaired_image", {}).get("image_embeds")
            inputs["unpaired_text"] = embedded.get("unpaired_text")
            inputs["unpaired_image"] = embedded.get("unpaired_image", fixed)
        if "text_tokens" in embedded:
            inputs |= {name: pairs[name] for name in ("image_tokens", "text_mask")}
            inputs["text_tokens"] = embedded["text_tokens"]
        image = embedded.get("image", pairs["image_embeds"])
        try:
            with torch.autocast(embedded["prediction"].device.type, enabled=False):
                return self.objective(embedded["prediction"], image, **inputs)
        except ValueError as error:
            raise CSDiffError(f"--objective: {type(self.objective).__name__} refuses these rows: {error}") from error

    def average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes, in one reduction.

        The objective scales the gradients it hands back so that this mean is the gradient of the whole batch. One flat
        reduction after the last backward adds in the same order at every step, which DDP's buckets do not once they
        are rebuilt: a resumed run would differ in the last bits.
        """
        if self.group is None:
            return
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        flat /= dist.get_world_size(self.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    def agree(self, fine: bool) -> bool:
        """Whether something holds on every process, so that all of them take the same turn."""
        if self.group is None:
            return fine
        flag = torch.tensor(float(fine), device=next(self.embedder.parameters()).device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.group)
        return bool(flag)


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
