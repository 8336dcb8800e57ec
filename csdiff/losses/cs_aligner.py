"""The CS-Aligner objective: InfoNCE on the pairs plus the Cauchy-Schwarz divergence of the two distributions."""

import torch
from torch import Tensor

from .arguments import check_block_size, check_positive, check_weight
from .bandwidth import Bandwidth, check_bandwidth
from .cauchy_schwarz import cauchy_schwarz_divergence
from .contrastive import info_nce
from .objective import Objective, ObjectiveOutput, check_pairs, pool, weigh
from .regression import check_rows_option, regression_error
from .temperature import floored_temperature, log_temperature_parameter
from .tokens import token_cauchy_schwarz_divergence


class CSAlignerLoss(Objective):
    r"""`info_nce_weight * InfoNCE(pairs) + cs_weight * D_CS(all text, all images) + token_weight * mean D_CS(tokens)`.

    InfoNCE pulls the two of a pair together and keeps captions apart, but leaves the two modalities apart as wholes;
    the Cauchy-Schwarz term pulls the two distributions onto each other and needs no pairs, so it also sees the
    unpaired embeddings. All rows are made unit vectors first. A term of weight 0 is not computed; the token term is
    added when tokens are given.

    ```python
    objective = CSAlignerLoss(cs_weight=2.0, bandwidth=0.5)
    output = objective(adapter.embed(text), image)
    output.loss.backward()
    ```

    Args:
        info_nce_weight: weight of InfoNCE on the pairs, >= 0.
        cs_weight: weight of the Cauchy-Schwarz term, >= 0.
        token_weight: weight of the token-level term, >= 0.
        bandwidth: of the Cauchy-Schwarz term on unit vectors: a number, several (mean of the kernels), "median" or
            "silverman" (taken anew from each batch).
        diagonal: whether its within-set means include the pairs `i = j`.
        temperature: of InfoNCE.
        learnable_temperature: make it a parameter, held as its logarithm and never below 0.01, CLIP's bound; add the
            objective's parameters to the optimizer.
        two_sided: False leaves the direction "text picks its image" alone.
        token_bandwidth: of the token term; None takes that of the Cauchy-Schwarz term.
        token_diagonal: of the token term, likewise.
        source_weight: weight of one-way InfoNCE of the adapted text against the un-adapted text `source_text`, as in
            ECLIPSE; needs text and image of one dimension.
        regression_weight: weight of a mean squared error term.
        regression_rows: its rows, see `regression_error`.
        block_size: see `cauchy_schwarz_divergence`.
        group: see `Objective`.

    Raises:
        ValueError: a weight < 0 or none > 0, bad options, a learnable temperature below 0.01, shapes that do not fit,
            one of `text_tokens` and `image_tokens` without the other.

    Source:
        Yin et al., "CS-Aligner", arXiv 2502.17028. The paper does not state weights, bandwidth or temperature.
    """

    uses_unpaired = True
    uses_tokens = True

    def __init__(
        self,
        *,
        info_nce_weight: float = 1.0,
        cs_weight: float = 2.0,
        token_weight: float = 1.0,
        bandwidth: Bandwidth = 0.5,
        diagonal: bool = True,
        temperature: float = 0.07,
        learnable_temperature: bool = False,
        two_sided: bool = True,
        token_bandwidth: Bandwidth | None = None,
        token_diagonal: bool | None = None,
        source_weight: float = 0.0,
        regression_weight: float = 0.0,
        regression_rows: str = "unit",
        block_size: int | None = None,
        group: torch.distributed.ProcessGroup | None = None,
    ):
        super().__init__(group=group)
        self.info_nce_weight = check_weight("info_nce_weight", info_nce_weight)
        self.cs_weight = check_weight("cs_weight", cs_weight)
        self.token_weight = check_weight("token_weight", token_weight)
        self.source_weight = check_weight("source_weight", source_weight)
        self.regression_weight = check_weight("regression_weight", regression_weight)
        if (
            self.info_nce_weight + self.cs_weight + self.token_weight + self.source_weight + self.regression_weight
            == 0
        ):
            raise ValueError("at least one weight must be > 0; found all of them 0")
        check_bandwidth(bandwidth)
        if token_bandwidth is not None:
            check_bandwidth(token_bandwidth)
        check_block_size(block_size)
        self.bandwidth, self.diagonal = bandwidth, diagonal
        self.token_bandwidth = bandwidth if token_bandwidth is None else token_bandwidth
        self.token_diagonal = diagonal if token_diagonal is None else token_diagonal
        self.two_sided, self.block_size = two_sided, block_size
        self.regression_rows = check_rows_option("regression_rows", regression_rows)
        check_positive("temperature", temperature)
        self.log_temperature = log_temperature_parameter(temperature) if learnable_temperature else None
        self._temperature = float(temperature)
        self.uses_unpaired = self.cs_weight > 0
        self.uses_tokens = self.token_weight > 0
        self.uses_source_text = self.source_weight > 0

    @property
    def temperature(self) -> float | Tensor:
        """The temperature in use: a number, or a tensor with gradient when it is learnable."""
        if self.log_temperature is None:
            return self._temperature
        return floored_temperature(self.log_temperature)

    def forward(
        self,
        text: Tensor,
        image: Tensor,
        *,
        source_text: Tensor | None = None,
        unpaired_text: Tensor | None = None,
        unpaired_image: Tensor | None = None,
        text_tokens: Tensor | None = None,
        image_tokens: Tensor | None = None,
        text_mask: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> ObjectiveOutput:
        """The loss of adapted text embeddings `text` (B, D) and image embeddings `image` (B, D); see `Objective`."""
        check_pairs(text, image, ("text", "image"))
        shared = {"block_size": self.block_size, "group": self.group}
        parts = []
        if self.info_nce_weight:
            pairs = info_nce(
                text, image, temperature=self.temperature, two_sided=self.two_sided, normalize=True, **shared
            )
            parts.append(("info_nce", self.info_nce_weight, pairs))
        if self.cs_weight:
            all_text = pool(text, unpaired_text, "unpaired_text")
            all_image = pool(image, unpaired_image, "unpaired_image")
            divergence = cauchy_schwarz_divergence(
                all_text, all_image, bandwidth=self.bandwidth, diagonal=self.diagonal, normalize=True, **shared
            )
            parts.append(("cs", self.cs_weight, divergence))
        if self.token_weight and (text_tokens is not None or image_tokens is not None):
            if text_tokens is None or image_tokens is None:
                missing = "text_tokens" if text_tokens is None else "image_tokens"
                raise ValueError(f"text_tokens and image_tokens must be given together; found no {missing}")
            tokens = token_cauchy_schwarz_divergence(
                text_tokens,
                image_tokens,
                text_mask,
                image_mask,
                bandwidth=self.token_bandwidth,
                diagonal=self.token_diagonal,
                normalize=True,
                group=self.group,
            )
            parts.append(("tokens", self.token_weight, tokens))
        if self.source_weight:
            if source_text is None:
                raise ValueError("source_weight > 0 needs source_text, the un-adapted text embeddings; found None")
            check_pairs(text, source_text, ("text", "source_text"))
            source = info_nce(
                text, source_text, temperature=self.temperature, two_sided=False, normalize=True, **shared
            )
            parts.append(("source", self.source_weight, source))
        if self.regression_weight:
            error = regression_error(text, image, rows=self.regression_rows, group=self.group)
            parts.append(("regression", self.regression_weight, error))
        if not parts:
            raise ValueError("only token_weight is > 0, but no tokens were given")
        return weigh(parts)
