"""Steps whose loss or gradient is not finite."""

import itertools

import pytest
import training_runs
from safetensors.torch import load_file

from csdiff.adapters.registry import AutoAdapter
from csdiff.errors import CSDiffError
from csdiff.training import train
from csdiff.training.run_folder import Checkpoints
from csdiff.training.task import AlignmentTask

pytestmark = pytest.mark.filterwarnings("ignore:.*has no csdiff.json")


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
