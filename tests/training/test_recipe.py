"""The options that a run gives its objective."""

from dataclasses import dataclass

import pytest

from csdiff.losses import build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.recipe import automatic_weight, objective_options


@dataclass
class Pairs:
    text_dim: int = 8
    image_dim: int = 8
    normalized: bool = True
    count: int = 30

    def __len__(self) -> int:
        return self.count


UNIT = Pairs()


def test_the_weight_follows_bandwidth_and_temperature():
    assert automatic_weight((0.5,), 0.25) == pytest.approx(1.0)
    options = objective_options(
        TrainConfig(objective_options={"temperature": 0.1, "bandwidth": [1.0, 0.2, 0.3]}), UNIT
    )
    assert options["cs_weight"] == pytest.approx(0.9 / 4)
    assert objective_options(TrainConfig(objective_options={"cs_weight": 7.0}), UNIT)["cs_weight"] == 7.0
    with pytest.raises(ValueError, match="temperature must be a finite number > 0; found 0"):
        objective_options(TrainConfig(objective_options={"temperature": 0}), UNIT)


def test_options_fit_the_data_and_the_objective():
    build_objective("cs_aligner", **objective_options(TrainConfig(), UNIT))
    build_objective("cs_aligner", **objective_options(TrainConfig(objective_options={"bandwidth": "median"}), UNIT))
    other = Pairs(text_dim=6)
    raw = Pairs(normalized=False)
    assert objective_options(TrainConfig(), UNIT)["source_weight"] > 0
    assert objective_options(TrainConfig(), other)["source_weight"] == 0
    for_raw = objective_options(TrainConfig(), raw)
    assert for_raw["cs_weight"] == pytest.approx(3 * objective_options(TrainConfig(), UNIT)["cs_weight"])
    assert objective_options(TrainConfig(), Pairs(normalized=False, count=32)) == {}
    assert objective_options(TrainConfig(objective="eclipse"), UNIT) == {}
    assert objective_options(TrainConfig(image_adapter="mlp"), UNIT) == {}
