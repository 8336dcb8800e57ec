"""Single steps: learning rate, running average, and those whose gradient is not finite."""

import itertools

import pytest
import torch
import training_runs
from safetensors.torch import load_file
from torch import nn

from csdiff.adapters.registry import AutoAdapter
from csdiff.errors import CSDiffError
from csdiff.training import train
from csdiff.training.config import ScheduleConfig
from csdiff.training.optimization import EMA, learning_rate_factor
from csdiff.training.run_folder import Checkpoints
from csdiff.training.task import AlignmentTask


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warms_up_to_the_peak_and_ends_low(name):
    config = ScheduleConfig(name=name, warmup_steps=10, final_ratio=0.1)
    factors = [learning_rate_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[-1] == pytest.approx(1 if name == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_default_warmup():
    for max_steps, warmup in ((2000, 100), (10**6, 500)):
        assert learning_rate_factor(ScheduleConfig(), warmup - 2, max_steps) < 1
        assert learning_rate_factor(ScheduleConfig(), warmup - 1, max_steps) == 1
    assert learning_rate_factor(ScheduleConfig(), 0, 1) == 1


def test_average_is_the_weighted_sum_of_the_past():
    parameter = nn.Parameter(torch.zeros(3))
    ema = EMA({"w": parameter}, decay=0.5)
    expected = torch.zeros(3)
    for step in range(1, 30):
        parameter.data.fill_(float(step))
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.average["w"], expected)


def test_no_decay_follows_the_weights_bit_for_bit():
    parameter = nn.Parameter(torch.randn(100))
    ema = EMA({"w": parameter}, decay=0.0)
    parameter.data += 1
    ema.update(1)
    assert torch.equal(ema.average["w"], parameter)


def poison(monkeypatch, steps):
    """Make the gradient of some steps infinite, as an overflow would."""
    counted = itertools.count()

    def average_gradients(self):
        if next(counted) in steps:
            next(iter(self.parameters.values())).grad.fill_(float("inf"))

    monkeypatch.setattr(AlignmentTask, "average_gradients", average_gradients)


def test_a_step_that_is_not_finite_is_skipped(plain_store, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 7})
    train(training_runs.config(plain_store, tmp_path))
    skipped = training_runs.log(tmp_path, "skipped")
    assert [line["step"] for line in skipped] == [4, 8]
    assert len(training_runs.log(tmp_path, "train")) == 10
    assert "Step 4 skipped: the gradient is not finite" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values())


def test_stops_when_nothing_is_finite_any_more(plain_store, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    made = training_runs.config(plain_store, tmp_path, max_steps=50, max_skipped_steps=4)
    with pytest.raises(CSDiffError, match=r"4 steps in a row were skipped.*last good checkpoint is .*step-00000005"):
        train(made)
    AutoAdapter.from_pretrained(Checkpoints(tmp_path / "checkpoints").named("latest"))
