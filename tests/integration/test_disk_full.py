"""A full disk costs the new checkpoint, not the old ones."""

import signal

import pytest
import training_processes as processes

from csdiff.adapters.registry import AutoAdapter
from csdiff.training.run_folder import Checkpoints


def train_with_little_space(made, size, said, checkpoints=1):
    """A run that may write no file larger than `size` bytes once it has so many checkpoints."""
    import resource

    import csdiff.training.run as run
    from csdiff.errors import CSDiffError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, saved = run.Run._save, []

    def limited(self):
        save(self)
        saved.append(self)
        if len(saved) < checkpoints:
            return
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run.Run._save = limited
    try:
        processes.train(made)
    except CSDiffError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))


@pytest.mark.parametrize("size", [2000, 14_000, 17_000])
def test_the_last_checkpoint_is_intact(plain_store, tmp_path, size):
    """The limits break the adapter's weights, then the optimizer's moments, then the weights of the state."""
    # Nothing else grows to the limit meanwhile.
    made = processes.config(plain_store, tmp_path / "out", **{"validation.every": 0, "logging.every": 100})
    said = tmp_path / "said"
    assert processes.finish(processes.start(train_with_little_space, made, size, said)) == [0]
    folder = tmp_path / "out" / "checkpoints"
    message = said.read_text()
    for expected in ("disk is full", "step-00000008 needs about", "MB", f"{folder / 'step-00000004'}, is intact"):
        assert expected in message
    assert {path.name for path in folder.iterdir()} == {"step-00000004", "latest"}
    AutoAdapter.from_pretrained(Checkpoints(folder).named("latest"))
    assert processes.finish(processes.start(processes.train, made)) == [0]
    AutoAdapter.from_pretrained(tmp_path / "out")


def test_no_room_for_the_metrics(plain_store, tmp_path):
    made = processes.config(plain_store, tmp_path / "out", **{"validation.every": 0, "logging.every": 1})
    said = tmp_path / "said"
    assert processes.finish(processes.start(train_with_little_space, made, 100, said)) == [0]
    message = said.read_text()
    for expected in ("disk is full", f"nothing can be added to {tmp_path / 'out'}", "step-00000004, is intact"):
        assert expected in message
    assert processes.finish(processes.start(processes.train, made)) == [0]
    AutoAdapter.from_pretrained(tmp_path / "out")


def test_no_room_for_the_finished_adapter(plain_store, tmp_path):
    made = processes.config(plain_store, tmp_path / "out", **{"validation.every": 0, "logging.every": 100})
    said = tmp_path / "said"
    assert processes.finish(processes.start(train_with_little_space, made, 2000, said, 3)) == [0]
    message = said.read_text()
    for expected in ("disk is full", f"nothing can be added to {tmp_path / 'out'}", "step-00000012, is intact"):
        assert expected in message
    assert not (tmp_path / "out" / "config.json").exists()
    assert processes.finish(processes.start(processes.train, made)) == [0]
    AutoAdapter.from_pretrained(tmp_path / "out")
