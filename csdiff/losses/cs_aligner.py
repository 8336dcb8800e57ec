"""The CS-Aligner objective: InfoNCE on the pairs plus the Cauchy-Schwarz divergence of the two distributions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from csdiff.losses.objective import Objective, Term
from csdiff.losses.terms import contrast, contrast_with_source, divergence, regression, token_divergence


@dataclass(kw_only=True, eq=False, repr=False)
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
        regression_rows: its rows: "raw", "unit" or "standardized", see `csdiff.losses.terms.regression`.
        block_size: see `cauchy_schwarz_divergence`.
        group: see `Objective`.

    Raises:
        ValueError: a weight < 0 or none > 0, bad options, a learnable temperature below 0.01, shapes that do not fit,
            one of `text_tokens` and `image_tokens` without the other.

    Source:
        Yin et al., "CS-Aligner", arXiv 2502.17028. The paper does not state weights, bandwidth or temperature.
    """

    info_nce_weight: float = 1.0
    cs_weight: float = 2.0
    token_weight: float = 1.0
    bandwidth: float | Sequence[float] | str = 0.5
    diagonal: bool = True
    temperature: float = 0.07
    learnable_temperature: bool = False
    two_sided: bool = True
    token_bandwidth: float | Sequence[float] | str | None = None
    token_diagonal: bool | None = None
    source_weight: float = 0.0
    regression_weight: float = 0.0
    regression_rows: str = "unit"
    block_size: int | None = None

    uses_unpaired: ClassVar[bool] = True

    def terms(self) -> list[Term]:
        temperature, block_size = self.current_temperature(), self.block_size
        token_options = {
            "bandwidth": self.bandwidth if self.token_bandwidth is None else self.token_bandwidth,
            "diagonal": self.diagonal if self.token_diagonal is None else self.token_diagonal,
        }
        return [
            Term(
                "info_nce",
                self.info_nce_weight,
                partial(contrast, temperature=temperature, two_sided=self.two_sided, block_size=block_size),
            ),
            Term(
                "cs",
                self.cs_weight,
                partial(divergence, bandwidth=self.bandwidth, diagonal=self.diagonal, block_size=block_size),
                reads="unpaired",
            ),
            Term("tokens", self.token_weight, partial(token_divergence, **token_options), reads="tokens"),
            Term(
                "source",
                self.source_weight,
                partial(contrast_with_source, temperature=temperature, block_size=block_size),
                reads="source_text",
            ),
            Term("regression", self.regression_weight, partial(regression, rows=self.regression_rows)),
        ]
