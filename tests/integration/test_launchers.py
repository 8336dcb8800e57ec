"""The same configuration gives the same bits, whatever starts it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny import make_plain_store


def test_three_ways_to_start(root: Path, tmp_path: Path):
    """Batches large enough for sums to be split among threads; each launcher has its own idea of their number."""
    make_plain_store(tmp_path / "store", n=2200, text_dim=64, image_dim=64)
    shutil.copy(root / "train_adapter.py", tmp_path)
    programs = Path(sys.executable).parent
    launch = [str(programs / "accelerate"), "launch", "--cpu", "--num_processes", "2"]
    ways = {
        "script": ([sys.executable], {"OMP_NUM_THREADS": ""}),
        "command": ([str(programs / "csdiff"), "train"], {"OMP_NUM_THREADS": "1"}),
        "launcher": (launch, {"OMP_NUM_THREADS": ""}),
    }
    weights, said = set(), {}
    for name, (command, changes) in ways.items():
        script = [] if name == "command" else ["train_adapter.py"]
        options = {
            "output_dir": name,
            "max_steps": 3,
            "batch_size": 1900,
            "adapter_options.num_layers": 1,
            "validation.every": 0,
        }
        options |= {"data.train": "store", "data.validation_fraction": 0.02, "logging.trackers": "none"}
        arguments = [f"--{key}={value}" for key, value in options.items()]
        environment = {k: v for k, v in {**os.environ, "PYTHONPATH": str(root), **changes}.items() if v}
        done = subprocess.run(
            [*command, *script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        weights.add((tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes())
        said[name] = done.stdout + done.stderr
    assert len(weights) == 1
    assert "asked for 2 processes and started 1" in said["launcher"]
    assert "torchrun" in said["launcher"]
    assert "WARNING: the launcher" not in said["script"] + said["command"]
