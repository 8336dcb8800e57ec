"""Training in processes of their own, so that they can be killed and can form a group.

A fork server imports the heavy libraries once; every run is a fresh fork of it.
"""

import json
import multiprocessing
import os
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

from training_runs import config

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

    owner, name = {
        "after a step": (task.AlignmentTask, "step"),
        "while a checkpoint is written": (task.AlignmentTask, "save"),
        "before a checkpoint is renamed": (run_folder, "writing_folder"),
        "before it is named": (run_folder, "write_text"),
        "after the last checkpoint": (run.Run, "finish"),
        "while the finished adapter is written": (files, "_replace_entries"),
    }[where]
    original = getattr(owner, name)
    calls = 0

    def due():
        nonlocal calls
        calls += 1
        return calls == count and os.environ.get("RANK", "0") == rank

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def deadly(*args, **options):
        if where == "before it is named" and args[0].name != "latest":
            return original(*args, **options)
        now = due()
        if now and where == "while a checkpoint is written":
            (args[1] / "state").mkdir()
            (args[1] / "state/weights.safetensors").write_bytes(b"half of it")
        if now and where != "after a step":
            die()
        result = original(*args, **options)
        if now:
            die()
        return result

    @contextmanager
    def deadly_folder(*args, **options):
        with original(*args, **options) as aside:
            yield aside
            if due():
                die()

    setattr(owner, name, deadly_folder if name == "writing_folder" else deadly)
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
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    for kind, steps in {"train": list(range(1, 13)), "validation": [5, 10, 12]}.items():
        assert [line["step"] for line in lines if line["kind"] == kind] == steps
