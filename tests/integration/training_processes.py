"""Training in processes of their own, so that they can be killed and can form a group.

A fork server imports the heavy libraries once; every run is a fresh fork of it.
"""

import multiprocessing
import os
import signal
import socket
from pathlib import Path

import torch
from training_runs import config

__all__ = ["config", "everything", "finish", "group", "start", "train", "train_and_die"]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["csdiff.training.train", "tensorboard", "torch.utils.tensorboard", __name__])


def start(target, *arguments, environment=None, said=None):
    """Start `target(*arguments)` in a process of its own; what it prints goes to the file `said`."""
    process = CONTEXT.Process(target=_child, args=(target, arguments, environment or {}, said))
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


def group(target, *arguments, size=2):
    """Run `target(*arguments)` in `size` processes that can find each other; returns their exit codes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
    return finish(*(start(target, *arguments, environment=environment) for environment in ranks))


def _child(target, arguments, environment, said):
    os.environ.update(environment)
    if said is not None:
        file = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
    torch.set_num_threads(1)
    target(*arguments)


def train(made):
    """The whole run."""
    from csdiff.training import train

    train(made)


def train_and_die(made, where, count):
    """A run that is killed by SIGKILL when it comes to a place for the `count`-th time."""
    import csdiff.training.checkpoint as checkpoint
    import csdiff.training.loop as loop
    import csdiff.training.run as run

    owner, name = {
        "after a step": (loop.Loop, "step"),
        "while a checkpoint is written": (run, "save_state"),
        "before a checkpoint is renamed": (checkpoint, "sync_folder"),
        "before the link to it is moved": (checkpoint.Checkpoints, "_link"),
        "while the finished adapter is written": (run.Run, "finish"),
    }[where]
    original = getattr(owner, name)
    calls = 0

    def deadly(*args, **options):
        nonlocal calls
        calls += 1
        if calls == count and where != "after a step":
            if where == "while a checkpoint is written":
                (args[0] / "state").mkdir()
                (args[0] / "state/weights.safetensors").write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **options)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, deadly)
    train(made)


def everything(output: Path) -> dict[str, bytes]:
    """The weights, moments and averages that a run ended with, byte for byte."""
    last = output / "checkpoints" / "latest"
    files = [output / "diffusion_pytorch_model.safetensors", *sorted((last / "state").glob("*.safetensors"))]
    return {file.name: file.read_bytes() for file in files}
