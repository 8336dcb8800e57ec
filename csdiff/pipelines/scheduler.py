"""A scheduler for priors that answer in one step."""

import logging
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput

# Stock prior pipelines with an adapter in them cannot be loaded without this module. diffusers then gives notice that
# the prior is no `PriorTransformer`; an adapter stands in for one.
logging.getLogger("diffusers.pipelines.pipeline_utils").addFilter(
    lambda record: not (record.msg.startswith("Expected types for ") and "csdiff." in record.msg)
)


@dataclass
class OneShotSchedulerOutput(BaseOutput):
    """Output of `OneShotScheduler.step`: `prev_sample`, shape `(B, D)`, the prior's own prediction."""

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


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
    ) -> OneShotSchedulerOutput | tuple[torch.Tensor]:
        """Returns `model_output`, shape `(B, D)`; every other argument is accepted and ignored."""
        if not return_dict:
            return (model_output,)
        return OneShotSchedulerOutput(prev_sample=model_output, pred_original_sample=model_output)
