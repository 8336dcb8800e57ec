"""Mean squared error between predicted and real embeddings, alone and with ECLIPSE's contrast against text."""

import torch
from torch import Tensor

from .arguments import check_positive, check_weight
from .contrastive import info_nce
from .dense import unit_rows
from .objective import Objective, ObjectiveOutput, check_ignored, check_pairs, weigh
from .process_group import global_sum

ROWS = ("raw", "unit", "standardized")


def check_rows_option(name: str, rows: str) -> str:
    """Return `rows`, or raise ValueError unless it is one of `ROWS`."""
    if rows not in ROWS:
        raise ValueError(f"{name} must be one of {', '.join(ROWS)}; found {rows!r}")
    return rows


def regression_error(
    prediction: Tensor,
    image: Tensor,
    *,
    rows: str = "raw",
    group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Mean squared error over all entries of `(B, D)` embeddings.

    `rows`: "raw" as they are; "unit" after division by their lengths, summed over D in place of averaged, so that it
    is `2 - 2 cos`; "standardized" divided by the mean coordinate variance of the images, so that predicting their mean
    costs 1 whatever the encoder's scale.
    """
    check_pairs(prediction, image)
    with torch.autocast(device_type=prediction.device.type, enabled=False):
        dtype = torch.promote_types(torch.promote_types(prediction.dtype, image.dtype), torch.float32)
        prediction, image = prediction.to(dtype), image.to(dtype)
        if rows == "unit":
            prediction, image = unit_rows(prediction), unit_rows(image)
        count = global_sum(torch.tensor(float(len(image)), dtype=torch.float64, device=image.device), group)
        error = global_sum((prediction - image).square().sum(), group) / count.to(dtype)
        if rows == "unit":
            return error
        if rows == "standardized":
            real = image.detach()
            mean = global_sum(real.sum(dim=0), group) / count.to(dtype)
            return error / (global_sum((real - mean).square().sum(), group) / count.to(dtype))
        return error / image.shape[1]


class ProjectionLoss(Objective):
    """Mean squared error alone: ECLIPSE's "Projection" baseline. `rows`: see `regression_error`.

    Source: Patel et al., "ECLIPSE", arXiv 2312.04655.
    """

    def __init__(self, *, rows: str = "raw", group: torch.distributed.ProcessGroup | None = None):
        super().__init__(group=group)
        self.rows = check_rows_option("rows", rows)

    def forward(self, prediction: Tensor, image: Tensor, **ignored: Tensor | None) -> ObjectiveOutput:
        check_ignored(ignored)
        return weigh([("mse", 1.0, regression_error(prediction, image, rows=self.rows, group=self.group))])


class EclipseLoss(Objective):
    """ECLIPSE: `MSE(prediction, image) + contrast_weight * InfoNCE(prediction against source_text)`.

    The contrast is one-way and against the *text* embeddings: the prediction picks its caption out of the batch, which
    keeps it near the language it came from. It needs text and image embeddings of one dimension.

    Args:
        contrast_weight: 0.2 as published; 0 gives `ProjectionLoss`.
        temperature: of the contrast.
        rows: of the mean squared error, see `regression_error`.

    Raises:
        ValueError: no `source_text`, or one of another shape than the prediction.

    Source: Patel et al., "ECLIPSE: a resource-efficient text-to-image prior for image generations", CVPR 2024.
    """

    uses_source_text = True

    def __init__(
        self,
        *,
        contrast_weight: float = 0.2,
        temperature: float = 0.07,
        rows: str = "raw",
        block_size: int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(group=group)
        self.contrast_weight = check_weight("contrast_weight", contrast_weight)
        self.temperature = check_positive("temperature", temperature)
        self.rows, self.block_size = check_rows_option("rows", rows), block_size
        self.uses_source_text = self.contrast_weight > 0

    def forward(
        self, prediction: Tensor, image: Tensor, *, source_text: Tensor | None = None, **ignored: Tensor | None
    ) -> ObjectiveOutput:
        check_ignored(ignored)
        parts = [("mse", 1.0, regression_error(prediction, image, rows=self.rows, group=self.group))]
        if self.contrast_weight:
            if source_text is None:
                raise ValueError("eclipse needs source_text, the un-adapted text embeddings; found None")
            check_pairs(prediction, source_text, ("prediction", "source_text"))
            contrast = info_nce(
                prediction,
                source_text,
                temperature=self.temperature,
                two_sided=False,
                normalize=True,
                block_size=self.block_size,
                group=self.group,
            )
            parts.append(("contrast", self.contrast_weight, contrast))
        return weigh(parts)
