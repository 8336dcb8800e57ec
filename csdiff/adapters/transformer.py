"""Transformer over text token states, pooled embedding and a learned query."""

import torch
from diffusers import ModelMixin  # noqa: F401  diffusers looks this name up here when it reloads a pipeline
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from torch import Tensor, nn
from torch.nn import functional as F

from csdiff.adapters.base import Adapter, start_as_identity, start_at_zero
from csdiff.errors import CSDiffError

TRANSFORMER_PRESETS: dict[str, dict[str, int]] = {
    "eclipse-768": {"embedding_dim": 768, "num_layers": 10, "num_attention_heads": 16, "attention_head_dim": 32},
    "eclipse-1280": {"embedding_dim": 1280, "num_layers": 10, "num_attention_heads": 16, "attention_head_dim": 32},
    "tiny": {"num_layers": 2, "num_attention_heads": 4, "attention_head_dim": 32},
}
"""`eclipse-*`: the 33.1M and 34.2M priors of ECLIPSE (arXiv 2312.04655); `tiny`: for the shipped stack and tests."""


class SelfAttention(nn.Module):
    """Multi-head self-attention by `scaled_dot_product_attention`; projections named as diffusers names them."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Dropout(dropout)])

    def forward(self, hidden_states: Tensor, allowed: Tensor) -> Tensor:
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        projection, dropout = self.to_out
        return dropout(projection(attended.transpose(1, 2).flatten(2)))


class TransformerBlock(nn.Module):
    """Pre-norm attention and GELU feed-forward (4x), each with a residual, as the DALL-E 2 prior's blocks."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn1 = SelfAttention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor, allowed: Tensor) -> Tensor:
        hidden_states = hidden_states + self.attn1(self.norm1(hidden_states), allowed)
        return hidden_states + self.fc2(self.dropout(F.gelu(self.fc1(self.norm2(hidden_states)))))


