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
# Pictures a dimension from which raw rows take the plain objective.
MANY = 4


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

    On raw rows with :data:`MANY` pictures a dimension or more, and with an image-side adapter, where retrieval is
    wanted both ways, the objective's own defaults hold.

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
    plain = config.image_adapter is not None or (not normalized and pictures >= MANY * image_dim)
    if config.objective != CS_ALIGNER or plain:
        return dict(given)
    temperature = check_positive("temperature", given.get("temperature", TEMPERATURE))
    bandwidth = given.get("bandwidth", list(BANDWIDTHS))
    check_bandwidth(bandwidth)
    widths = BANDWIDTHS if isinstance(bandwidth, str) else as_widths(bandwidth)
    share = UNIT_NORM_SHARE if normalized else RAW_SHARE
    return {
        "temperature": temperature,
        "two_sided": False,
        "bandwidth": bandwidth,
        "diagonal": False,
        "cs_weight": share * automatic_weight(widths, temperature),
        "token_diagonal": True,
        "source_weight": 2.0 if text_dim == image_dim else 0.0,
        **given,
    }
