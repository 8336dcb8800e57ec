"""What every adapter shares: the prior's calling convention, statistics, norm calibration, and its folder."""

import inspect
import warnings
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput
from torch import Tensor, nn

from csdiff.adapters.persistence import Persistent
from csdiff.errors import CSDiffError

# Norms are spread at most this much: a steeper map, fitted on a few nearly equal norms, would throw an unusual norm
# out of any range that a decoder knows.
_MAX_NORM_SCALE = 4.0


def start_as_identity(layer: nn.Linear) -> None:
    """Makes a layer the identity where its widths agree, orthogonal where they do not."""
    (nn.init.eye_ if layer.in_features == layer.out_features else nn.init.orthogonal_)(layer.weight)
    nn.init.zeros_(layer.bias)


def start_at_zero(layer: nn.Linear) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


class Adapter(Persistent, ModelMixin, ConfigMixin):
    r"""A map from text embeddings to raw image embeddings that diffusers pipelines accept as their prior.

    A subclass implements `predict`; everything else is shared. All take `embedding_dim` (D) and `text_dim` (Dt, by
    default D), the widths of image and text embeddings. With text embedding `t` (B, Dt) the adapter computes

        z = predict((t - text_mean) / text_std)               whitened prediction
        r = z * clip_std + clip_mean                          raw image embedding
        forward: z' such that r' = r * exp((norm_scale - 1) * log||r|| + norm_shift)

    so `log||r'|| = norm_scale * log||r|| + norm_shift` with the direction of `r` untouched (identity by default).
    `forward` returns `z'`, as diffusers' priors do; `post_process_latents` gives `r'`; `embed` does both.

    Statistics are float32 buffers whatever dtype the weights are cast to. `metadata` is the content of `csdiff.json`.

    Source: the calling convention is that of diffusers' `PriorTransformer` (DALL-E 2, arXiv 2204.06125, section 2.2).
    """

    # Whether `text_states` must be given, whether training feeds token ids through the adapter's own text encoder, and
    # whether one forward pass gives the image embedding.
    uses_text_states, uses_input_ids, one_shot = False, False, True
    # What `forward` answered last, outside of training: see `post_process_latents`.
    _answer: Tensor | None = None
    _STATISTICS = ("clip_mean", "clip_std", "text_mean", "text_std", "norm_scale", "norm_shift")

    def _init_contract(self, embedding_dim: int, text_dim: int | None) -> int:
        """Checks the options, records the resolved `text_dim` and makes the buffers; returns `text_dim`."""
        self._check_options()
        text_dim = embedding_dim if text_dim is None else text_dim
        self._record(text_dim=text_dim)
        for side, dim in (("clip", embedding_dim), ("text", text_dim)):
            self.register_buffer(f"{side}_mean", torch.zeros(1, dim, dtype=torch.float32))
            self.register_buffer(f"{side}_std", torch.ones(1, dim, dtype=torch.float32))
        self.register_buffer("norm_scale", torch.ones((), dtype=torch.float32))
        self.register_buffer("norm_shift", torch.zeros((), dtype=torch.float32))
        self.metadata: dict[str, Any] = {}
        return text_dim

    def _check_options(self) -> None:
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            value = self.config.get(name)
            # The diffusion prior without token states has 0 of them.
            least = 0 if name == "num_embeddings" else 1
            whole = value is None or (type(value) is int and value >= least)
            if parameter.annotation in (int, int | None) and not whole:
                raise CSDiffError(f"`{name}` must be a positive whole number, found {value!r}.")
            # Not all values of a layer may be dropped; the condition of every row may.
            most = 1 if name == "condition_dropout" else 0.999999
            if name.endswith("dropout") and not (isinstance(value, (int, float)) and 0 <= value <= most):
                raise CSDiffError(f"`{name}` must lie in [0, 1), found {value!r}.")

    def _record(self, **values: Any) -> None:
        """Changes config entries after construction, so that a copy made from the config gets them too."""
        defaults = [name for name in self.config.get("_use_default_values", []) if name not in values]
        self.register_to_config(**values, _use_default_values=defaults)

    def forward(
        self,
        hidden_states: Tensor | None,
        timestep: Tensor | float | int | None,
        proj_embedding: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> PriorTransformerOutput | tuple[Tensor]:
        """Whitened image embeddings (B, embedding_dim), as diffusers' `PriorTransformer.forward` gives them.

        `proj_embedding` (B, text_dim) are raw projected text embeddings, whose dtype is kept; `encoder_hidden_states`
        (B, L, states_dim) the text encoder's last states; `attention_mask` (B, L) is True (or 1) where there is a
        token. `hidden_states` (B, embedding_dim), the latents, are for adapters with a noise token, and `timestep` for
        those that are not one-shot.
        """
        text = self._whiten_text(proj_embedding)
        whitened = self.predict(text, encoder_hidden_states, attention_mask, hidden_states)
        whitened = self._calibrated(whitened.float()).to(proj_embedding.dtype)
        self._answer = None if torch.is_grad_enabled() else whitened
        if not return_dict:
            return (whitened,)
        return PriorTransformerOutput(predicted_image_embedding=whitened)

    def predict(self, text: Tensor, states: Tensor | None, mask: Tensor | None, latents: Tensor | None) -> Tensor:
        """The method itself: whitened text (B, text_dim) to whitened image embeddings (B, embedding_dim)."""
        raise NotImplementedError

    def post_process_latents(self, prior_latents: Tensor) -> Tensor:
        """Whitened (B, embedding_dim) to raw image embeddings, in the same dtype.

        A one-shot adapter is right without classifier-free guidance. Prior pipelines guide by default: they ask for
        `u` of an empty prompt and `c` of the prompt in one batch, and hand `u + g (c - u)` to this method, which then
        goes back to `c`.
        """
        prior_latents = self._unguided(prior_latents) if self.one_shot else prior_latents
        device = prior_latents.device
        raw = prior_latents.float() * self.clip_std.to(device) + self.clip_mean.to(device)
        return raw.to(prior_latents.dtype)

    def _unguided(self, latents: Tensor) -> Tensor:
        answer, self._answer = self._answer, None
        if answer is None or len(answer) != 2 * len(latents) or answer.device != latents.device:
            return latents
        empty, prompt = answer.float().chunk(2)
        step, taken = prompt - empty, latents.float() - empty
        scale = (step * taken).sum() / (step * step).sum().clamp_min(1e-12)
        # Half precision rounds each of the numbers that were added up.
        size = (answer.float().norm() + latents.float().norm()) * (1 + scale.abs())
        if (taken - scale * step).norm() <= 4 * torch.finfo(latents.dtype).eps * size:
            return prompt.to(latents.dtype)
        warnings.warn(
            f"The pipeline changed what this {type(self).__name__} answered, by guidance and a scheduler of diffusion "
            "priors: give it scheduler=OneShotScheduler(), or use csdiff.load_adapter(pipe, adapter).",
            stacklevel=3,
        )
        return latents

    @property
    def samples(self) -> bool:
        """Whether one prompt has many embeddings by itself: with a noise token, and in diffusion."""
        return not self.one_shot or bool(self.config.get("noise_token"))

    def spread(
        self, whitened: Tensor, amount: float, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        r"""Mixes noise into whitened embeddings (B, embedding_dim), so that an adapter with one answer gives many:

            z' = sqrt(1 - amount^2) z + amount * noise,    noise ~ N(0, I)

        `z'` keeps the spread that whitened image embeddings have. 0 gives `z` back, 1 an image of any prompt, and the
        cosine of `z'` to `z` is about `sqrt(1 - amount^2)`. `generator` draws the noise, one sample a row, or it is
        given as `noise`.

        Raises:
            CSDiffError: An amount outside [0, 1], or an adapter that has noise of its own.
        """
        if not 0 <= amount <= 1:
            raise CSDiffError(f"`spread` must lie in [0, 1], found {amount!r}.")
        if amount == 0:
            return whitened
        if self.samples:
            raise CSDiffError(
                f"`spread` is for adapters with one answer a prompt, and this {type(self).__name__} draws its own: "
                "vary the seed, and leave `spread` at 0."
            )
        noise = self._noise(whitened, generator) if noise is None else noise
        return ((1 - amount**2) ** 0.5 * whitened + amount * noise).to(whitened.dtype)

    def _noise(self, rows: Tensor, generator: torch.Generator | None) -> Tensor:
        device = rows.device if generator is None else generator.device
        noise = torch.randn(len(rows), self.config.embedding_dim, generator=generator, device=device)
        return noise.to(rows.device)

    def embed(
        self,
        text_embeds: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
        *,
        spread: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Raw text embeddings (B, text_dim) to raw image embeddings (B, embedding_dim); differentiable.

        `text_states` (B, L, states_dim) are for adapters with `uses_text_states`, and `text_mask` (B, L) is True where
        there is a token. `generator` draws the noise of `spread`, or that of the noise token: one sample a row.

        Raises:
            CSDiffError: The last dimension of `text_embeds` is not `config.text_dim`; a `spread` that does not fit.
        """
        self._check_text(text_embeds)
        noise = self._noise(text_embeds, generator) if self.samples else None
        whitened = self(noise, 0, text_embeds, text_states, text_mask).predicted_image_embedding
        return self.post_process_latents(self.spread(whitened, spread, generator))

    def embed_with_tokens(
        self,
        text_embeds: Tensor,
        token_embeds: Tensor,
        text_states: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`embed`, and every token mapped as a caption is, for a token-level term; differentiable.

        `token_embeds` (B, L, text_dim) are the token states in the space of the text embeddings, by the text encoder's
        projection. The answer is raw image embeddings (B, embedding_dim) and tokens (B, L, embedding_dim), which mean
        nothing where the mask is False.

        Raises:
            CSDiffError: As `embed`; token embeddings of another width.
        """
        embeds = self.embed(text_embeds, text_states, text_mask)
        return embeds, self.embed(token_embeds.flatten(0, 1)).unflatten(0, token_embeds.shape[:2])

    def _check_text(self, text_embeds: Tensor) -> None:
        if text_embeds.ndim != 2 or text_embeds.shape[1] != self.config.text_dim:
            raise CSDiffError(
                f"{type(self).__name__} expects text embeddings of shape (batch, {self.config.text_dim}), found "
                f"{tuple(text_embeds.shape)}; encode the text with the encoder the adapter was trained for."
            )

    def _check_states(self, text_states: Tensor | None, exactly: bool = False) -> Tensor:
        width, count = self.config.states_dim, self.config.num_embeddings
        if text_states is None or text_states.ndim != 3 or text_states.shape[-1] != width:
            raise CSDiffError(
                f"{type(self).__name__} needs the text encoder's token states, `text_states` (B, L, {width}), found "
                f"{None if text_states is None else tuple(text_states.shape)}; `mlp` needs none."
            )
        found, rule = text_states.shape[1], "exactly" if exactly else "at most"
        if found > count or (exactly and found < count):
            raise CSDiffError(
                f"{type(self).__name__} takes {rule} {count} text tokens, found {found}; pad or truncate the text as "
                "the training did."
            )
        return text_states

    def _whiten_text(self, text: Tensor) -> Tensor:
        return ((text.float() - self.text_mean) / self.text_std).to(self.dtype)

    def _calibrated(self, whitened: Tensor) -> Tensor:
        # Written as a correction to z, so that norm_scale = 1 and norm_shift = 0 return z bit for bit.
        norm = (whitened * self.clip_std + self.clip_mean).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        gain = torch.exp((self.norm_scale - 1) * norm.log() + self.norm_shift)
        return gain * whitened + (gain - 1) * (self.clip_mean / self.clip_std)

    @torch.no_grad()
    def set_statistics(
        self, mean: Tensor, std: Tensor, text_mean: Tensor | None = None, text_std: Tensor | None = None
    ) -> None:
        """Sets mean and standard deviation of each dimension of the raw image embeddings, (embedding_dim,), and
        optionally of the raw text embeddings, (text_dim,).

        Raises:
            CSDiffError: A wrong shape, a value that is not finite, or a negative standard deviation.
        """
        given = {"clip_mean": mean, "clip_std": std, "text_mean": text_mean, "text_std": text_std}
        for name, values in given.items():
            if values is None:
                continue
            buffer = getattr(self, name)
            values = torch.as_tensor(values, dtype=torch.float32).reshape(1, -1)
            if values.shape != buffer.shape:
                raise CSDiffError(f"`{name}` must have {buffer.shape[1]} entries, found {values.shape[1]}.")
            if wrong := int((~values.isfinite() | ((values < 0) & name.endswith("std"))).sum()):
                raise CSDiffError(f"`{name}` must be finite, a deviation not negative; {wrong} entries are not.")
            if name.endswith("std"):
                # A constant dimension carries nothing; a small floor keeps it constant without dividing by zero.
                values = values.clamp_min(max(1e-4 * values.mean().item(), 1e-12))
            buffer.copy_(values)

    @torch.no_grad()
    def calibrate_norm(self, predicted_norms: Tensor, real_norms: Tensor) -> None:
        """Makes the norms of predictions have the mean and spread of the real ones; directions stay as they are.

        Fits `log n' = scale * log n + shift` so that the mean and the standard deviation of `n'` over the given
        `predicted_norms` (N,), those of what `embed` returns now, best on held-out data, are those of `real_norms`
        (M,), and composes it with the calibration already there; `scale` <= 4.

        Raises:
            CSDiffError: Fewer than two norms, or one that is not positive and finite.
        """
        predicted, real = (torch.as_tensor(n).detach().double().flatten().cpu() for n in (predicted_norms, real_norms))
        for name, norms in (("predicted_norms", predicted), ("real_norms", real)):
            if norms.numel() < 2 or not norms.isfinite().all() or (norms <= 0).any():
                raise CSDiffError(f"`{name}` must hold at least two positive finite norms, found {norms.numel()}.")
        logs = predicted.log() - predicted.log().mean()
        scale = (real.log().std() / logs.std().clamp_min(1e-12)).clamp_max(_MAX_NORM_SCALE)
        for _ in range(20):
            mapped = torch.exp(scale * logs)
            ratio = (real.std() / real.mean()) / (mapped.std() / mapped.mean()).clamp_min(1e-12)
            scale = (scale * ratio).clamp_max(_MAX_NORM_SCALE)
        shift = (real.mean() / torch.exp(scale * logs).mean()).log() - scale * predicted.log().mean()
        self.norm_shift.copy_(scale * self.norm_shift.double().cpu() + shift)
        self.norm_scale.copy_(scale * self.norm_scale.double().cpu())

    @torch.no_grad()
    def reset_norm_calibration(self) -> None:
        """Makes the norm map the identity again."""
        self.norm_scale.fill_(1.0)
        self.norm_shift.fill_(0.0)

    def init_from(self, linear: "Adapter") -> None:
        """Starts this adapter at a fitted `LinearAdapter`: `embed` then returns what the linear map returns."""
        raise CSDiffError(f"{type(self).__name__} cannot start from a linear map; mlp and transformer adapters can.")

    @torch.no_grad()
    def _start_at(self, linear: "Adapter", skip: nn.Linear, rest: nn.Linear) -> None:
        """Makes `skip` the map of a `LinearAdapter`, with its statistics, and `rest` answer zero."""
        theirs, mine = ((a.config.text_dim, a.config.embedding_dim) for a in (linear, self))
        if theirs != mine:
            raise CSDiffError(
                f"The linear map goes from {theirs[0]} to {theirs[1]}, the adapter from {mine[0]} to {mine[1]}."
            )
        self._copy_statistics(linear)
        skip.load_state_dict(linear.linear.state_dict())
        start_at_zero(rest)

    @torch.no_grad()
    def _copy_statistics(self, other: "Adapter") -> None:
        for name in self._STATISTICS:
            getattr(self, name).copy_(getattr(other, name))

    def to(self, *args: Any, **kwargs: Any) -> "Adapter":
        """`torch.nn.Module.to`; the statistics stay float32."""
        # diffusers warns at every cast of modules that should stay in float32: "[]", as there are none.
        if any(isinstance(value, (torch.dtype, Tensor)) for value in (*args, *kwargs.values())):
            return torch.nn.Module.to(self, *args, **kwargs)
        return super().to(*args, **{name: value for name, value in kwargs.items() if name != "dtype"})

    def _apply(self, fn, recurse=True):
        # Half-precision casts would round the statistics that every embedding passes through: keep them in float32.
        before = {name: self._buffers[name] for name in self._STATISTICS if name in self._buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self
