"""The options that a run gives its objective."""

from types import SimpleNamespace

import pytest

from csdiff.losses import build_objective
from csdiff.training.config import TrainConfig
from csdiff.training.recipe import automatic_weight, objective_options

RAW = SimpleNamespace(text_dim=8, image_dim=8, normalized=False)


def test_the_weight_follows_bandwidth_and_temperature():
    assert automatic_weight((0.5,), 0.25) == pytest.approx(1.0)
    options = objective_options(TrainConfig(objective_options={"temperature": 0.1, "bandwidth": [1.0, 0.2, 0.3]}), RAW)
    assert options["cs_weight"] == pytest.approx(0.9)
    assert objective_options(TrainConfig(objective_options={"cs_weight": 7.0}), RAW)["cs_weight"] == 7.0
    with pytest.raises(ValueError, match="temperature must be a finite number > 0; found 0"):
        objective_options(TrainConfig(objective_options={"temperature": 0}), RAW)


def test_options_fit_the_data_and_the_objective():
    build_objective("cs_aligner", **objective_options(TrainConfig(), RAW))
    build_objective("cs_aligner", **objective_options(TrainConfig(objective_options={"bandwidth": "median"}), RAW))
    other = SimpleNamespace(text_dim=6, image_dim=8, normalized=True)
    assert objective_options(TrainConfig(), RAW)["source_weight"] > 0
    assert objective_options(TrainConfig(), other)["source_weight"] == 0
    unit = SimpleNamespace(text_dim=8, image_dim=8, normalized=True)
    assert objective_options(TrainConfig(), unit)["cs_weight"] < objective_options(TrainConfig(), RAW)["cs_weight"]
    assert objective_options(TrainConfig(objective="eclipse"), RAW) == {}
    assert objective_options(TrainConfig(image_adapter="mlp"), RAW) == {}
