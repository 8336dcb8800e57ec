"""Learning rate and running average."""

import itertools

import pytest
import torch
from torch import nn

from csdiff.training.config import ScheduleConfig
from csdiff.training.optimization import EMA, learning_rate_factor


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
