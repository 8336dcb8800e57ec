"""A prior that hands over embeddings computed beforehand."""

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformerOutput


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
        if not return_dict:
            return (embeds,)
        return PriorTransformerOutput(predicted_image_embedding=embeds)

    def post_process_latents(self, prior_latents: torch.Tensor) -> torch.Tensor:
        """Returns the embeddings as they are: they are raw already."""
        return prior_latents
