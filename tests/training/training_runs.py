"""Small runs for the tests of training."""

import json

from csdiff.training.config import TrainConfig

SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}
"""Options of a transformer."""


def config(store, output, **changes) -> TrainConfig:
    """A run of a dozen steps with dropout on a store of 64 pairs; dotted names as on the command line."""
    made = TrainConfig(output_dir=str(output), max_steps=12, batch_size=24, learning_rate=3e-3, threads=1)
    made.data.train = str(store)
    made.adapter_options = {"width": 16, "num_layers": 1, "dropout": 0.2}
    made.checkpoint.every, made.validation.every, made.logging.every = 4, 5, 1
    made.logging.progress = False
    made.logging.trackers = []
    for name, value in changes.items():
        *sections, option = name.split(".")
        target = made
        for section in sections:
            target = getattr(target, section)
        assert hasattr(target, option), name
        setattr(target, option, value)
    return made


def log(output, kind: str) -> list[dict]:
    """Lines of one kind of `metrics.jsonl`."""
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]
