"""Real processes on gloo: the objective is that of the whole batch, and whatever starts a run gives the same bits."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import training_processes as processes
from safetensors.torch import load_file, save_file
from tiny import make_plain_store
from training_runs import SMALL, log

from csdiff.embeddings import write_store


def gradients_of_a_batch(store, output, micro, changes):
    """The gradient of the first global batch, after whatever averaging there is; written by the main process."""
    from accelerate import Accelerator

    from csdiff.training.data import open_data
    from csdiff.training.inputs import open_inputs
    from csdiff.training.model import build_embedder, make_objective
    from csdiff.training.task import AlignmentTask

    accelerator = Accelerator(cpu=True)
    made = processes.config(store, output, batch_size=25, micro_batch_size=micro, **changes)
    made.adapter_options["dropout"] = 0.0
    data = open_data(made)
    inputs = open_inputs(made, data, accelerator.device)
    size = accelerator.num_processes
    group = torch.distributed.group.WORLD if size > 1 else None
    task = AlignmentTask(build_embedder(made, data, inputs), make_objective(made, group).train(), made, group)
    batch = next(inputs.feed(data.groups, data.batch_sizes, 0, (accelerator.process_index, size, 0)))
    output_of = task.backward(batch, micro)
    task.average_gradients()
    found = {name: p.grad for name, p in task.parameters.items()} | {"loss": output_of.loss.detach().reshape(1)}
    if accelerator.is_main_process:
        save_file({"processes": torch.tensor([size]), **found}, output / f"{size}-{micro}.safetensors")


@pytest.fixture(scope="module")
def token_store(tiny_clip, tmp_path_factory):
    """Pairs with token states of both sides, of captions of one to nine tokens."""
    path, draw = tmp_path_factory.mktemp("tokens") / "store", torch.Generator().manual_seed(0)
    write_store(
        path,
        text_embeds=torch.randn(64, 16, generator=draw),
        image_embeds=torch.randn(64, 16, generator=draw),
        text_states=torch.randn(64, 9, 32, generator=draw),
        text_mask=torch.arange(9) < torch.randint(1, 10, (64, 1), generator=draw),
        image_tokens=torch.randn(64, 5, 32, generator=draw),
        fingerprint={f"{side}_encoder": {"id": str(tiny_clip)} for side in ("text", "image")},
    )
    return path


WITH_TOKENS = {
    "adapter": "transformer",
    "adapter_options": SMALL,
    "objective_options": {"token_weight": 0.5, "token_bandwidth": "median"},
}


@pytest.mark.parametrize(
    ("store", "micro", "changes"), [("plain_store", None, {}), ("plain_store", 4, {}), ("token_store", 4, WITH_TOKENS)]
)
def test_the_gradient_is_that_of_one_process(request, tmp_path, store, micro, changes):
    """25 rows: the two processes have 12 and 13."""
    store = request.getfixturevalue(store)
    assert processes.finish(processes.start(gradients_of_a_batch, store, tmp_path, None, changes)) == [0]
    assert processes.group(gradients_of_a_batch, store, tmp_path, micro, changes) == [0, 0]
    one = load_file(tmp_path / "1-None.safetensors")
    two = load_file(tmp_path / f"2-{micro}.safetensors")
    assert (one.pop("processes").item(), two.pop("processes").item()) == (1, 2)
    assert one.keys() == two.keys()
    scale = max(value.abs().max() for name, value in one.items() if name != "loss")
    for name, value in one.items():
        assert (value - two[name]).abs().max() <= 1e-6 * (value.abs().max() if name == "loss" else scale), name


def test_a_run_continues_on_another_process_count(plain_store, tmp_path):
    """Without dropout the process count changes rounding only: all three runs see one sample order."""
    losses = {}
    for name, counts in {"one": (1, 1), "two": (2, 2), "changing": (2, 1)}.items():
        for count, steps in zip(counts, (6, 12), strict=True):
            made = processes.config(plain_store, tmp_path / name, max_steps=steps, **{"schedule.name": "constant"})
            made.schedule.warmup_steps = 2
            made.adapter_options["dropout"] = 0.0
            assert processes.group(processes.train, made, size=count) == [0] * count
        losses[name] = torch.tensor([line["loss"] for line in log(tmp_path / name, "train")])
        assert len(losses[name]) == 12
    torch.testing.assert_close(losses["two"], losses["one"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["changing"], losses["one"], rtol=1e-4, atol=1e-5)


def test_killed_and_resumed_with_two_processes(plain_store, tmp_path):
    """The process that is left says in a sentence that its peer is gone."""
    made = processes.config(plain_store, tmp_path / "undisturbed")
    assert processes.group(processes.train, made) == [0, 0]
    made, said = processes.config(plain_store, tmp_path / "killed"), tmp_path / "said"
    codes = processes.group(processes.train_and_die, made, "after a step", 7, "1", said=said)
    assert codes == [2, -signal.SIGKILL]
    assert "Another process of this run has died" in said.read_text()
    assert processes.group(processes.train, made) == [0, 0]
    assert processes.everything(tmp_path / "killed") == processes.everything(tmp_path / "undisturbed")
    processes.traces(tmp_path / "killed")


def test_three_ways_to_start(root, tmp_path):
    """Batches large enough for sums to be split among threads; each launcher has its own idea of their number."""
    make_plain_store(tmp_path / "store", n=2200, text_dim=64, image_dim=64)
    shutil.copy(root / "train_adapter.py", tmp_path)
    programs = Path(sys.executable).parent
    launch = [programs / "accelerate", "launch", "--cpu", "--num_processes", "2", "train_adapter.py"]
    ways = {
        "script": ([sys.executable, "train_adapter.py"], None),
        "command": ([programs / "csdiff", "train"], "1"),
        "launcher": (launch, None),
    }
    options = {"max_steps": 3, "batch_size": 1900, "adapter_options.num_layers": 1, "validation.every": 0}
    options |= {"data.train": "store", "data.validation_fraction": 0.02, "logging.trackers": "none"}
    weights, said = set(), {}
    for name, (command, threads) in ways.items():
        arguments = [f"--{key}={value}" for key, value in {**options, "output_dir": name}.items()]
        environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": threads}
        environment = {key: value for key, value in environment.items() if value}
        done = subprocess.run(
            [*command, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        weights.add((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
        said[name] = done.stdout + done.stderr
    assert len(weights) == 1
    assert "asked for 2 processes and started 1" in said["launcher"]
    assert "torchrun" in said["launcher"]
    assert "WARNING: the launcher" not in said["script"] + said["command"]
