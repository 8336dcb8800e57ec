"""The CS-Aligner objective: InfoNCE on the pairs plus the Cauchy-Schwarz divergence of the two distributions."""

import torch

from .cauchy_schwarz import cauchy_schwarz_divergence
from .contrastive import info_nce
from .objective import Objective, ObjectiveOutput


class CSAlignerLoss(Objective):
    uses_unpaired = True

    def __init__(self, *, cs_weight: float = 2.0, info_nce_weight: float = 1.0, bandwidth=0.5, temperature: float = 0.07, group=None):
        super().__init__()
        self.cs_weight, self.info_nce_weight = cs_weight, info_nce_weight
        self.bandwidth, self.temperature, self.group = bandwidth, temperature, group

    def forward(self, text, image, *, source_text=None, unpaired_text=None, unpaired_image=None, text_tokens=None,
                image_tokens=None, text_mask=None, image_mask=None):
        nce = info_nce(text, image, temperature=self.temperature, normalize=True)
        x = text if unpaired_text is None else torch.cat([text, unpaired_text])
        y = image if unpaired_image is None else torch.cat([image, unpaired_image])
        cs = cauchy_schwarz_divergence(x, y, bandwidth=self.bandwidth, normalize=True)
        return ObjectiveOutput(self.info_nce_weight * nce + self.cs_weight * cs, {"info_nce": nce.detach(), "cs": cs.detach()})
