"""What a run takes where the configuration leaves an objective's options open: the defaults that the study found."""

from typing import Any

from csdiff.training.config import TrainConfig

CS_ALIGNER = "cs_aligner"
TEMPERATURE = 0.03
BANDWIDTHS = (0.35, 0.5, 1.0)
# Pairs a dimension from which raw rows take the plain objective.
MANY = 4


def automatic_weight(bandwidths: tuple[float, ...] = BANDWIDTHS, temperature: float = TEMPERATURE) -> float:
    """Weight of the Cauchy-Schwarz divergence, `s^2 / t`, for the middle bandwidth `s` and InfoNCE's temperature `t`.

    On unit vectors InfoNCE pushes apart with `1 / t` times a softmax average and the divergence with `1 / s^2` times a
    kernel average: at this weight the two are equally strong.

    Raises:
        ValueError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be a finite number > 0; found {temperature}")
    return sorted(bandwidths)[len(bandwidths) // 2] ** 2 / temperature


def objective_options(config: TrainConfig, store: Any) -> dict[str, Any]:
    """Options of the run's objective: those given, and for `cs_aligner` the study's for the rest.

    - InfoNCE in one direction, a caption picks its picture, at a low temperature: that is the retrieval wanted.
    - Bandwidths from shapes to means, without diagonals; a quarter of :func:`automatic_weight` on unit-norm rows,
      which are of no use to decoders, so that retrieval counts more, and three quarters on raw rows.
    - A contrast against the un-adapted captions, which keeps few pairs from being learned by heart; where text and
      image embeddings have one width.

    On raw rows with :data:`MANY` pairs a dimension or more, and with an image-side adapter, where retrieval is wanted
    both ways, the objective's own defaults hold.

    Args:
        config: The run.
        store: The training pairs, with their number, `text_dim`, `image_dim` and `normalized`.
    """
    given = config.objective_options
    if config.objective != CS_ALIGNER or config.image_adapter is not None:
        return dict(given)
    if not store.normalized and len(store) >= MANY * store.image_dim:
        return dict(given)
    temperature, bandwidth = given.get("temperature", TEMPERATURE), given.get("bandwidth", list(BANDWIDTHS))
    widths = BANDWIDTHS
    if not isinstance(bandwidth, str):
        widths = tuple(bandwidth) if isinstance(bandwidth, (list, tuple)) else (bandwidth,)
    return {
        "temperature": temperature,
        "two_sided": False,
        "bandwidth": bandwidth,
        "diagonal": False,
        "cs_weight": automatic_weight(widths, temperature) * (0.25 if store.normalized else 0.75),
        "token_diagonal": True,
        "source_weight": 2.0 if store.text_dim == store.image_dim else 0.0,
        **given,
    }
