"""Checks of arguments shared by the adapters; each error is one sentence."""

from typing import Any

from torch import Tensor

from csdiff.errors import CSDiffError


def require_positive(**values: Any) -> None:
    """Raises a `CSDiffError` that names the first argument that is not a positive whole number."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CSDiffError(f"`{name}` must be a positive whole number, found {value!r}.")


def check_dropout(dropout: float) -> None:
    """Raises a `CSDiffError` unless `dropout` lies in [0, 1)."""
    if not 0 <= dropout < 1:
        raise CSDiffError(f"`dropout` must lie in [0, 1), found {dropout!r}.")


def require_states(text_states: Tensor | None, states_dim: int, name: str) -> Tensor:
    """Returns `text_states` or raises a `CSDiffError` when they are absent or of another width."""
    if text_states is None:
        raise CSDiffError(
            f"{name} needs the text encoder's token states; give `text_states` (B, L, {states_dim}), "
            "or use an adapter on pooled embeddings such as `mlp`."
        )
    if text_states.ndim != 3 or text_states.shape[-1] != states_dim:
        raise CSDiffError(f"{name} expects text states (B, L, {states_dim}), found {tuple(text_states.shape)}.")
    return text_states