class TransformerAdapter(Adapter, PeftAdapterMixin):
    r"""One forward pass of a prior-shaped transformer: text tokens and pooled embedding in, image embedding out.

    The sequence is `[text states (L), pooled text, start, query]`, each projected to the inner width, plus learned
    positions; attention is causal and sees no padding; the query's last state is projected to the image embedding.
    `start` holds the place of the diffusion prior's noisy image: the whitened text embedding, or, with
    `noise_token=True`, Gaussian latents, so that one prompt has many outputs. Where the dimensions agree the output is
    added to the whitened text embedding, and training begins at that.

    Args:
        states_dim (`int`, *optional*): Width of the text encoder's token states; `text_dim` by default.
        num_layers (`int`, *optional*, defaults to 10): Number of blocks.
        num_attention_heads (`int`, *optional*, defaults to 16): Heads of each block.
        attention_head_dim (`int`, *optional*, defaults to 32): Width of a head.
        num_embeddings (`int`, *optional*, defaults to 77): Largest number of text tokens.
        noise_token (`bool`, *optional*, defaults to `False`): Whether `start` is noise.
        linear_skip (`bool`, *optional*, defaults to `False`): Whether the skip is a trained layer, as by `init_from`.
        dropout (`float`, *optional*, defaults to 0.0): In attention outputs and feed-forward layers.

    Source: ECLIPSE, arXiv 2312.04655, section 3 and its appendix; masks as in diffusers' `PriorTransformer`.
    """

    uses_text_states = True
    _supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "positional_embedding", "query"]

    @register_to_config
    def __init__(
        self,
        *,
        embedding_dim: int,
        text_dim: int | None = None,
        states_dim: int | None = None,
        num_layers: int = 10,
        num_attention_heads: int = 16,
        attention_head_dim: int = 32,
        num_embeddings: int = 77,
        noise_token: bool = False,
        linear_skip: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        text_dim = self._init_contract(embedding_dim, text_dim)
        states_dim = text_dim if states_dim is None else states_dim
        self._record(states_dim=states_dim)
        width = num_attention_heads * attention_head_dim

        self.encoder_hidden_states_proj = nn.Linear(states_dim, width)
        self.embedding_proj = nn.Linear(text_dim, width)
        self.proj_in = nn.Linear(embedding_dim if noise_token else text_dim, width)
        self.query = nn.Parameter(torch.zeros(1, 1, width))
        self.positional_embedding = nn.Parameter(torch.zeros(1, num_embeddings + 3, width))
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(width, num_attention_heads, dropout) for _ in range(num_layers)
        )
        self.norm_out = nn.LayerNorm(width)
        self.proj_to_clip_embeddings = nn.Linear(width, embedding_dim)
        self.skip = nn.Linear(text_dim, embedding_dim) if linear_skip else None
        self.gradient_checkpointing = False

        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.02)
        if self._has_skip:
            start_at_zero(self.proj_to_clip_embeddings)
        if linear_skip:
            start_as_identity(self.skip)

    @classmethod
    def from_preset(cls, preset: str, **options) -> "TransformerAdapter":
        """Builds a preset (`eclipse-768`, `eclipse-1280`, `tiny`); `options` override or complete its values."""
        if preset not in TRANSFORMER_PRESETS:
            raise CSDiffError(f"Unknown transformer preset {preset!r}; known: {', '.join(TRANSFORMER_PRESETS)}.")
        values = TRANSFORMER_PRESETS[preset]
        wanted, given = values.get("embedding_dim"), options.get("embedding_dim")
        if wanted and given and wanted != given:
            raise CSDiffError(
                f"Preset {preset!r} makes embeddings of width {wanted}, the data or decoder has {given}; use "
                "another preset or set the layers directly."
            )
        return cls(**{**values, **options})

    @property
    def _has_skip(self) -> bool:
        return self.skip is not None or self.config.text_dim == self.config.embedding_dim

    def predict(self, text: Tensor, states: Tensor | None, mask: Tensor | None, latents: Tensor | None) -> Tensor:
        return self._read(self._last_states(text, states, mask, latents)[:, -1], text)

    def _last_states(self, text, text_states, text_mask, latents) -> Tensor:
        """The last block's output (B, l + 3, width), for the l text states that are not padding in every row."""
        text_states, text_mask = self._without_padding(self._check_states(text_states), text_mask)
        start = text
        if self.config.noise_token:
            start = self._noise(text, None) if latents is None else latents
        length = text_states.shape[1]
        hidden_states = torch.cat(
            [
                self.encoder_hidden_states_proj(text_states.to(self.dtype)),
                self.embedding_proj(text)[:, None],
                self.proj_in(start.to(self.dtype))[:, None],
                self.query.expand(len(text), -1, -1),
            ],
            dim=1,
        )
        positions = torch.cat([self.positional_embedding[:, :length], self.positional_embedding[:, -3:]], dim=1)
        hidden_states = hidden_states + positions
        allowed = self._allowed(text_mask, length + 3)

        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, allowed)
            else:
                hidden_states = block(hidden_states, allowed)
        return hidden_states

    def _read(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        whitened = self.proj_to_clip_embeddings(self.norm_out(hidden_states))
        if self.skip is not None:
            return whitened + self.skip(text)
        return whitened + text if self._has_skip else whitened

    def _without_padding(self, text_states: Tensor, text_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Cuts the columns that are padding in every row: no token attends to them, so the result is the same."""
        if text_mask is None:
            return text_states, None
        text_mask = text_mask.to(device=text_states.device, dtype=torch.bool)
        # The cut depends on the data, which a compiled graph cannot; there the masked columns stay.
        if torch.compiler.is_compiling():
            return text_states, text_mask
        places = torch.arange(1, text_mask.shape[1] + 1, device=text_mask.device)
        length = int((text_mask.any(0) * places).amax().clamp_min(1))
        return text_states[:, :length], text_mask[:, :length]

    def _allowed(self, text_mask: Tensor | None, length: int) -> Tensor:
        """Who attends to whom, (B or 1, 1, S, S): earlier tokens that are not padding, and always oneself."""
        causal = torch.ones(1, 1, length, length, dtype=torch.bool, device=self.query.device).tril()
        if text_mask is None:
            return causal
        seen = F.pad(text_mask, (0, 3), value=True)[:, None, None]
        return causal & (seen | torch.eye(length, dtype=torch.bool, device=seen.device))

    def embed_with_tokens(
        self,
        text_embeds: Tensor,
        token_embeds: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """As `Adapter.embed_with_tokens`, in one pass: a token is read at its own place as the caption at the query,
        with the skip of its own embedding; it knows the tokens before it, and neither the pooled text nor noise.

        Raises:
            CSDiffError: As `embed`; token embeddings that are not one of `config.text_dim` for each text state.
        """
        self._check_text(text_embeds)
        text = self._whiten_text(text_embeds)
        noise = self._noise(text_embeds, None) if self.samples else None
        states = self._last_states(text, text_states, text_mask, noise)
        expected = (*text_states.shape[:2], self.config.text_dim)
        if token_embeds.shape != expected:
            raise CSDiffError(
                f"{type(self).__name__} expects a token embedding for each text state, {expected}, found "
                f"{tuple(token_embeds.shape)}; project the text states with the text encoder's projection."
            )
        length = states.shape[1] - 3
        places = ((states[:, -1], text), (states[:, :length], self._whiten_text(token_embeds[:, :length])))
        whitened = (self._calibrated(self._read(*place).float()).to(text_embeds.dtype) for place in places)
        embeds, tokens = map(self.post_process_latents, whitened)
        # Columns that were cut come back, so that micro-batches of other lengths can be joined.
        return embeds, F.pad(tokens, (0, 0, 0, expected[1] - length))

    def init_from(self, linear: Adapter) -> None:
        skip = self.skip or nn.Linear(self.config.text_dim, self.config.embedding_dim).to(self.query)
        self._start_at(linear, skip, self.proj_to_clip_embeddings)
        self.skip = skip
        self._record(linear_skip=True)
