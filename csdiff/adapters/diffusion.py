"""The diffusion prior of DALL-E 2: the slow baseline, a stock `PriorTransformer` underneath."""

import functools
import inspect

import torch
from diffusers import DDPMScheduler, ModelMixin, PriorTransformer, UnCLIPScheduler  # noqa: F401  see adapters/mlp.py
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F

from csdiff.adapters.base import Adapter
from csdiff.errors import CSDiffError


class PriorBlock(BasicTransformerBlock):
    """The stock block, which recomputes its activations in the backward pass where that is switched on."""

    gradient_checkpointing = False

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(super().forward, hidden_states, attention_mask)
        return super().forward(hidden_states, attention_mask)


class DiffusionAdapter(Adapter, PriorTransformer):
    r"""Predicts the whitened image embedding `x0` from its noisy version, the text, and the time step.

        loss = E || f(x_s, s, text) - x0 ||^2,   x_s = sqrt(a_s) x0 + sqrt(1 - a_s) noise,   x0 = (y - mean) / std

    with the squared-cosine schedule over 1000 steps; `embed` samples with 25 of them. `forward` is the stock
    denoising step, so stock prior pipelines with a `UnCLIPScheduler` drive it, and stock
    `PriorTransformer.from_pretrained` loads its folder (where `states_dim` equals `embedding_dim`).

    Args:
        states_dim (`int`, *optional*): Width of the text encoder's token states; `embedding_dim` by default.
        num_layers, num_attention_heads, attention_head_dim (`int`): 10, 16 and 32 by default (the adapters' size;
            Kandinsky's own prior has 20, 32 and 64).
        num_embeddings (`int`, *optional*, defaults to 77): Number of text tokens; every batch has exactly as many.
        encoder_hid_proj_type (`str`, *optional*, defaults to `"linear"`): `None` leaves the token states out: the
            prior then sees the pooled embedding alone.
        condition_dropout (`float`, *optional*, defaults to 0.1): Share of rows trained without text, for guidance.
        additional_embeddings, dropout, time_embed_act_fn, norm_in_type, embedding_proj_norm_type, added_emb_type,
        time_embed_dim, embedding_proj_dim, clip_embed_dim: As in `PriorTransformer`.

    Source: arXiv 2204.06125, section 2.2 (predicting x0), equation 2; 25 steps as Kandinsky 2.2.
    """

    one_shot = False
    _supports_gradient_checkpointing = True
    _no_split_modules = ["PriorBlock"]

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
        additional_embeddings: int = 4,
        dropout: float = 0.0,
        time_embed_act_fn: str = "silu",
        norm_in_type: str | None = None,
        embedding_proj_norm_type: str | None = None,
        encoder_hid_proj_type: str | None = "linear",
        added_emb_type: str | None = "prd",
        time_embed_dim: int | None = None,
        embedding_proj_dim: int | None = None,
        clip_embed_dim: int | None = None,
        condition_dropout: float = 0.1,
    ):
        text_dim = embedding_dim if text_dim is None else text_dim
        states_dim = embedding_dim if states_dim is None else states_dim
        self._check_options()
        if embedding_proj_dim not in (None, text_dim) or clip_embed_dim not in (None, embedding_dim):
            raise CSDiffError(
                f"`embedding_proj_dim` and `clip_embed_dim` follow text_dim {text_dim} and embedding_dim "
                f"{embedding_dim}; found {embedding_proj_dim} and {clip_embed_dim}."
            )
        taken = inspect.signature(PriorTransformer.__init__).parameters
        stock = {
            **{name: value for name, value in self.config.items() if name in taken},
            "num_embeddings": 0 if encoder_hid_proj_type is None else num_embeddings,
            "embedding_proj_dim": text_dim,
            "clip_embed_dim": embedding_dim,
        }
        super().__init__(**stock)
        self._record(states_dim=states_dim, **stock)
        for block in self.transformer_blocks:
            block.__class__ = PriorBlock
        # Stock clip_mean and clip_std are parameters without gradient, which DDP refuses: buffers instead.
        del self.clip_mean, self.clip_std
        self._init_contract(embedding_dim, text_dim)
        if encoder_hid_proj_type is not None and states_dim != embedding_dim:
            self.encoder_hidden_states_proj = nn.Linear(states_dim, num_attention_heads * attention_head_dim)

    @property
    def uses_text_states(self) -> bool:
        return self.config.encoder_hid_proj_type is not None

    forward = PriorTransformer.forward

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Denoised whitened latents (B, D) to raw image embeddings, norms calibrated."""
        return super().post_process_latents(self._calibrated(prior_latents.float()).to(prior_latents.dtype))

    def training_loss(
        self,
        text_embeds: Tensor,
        image_embeds: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The denoising loss of a batch, a scalar: `mean (f(x_s, s, text) - x0)^2`.

        Text as in `embed`, `image_embeds` (B, embedding_dim) raw; `generator` draws steps, noise and dropped rows.
        """
        clean = (image_embeds.float() - self.clip_mean) / self.clip_std
        batch, device = len(clean), clean.device
        draw = device if generator is None else generator.device
        schedule = _noise_schedule()
        steps = torch.randint(len(schedule.betas), (batch,), generator=generator, device=draw).to(device)
        noise = torch.randn(clean.shape, generator=generator, device=draw).to(device)
        dropped = (torch.rand(batch, generator=generator, device=draw) < self.config.condition_dropout).to(device)
        condition = self._condition(text_embeds, text_states, text_mask)
        condition = [None if part is None else _where(dropped, part) for part in condition]
        noisy = schedule.add_noise(clean, noise, steps).to(self.dtype)
        predicted = self(noisy, steps, *condition).predicted_image_embedding
        return F.mse_loss(predicted.float(), clean)

    def embed(
        self,
        text_embeds: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        num_inference_steps: int = 25,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples raw image embeddings (B, D) by denoising; text as in `Adapter.embed`.

        `num_inference_steps` are at least 2; a `guidance_scale` above 1 is classifier-free guidance (two passes).
        """
        self._check_text(text_embeds)
        scheduler = UnCLIPScheduler(clip_sample_range=10.0, prediction_type="sample")
        scheduler.set_timesteps(num_inference_steps, device=text_embeds.device)
        condition = self._condition(text_embeds, text_states, text_mask)
        guided = guidance_scale > 1
        if guided:
            condition = [None if part is None else torch.cat([_null(part), part]) for part in condition]
        latents = self._noise(text_embeds, generator).to(self.dtype)
        following = [*scheduler.timesteps[1:], None]
        for step, previous in zip(scheduler.timesteps, following, strict=True):
            model_input = torch.cat([latents] * 2) if guided else latents
            predicted = self(model_input, step, *condition).predicted_image_embedding
            if guided:
                without, with_text = predicted.chunk(2)
                predicted = without + guidance_scale * (with_text - without)
            latents = scheduler.step(predicted, step, latents, prev_timestep=previous, generator=generator).prev_sample
        return self.post_process_latents(latents).to(text_embeds.dtype)

    def _condition(self, text_embeds, text_states, text_mask) -> list[Tensor | None]:
        if not self.uses_text_states:
            return [text_embeds.to(self.dtype), None, None]
        text_states = self._check_states(text_states, exactly=True)
        return [text_embeds.to(self.dtype), text_states.to(self.dtype), text_mask]


@functools.cache
def _noise_schedule() -> DDPMScheduler:
    return DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")


def _null(part: Tensor) -> Tensor:
    """What stands for no text: zeros, and a mask that hides nothing."""
    return torch.ones_like(part) if part.dtype == torch.bool else torch.zeros_like(part)


def _where(dropped: Tensor, part: Tensor) -> Tensor:
    return torch.where(dropped.view(-1, *[1] * (part.ndim - 1)), _null(part), part)
