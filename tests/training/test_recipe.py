"""The options that a run gives its objective."""

import json

import pytest
import training_runs
from tiny import make_plain_store

from csdiff.losses import build_objective
from csdiff.training import train
from csdiff.training.config import TrainConfig
from csdiff.training.recipe import RAW_SHARE, UNIT_NORM_SHARE, automatic_weight, objective_options


def options(given=None, *, pictures=31, text_dim=8, image_dim=8, normalized=True, **changes):
    config = TrainConfig(objective_options=given or {}, **changes)
    facts = {"pictures": pictures, "text_dim": text_dim, "image_dim": image_dim, "normalized": normalized}
    return objective_options(config, **facts)


def test_the_weight_follows_bandwidth_and_temperature():
    assert automatic_weight((0.5,), 0.25) == pytest.approx(1.0)
    found = options({"temperature": 0.1, "bandwidth": [1.0, 0.2, 0.3]})
    assert found["cs_weight"] == pytest.approx(0.9 * UNIT_NORM_SHARE)
    assert options({"cs_weight": 7.0})["cs_weight"] == 7.0


@pytest.mark.parametrize(
    ("given", "said"),
    [({"temperature": 0}, "temperature"), ({"bandwidth": []}, "bandwidth"), ({"bandwidth": -1.0}, "bandwidth")],
)
def test_bad_options_name_the_option(given, said):
    with pytest.raises(ValueError, match=said):
        options(given)


def test_options_fit_the_data_and_the_objective():
    build_objective("cs_aligner", **options())
    build_objective("cs_aligner", **options({"bandwidth": "median"}))
    assert options()["source_weight"] > 0
    assert options(text_dim=6)["source_weight"] == 0
    assert options(normalized=False)["cs_weight"] / RAW_SHARE == pytest.approx(
        options()["cs_weight"] / UNIT_NORM_SHARE
    )
    many = options(normalized=False, pictures=32)
    build_objective("cs_aligner", **many)
    assert many["regression_weight"] > 0
    assert many["cs_weight"] == pytest.approx(8.0)
    assert options({"regression_weight": 0.0}, normalized=False, pictures=32)["regression_weight"] == 0
    assert "regression_weight" not in options(normalized=False, pictures=31)
    assert options(objective="eclipse") == {}
    assert options(image_adapter="mlp") == {}


@pytest.mark.filterwarnings("ignore:.*has no csdiff.json")
@pytest.mark.parametrize(("rows", "many"), [(72, False), (88, True)])
def test_a_run_counts_what_it_trains_on(tmp_path, rows, many):
    """Sixteen dimensions: 64 pictures are many. An eighth is held out, and does not count."""
    store = make_plain_store(tmp_path / "store", n=rows, text_dim=16, image_dim=16)
    config = training_runs.config(store, tmp_path / "run", max_steps=1, **{"data.validation_fraction": 0.125})
    train(config)
    written = json.loads((tmp_path / "run/csdiff.json").read_text())
    assert written["data"]["rows"] == rows * 7 // 8
    used = written["objective"]["options"]
    assert used == options(pictures=rows * 7 // 8, text_dim=16, image_dim=16, normalized=False)
    assert ("regression_weight" in used) is many
