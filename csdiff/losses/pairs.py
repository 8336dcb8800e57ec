"""Objectives on pairs: InfoNCE, and alignment with uniformity."""

import math

import torch
from torch import Tensor

from .arguments import check_positive, check_weight
from .cauchy_schwarz import log_mean_kernel
from .contrastive import info_nce
from .dense import unit_rows
from .objective import Objective, ObjectiveOutput, check_ignored, check_pairs, weigh
from .process_group import global_sum
from .temperature import floored_temperature, log_temperature_parameter


class InfoNCELoss(Objective):
    """InfoNCE of the pairs on unit vectors, CLIP's loss; see `info_nce`.

    Args:
        temperature: of the softmax.
        learnable_temperature: make it a parameter, held as its logarithm and never below 0.01, CLIP's bound.
        two_sided: False leaves the direction "text picks its image" alone.
    """

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        learnable_temperature: bool = False,
        two_sided: bool = True,
        block_size: int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(group=group)
        check_positive("temperature", temperature)
        self.log_temperature = log_temperature_parameter(temperature) if learnable_temperature else None
        self._temperature, self.two_sided, self.block_size = float(temperature), two_sided, block_size

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a tensor with gradient when it is learnable."""
        return self._temperature if self.log_temperature is None else floored_temperature(self.log_temperature)

    def forward(self, prediction: Tensor, image: Tensor, **ignored: Tensor | None) -> ObjectiveOutput:
        check_ignored(ignored)
        check_pairs(prediction, image)
        pairs = info_nce(
            prediction,
            image,
            temperature=self.temperature,
            two_sided=self.two_sided,
            normalize=True,
            block_size=self.block_size,
            group=self.group,
        )
        return weigh([("info_nce", 1.0, pairs)])


class UniformAlignLoss(Objective):
    """Alignment and uniformity: `mean_i ||x_i - y_i||^alpha + uniformity_weight (U(x) + U(y)) / 2` on unit vectors.

    `U(x) = log mean_{i != j} exp(-t ||x_i - x_j||^2)`. Source: Wang, Isola, "Understanding contrastive representation
    learning through alignment and uniformity on the hypersphere", 2020.
    """

    def __init__(
        self,
        *,
        alpha: float = 2.0,
        t: float = 2.0,
        uniformity_weight: float = 1.0,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(group=group)
        self.alpha, self.t = check_positive("alpha", alpha), check_positive("t", t)
        self.uniformity_weight = check_weight("uniformity_weight", uniformity_weight)

    def forward(self, prediction: Tensor, image: Tensor, **ignored: Tensor | None) -> ObjectiveOutput:
        check_ignored(ignored)
        check_pairs(prediction, image)
        with torch.autocast(device_type=image.device.type, enabled=False):
            square = (unit_rows(prediction) - unit_rows(image)).square().sum(dim=1)
            # The floor keeps the root's derivative finite where a pair coincides.
            distance = square if self.alpha == 2 else square.clamp_min(1e-12).pow(self.alpha / 2)
            count = global_sum(torch.tensor(float(len(image)), device=image.device), self.group)
            parts = [("align", 1.0, global_sum(distance.sum(), self.group) / count)]
        if self.uniformity_weight:
            options = {
                "bandwidth": 1 / math.sqrt(2 * self.t),
                "diagonal": False,
                "normalize": True,
                "group": self.group,
            }
            uniformity = (log_mean_kernel(prediction, **options) + log_mean_kernel(image, **options)) / 2
            parts.append(("uniform", self.uniformity_weight, uniformity))
        return weigh(parts)
