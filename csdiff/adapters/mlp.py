"""Residual multi-layer perceptron on the pooled text embedding."""

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks this name up here when it reloads a pipeline
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from csdiff.adapters.base import Adapter, start_as_identity, start_at_zero


class MLPBlock(nn.Module):
    """`x + fc2(dropout(gelu(fc1(norm(x)))))`, (B, width) to (B, width)."""

    def __init__(self, width: int, hidden: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.fc2(self.dropout(nn.functional.gelu(self.fc1(self.norm(hidden_states)))))


class MLPAdapter(Adapter):
    r"""A linear map plus a residual MLP, both in whitened coordinates.

        z = skip(x) + proj_out(norm_out(blocks(proj_in(x)))),    x = (t - text_mean) / text_std

    `proj_out` starts at zero and `skip` at the identity where the dimensions agree, so that the first prediction gives
    every text embedding the image embeddings' mean and spread. Where they differ, start at a map by `init_from`.

    Args:
        width (`int`, *optional*): Width of the residual branch; `embedding_dim` by default.
        num_layers (`int`, *optional*, defaults to 2): Number of residual blocks.
        expansion (`int`, *optional*, defaults to 4): Hidden width of a block over `width`.
        dropout (`float`, *optional*, defaults to 0.0): In the hidden layer of each block.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MLPBlock"]
    _repeated_blocks = ["MLPBlock"]

    @register_to_config
    def __init__(
        self,
        *,
        embedding_dim: int,
        text_dim: int | None = None,
        width: int | None = None,
        num_layers: int = 2,
        expansion: int = 4,
        dropout: float = 0.0,
    ):
        super().__init__()
        text_dim = self._init_contract(embedding_dim, text_dim)
        width = embedding_dim if width is None else width

        self.skip = nn.Linear(text_dim, embedding_dim)
        self.proj_in = nn.Linear(text_dim, width)
        self.blocks = nn.ModuleList(MLPBlock(width, expansion * width, dropout) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, embedding_dim)
        self.gradient_checkpointing = False

        start_as_identity(self.skip)
        start_at_zero(self.proj_out)

    def predict(self, text: Tensor, states: Tensor | None, mask: Tensor | None, latents: Tensor | None) -> Tensor:
        hidden_states = self.proj_in(text)
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return self.skip(text) + self.proj_out(self.norm_out(hidden_states))

    def init_from(self, linear: Adapter) -> None:
        self._start_at(linear, self.skip, self.proj_out)
