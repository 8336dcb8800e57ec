"""The options that a run gives its objective."""

from types import SimpleNamespace

import pytest

from csdiff.losses import build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.recipe import automatic_weight, objective_options

UNIT = SimpleNamespace(text_dim=8, image_dim=8, normalized=True)


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
    other = SimpleNamespace(text_dim=6, image_dim=8, normalized=True)
    raw = SimpleNamespace(text_dim=8, image_dim=8, normalized=False)
    assert objective_options(TrainConfig(), UNIT)["source_weight"] > 0
    assert objective_options(TrainConfig(), other)["source_weight"] == 0
    assert objective_options(TrainConfig(), raw) == {}
    assert objective_options(TrainConfig(objective="eclipse"), UNIT) == {}
    assert objective_options(TrainConfig(image_adapter="mlp"), UNIT) == {}
