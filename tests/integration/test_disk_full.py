"""A full disk costs the new checkpoint, not the old ones."""

import signal

import pytest
import training_processes as processes

from csdiff.adapters.registry import AutoAdapter
from csdiff.training.run_folder import Checkpoints


def train_with_little_space(made, size, said, checkpoints):
    """A run that may write no file larger than `size` bytes once it has so many checkpoints."""
    import resource

    import csdiff.training.run as run
    from csdiff.errors import CSDiffError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    save, saved = run.Run._save, []

    def limited(self):
        save(self)
        saved.append(self)
        if len(saved) >= checkpoints:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    run.Run._save = limited
    try:
        processes.train(made)
    except CSDiffError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        said.write_text(str(error))


ADDED = "nothing can be added to"


@pytest.mark.parametrize(
    ("size", "every", "checkpoints", "what", "intact"),
    [
        # The limits break the adapter's weights, then the optimizer's moments, then the weights of the state.
        (2000, 100, 1, "step-00000008 needs about", 4),
        (14_000, 100, 1, "step-00000008 needs about", 4),
        (17_000, 100, 1, "step-00000008 needs about", 4),
        # The metrics, then the finished adapter.
        (100, 1, 1, ADDED, 4),
        (2000, 100, 3, ADDED, 12),
    ],
)
def test_the_last_checkpoint_is_intact(plain_store, tmp_path, size, every, checkpoints, what, intact):
    # Nothing else grows to the limit meanwhile.
    options = {"validation.every": 0, "logging.every": every}
    made, said = processes.config(plain_store, tmp_path / "out", **options), tmp_path / "said"
    assert processes.finish(processes.start(train_with_little_space, made, size, said, checkpoints)) == [0]
    folder, message = tmp_path / "out" / "checkpoints", said.read_text()
    last = folder / f"step-{intact:08d}"
    for expected in ("disk is full", what, "MB", f"{last}, is intact"):
        assert expected in message
    assert {path.name for path in folder.iterdir()} >= {last.name, "latest"}
    assert not list(folder.glob("*partial*")) + list((tmp_path / "out").glob("config.json"))
    AutoAdapter.from_pretrained(Checkpoints(folder).latest())
    assert processes.finish(processes.start(processes.train, made)) == [0]
    AutoAdapter.from_pretrained(tmp_path / "out")
