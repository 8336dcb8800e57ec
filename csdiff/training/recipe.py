"""What a run takes where the configuration leaves an objective's options open: the defaults that the study found."""

from typing import Any

from csdiff.losses.arguments import check_positive
from csdiff.losses.bandwidth import as_widths, check_bandwidth
from csdiff.training.config import TrainConfig
from csdiff.training.sources import Sources

CS_ALIGNER = "cs_aligner"
TEMPERATURE = 0.03
BANDWIDTHS = (0.35, 0.5, 1.0)
# Of `automatic_weight`. Rows without their norms are of no use to decoders, so that retrieval counts more there.
UNIT_NORM_SHARE, RAW_SHARE = 0.25, 0.75
# Pictures a dimension from which raw rows take the recipe of many pairs.
MANY = 4
# That recipe: the divergence weighs eight, sixteen times InfoNCE.
MANY_TEMPERATURE, MANY_INFO_NCE, MANY_SHARE, MANY_SOURCE, MANY_REGRESSION = 0.05, 0.5, 1.6, 0.2, 3.5


def automatic_weight(bandwidths: tuple[float, ...] = BANDWIDTHS, temperature: float = TEMPERATURE) -> float:
    """`s^2 / t`, for the middle bandwidth `s` of the Cauchy-Schwarz divergence and InfoNCE's temperature `t`.

    On unit vectors InfoNCE pushes apart with `1 / t` times a softmax average and the divergence with `1 / s^2` times a
    kernel average: with this weight on the divergence the two are equally strong.
    """
    return sorted(bandwidths)[len(bandwidths) // 2] ** 2 / temperature


def run_options(config: TrainConfig, sources: Sources) -> dict[str, Any]:
    """:func:`objective_options` for the data of a run."""
    store = sources.store
    return objective_options(
        config,
        pictures=sources.train.epoch_rows,
        text_dim=store.text_dim,
        image_dim=store.image_dim,
        normalized=store.normalized,
    )


def objective_options(
    config: TrainConfig, *, pictures: int, text_dim: int, image_dim: int, normalized: bool
) -> dict[str, Any]:
    """Options of the run's objective: those given, and for `cs_aligner` the study's for the rest.

    - InfoNCE in one direction, a caption picks its picture, at a low temperature: that is the retrieval wanted.
    - Bandwidths from shapes to means, without diagonals; a share of :func:`automatic_weight`, a quarter on unit-norm
      rows and three quarters on raw ones.
    - A contrast against the un-adapted captions, which keeps few pairs from being learned by heart; where text and
      image embeddings have one width.

    On raw rows with :data:`MANY` pictures a dimension or more there is enough to learn from to regress as well: the
    squared error of standardized rows leads, InfoNCE and the captions count less, the divergence more.

    With an image-side adapter, where retrieval is wanted both ways, the objective's own defaults hold.

    Args:
        config: The run.
        pictures: To train on; pairs, where the pictures are not known.
        text_dim: Of the text embeddings.
        image_dim: Of the image embeddings.
        normalized: Whether the rows have unit norm.

    Raises:
        ValueError: A temperature or bandwidth that is given and not above 0.
    """
    given = config.objective_options
    if config.objective != CS_ALIGNER or config.image_adapter is not None:
        return dict(given)
    many = not normalized and pictures >= MANY * image_dim
    temperature = check_positive("temperature", given.get("temperature", MANY_TEMPERATURE if many else TEMPERATURE))
    bandwidth = given.get("bandwidth", list(BANDWIDTHS))
    check_bandwidth(bandwidth)
    widths = BANDWIDTHS if isinstance(bandwidth, str) else as_widths(bandwidth)
    share = MANY_SHARE if many else UNIT_NORM_SHARE if normalized else RAW_SHARE
    source_weight = MANY_SOURCE if many else 2.0
    regression = {
        "info_nce_weight": MANY_INFO_NCE,
        "regression_weight": MANY_REGRESSION,
        "regression_rows": "standardized",
    }
    return {
        "temperature": temperature,
        "two_sided": False,
        "bandwidth": bandwidth,
        "diagonal": False,
        "cs_weight": share * automatic_weight(widths, temperature),
        "token_diagonal": True,
        "source_weight": source_weight if text_dim == image_dim else 0.0,
        **(regression if many else {}),
        **given,
    }
