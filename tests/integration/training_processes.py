"""Training in processes of their own, so that they can be killed and can form a group.

A fork server imports the heavy libraries once; every run is a fresh fork of it.
"""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

from training_runs import config, log

from csdiff.errors import CSDiffError
from csdiff.training.run_folder import Checkpoints

__all__ = ["config", "everything", "finish", "group", "start", "traces", "train", "train_and_die"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["csdiff.training.train", "tensorboard", "torch.utils.tensorboard", __name__])


def start(target, *arguments, environment=None, said=None, cwd=None):
    """Start `target(*arguments)` in a process of its own, in the folder `cwd`; its output goes to the file `said`."""
    process = CONTEXT.Process(target=_child, args=(target, arguments, environment or {}, said, cwd))
    process.start()
    return process


def finish(*processes, timeout=120):
    """Exit codes of processes; a negative one is the signal that ended it."""
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError("a training process hangs")
    return [process.exitcode for process in processes]


def group(target, *arguments, size=2, said=None):
    """Run `target(*arguments)` in `size` processes that can find each other; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return finish(*(start(target, *arguments, environment=environment, said=said) for environment in ranks))


def _child(target, arguments, environment, said, cwd):
    os.environ.update(environment)
    if cwd is not None:
        os.chdir(cwd)
    if said is not None:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    try:
        target(*arguments)
    except CSDiffError as error:
        print(error, flush=True)
        raise SystemExit(2) from None


def train(made):
    """The whole run."""
    from csdiff.training import train

    train(made)


def train_and_die(made, where, count=1, rank="0"):
    """A run of which one process is killed by SIGKILL when it comes to a place for the `count`-th time."""
    import csdiff.files as files
    import csdiff.training.run as run
    import csdiff.training.run_folder as run_folder
    import csdiff.training.task as task

    # A function, and which of its calls count; the process dies before such a call, or after it.
    after = {
        "after a step": (task.AlignmentTask, "step", lambda *given: True),
        "while a checkpoint is written": (task, "save_file", lambda tensors, path: path.name.startswith("weights")),
    }
    before = {
        "before a checkpoint is renamed": (Path, "rename", lambda path, target: target.name.startswith("step-")),
        "before it is named": (run_folder, "write_text", lambda path, text: path.name == "latest"),
        "after the last checkpoint": (run.Run, "finish", lambda *given: True),
        "while the finished adapter is written": (files, "_replace_entries", lambda *given: True),
    }
    owner, name, counts = (before | after)[where]
    original, calls = getattr(owner, name), 0

    def deadly(*given):
        nonlocal calls
        calls += counts(*given)
        due = counts(*given) and calls == count and os.environ.get("RANK", "0") == rank
        result = None if due and where in before else original(*given)
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)
    train(made)


def everything(output: Path) -> dict[str, bytes]:
    """The weights, moments and averages that a run ended with, byte for byte."""
    last = Checkpoints(output / "checkpoints").latest()
    files = [output / "diffusion_pytorch_model.safetensors", *sorted((last / "state").glob("*.safetensors"))]
    return {file.name: file.read_bytes() for file in files}


def traces(output: Path) -> None:
    """What no run may leave, however often it was killed and started again."""
    assert not list(output.rglob("*partial*"))
    assert not list(output.glob("previous-*"))
    for kind, steps in {"train": list(range(1, 13)), "validation": [5, 10, 12]}.items():
        assert [line["step"] for line in log(output, kind)] == steps
