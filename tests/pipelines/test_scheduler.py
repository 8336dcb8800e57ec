"""The scheduler of one-shot priors."""

import inspect

import pytest
import torch
from diffusers import UnCLIPScheduler

from csdiff.pipelines import OneShotScheduler


@pytest.mark.parametrize("steps", [1, 2, 25])
def test_one_timestep_whatever_is_asked_for(steps):
    scheduler = OneShotScheduler()
    scheduler.set_timesteps(steps, device="cpu")
    assert scheduler.timesteps.tolist() == [0]


def test_step_returns_the_model_output():
    scheduler = OneShotScheduler()
    output, sample = torch.randn(2, 3) * 100, torch.randn(2, 3)
    generator = torch.Generator()
    step = scheduler.step(output, timestep=0, sample=sample, generator=generator, prev_timestep=None)
    assert step.prev_sample is output
    assert scheduler.step(output, 0, sample, return_dict=False)[0] is output
    assert scheduler.scale_model_input(sample, 0) is sample


def test_accepts_every_argument_of_the_scheduler_it_replaces():
    assert set(inspect.signature(UnCLIPScheduler.step).parameters) <= set(
        inspect.signature(OneShotScheduler.step).parameters
    )


def test_save_and_reload(tmp_path):
    OneShotScheduler().save_pretrained(tmp_path)
    reloaded = OneShotScheduler.from_pretrained(tmp_path)
    assert reloaded.timesteps.tolist() == [0]
    assert reloaded.init_noise_sigma == 1.0
