"""A scheduler for priors that answer in one step, and a prior whose answer was computed beforehand."""

import logging

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformer, PriorTransformerOutput
from diffusers.schedulers.scheduling_unclip import UnCLIPSchedulerOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin

# Stock prior pipelines with an adapter in them cannot be loaded without this module. diffusers then gives notice that
# the prior is no `PriorTransformer`; an adapter stands in for one.
logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
    lambda record: not (record.msg.startswith("Expected types for ") and "csdiff." in record.msg)
)


class OneShotScheduler(SchedulerMixin, ConfigMixin):
    """Runs a prior exactly once and returns what it predicts: `x_0 = model_output`.

    The schedulers of diffusion priors divide by `num_inference_steps - 1`, clip the prediction before it is
    un-whitened, and add noise. This one does none of it, so `prior_num_inference_steps` has no effect.

    Usage:
        >>> pipe = KandinskyV22PriorPipeline.from_pretrained(repo, prior=adapter, scheduler=OneShotScheduler())
    """

    order = 1

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1):
        self.init_noise_sigma = 1.0
        self.timesteps = torch.zeros(1, dtype=torch.long)

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None):
        """Sets the only timestep, 0, whatever number of steps is asked for."""
        self.num_inference_steps = 1
        self.timesteps = torch.zeros(1, dtype=torch.long, device=device)

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Returns `sample` as it is."""
        return sample

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor | None = None,
        sample: torch.Tensor | None = None,
        prev_timestep: int | torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> UnCLIPSchedulerOutput | tuple[torch.Tensor]:
        """Returns `model_output`, shape `(B, D)`; every other argument is accepted and ignored."""
        return UnCLIPSchedulerOutput(model_output, model_output) if return_dict else (model_output,)


def is_one_shot(prior: torch.nn.Module) -> bool:
    """Whether `prior` answers in one forward pass; a stock `PriorTransformer` and the `diffusion` adapter do not."""
    prior = getattr(prior, "_orig_mod", prior)
    return getattr(prior, "one_shot", not isinstance(prior, PriorTransformer))


class EmbeddingPrior(ModelMixin, ConfigMixin):
    """Answers every call with the image embeddings it was given: drives pipelines that only take a prior.

    `UnCLIPPipeline` and `StableUnCLIPPipeline` compute the embedding themselves from the prompt. With this prior in
    them they decode any embedding. Both halves of a classifier-free guidance batch get the same answer, so that the
    prior's guidance scale has no effect.

    Args:
        embedding_dim (`int`): D, the width of the image embeddings.

    Usage:
        >>> pipe.prior = EmbeddingPrior(embedding_dim=768)
        >>> pipe.prior.image_embeds = adapter.embed(text_embeds)
    """

    @register_to_config
    def __init__(self, *, embedding_dim: int):
        super().__init__()
        self.register_buffer("image_embeds", torch.zeros(1, embedding_dim), persistent=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: int | torch.Tensor | None = None,
        proj_embedding: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> PriorTransformerOutput | tuple[torch.Tensor]:
        """Returns `image_embeds` (B, D), repeated to the `k * B` rows of `hidden_states`."""
        embeds = self.image_embeds.to(hidden_states).repeat(hidden_states.shape[0] // self.image_embeds.shape[0], 1)
        return PriorTransformerOutput(predicted_image_embedding=embeds) if return_dict else (embeds,)

    def post_process_latents(self, prior_latents: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings as they are: they are raw already."""
        return prior_latents
