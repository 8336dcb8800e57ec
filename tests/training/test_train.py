"""A run from data to adapter: its steps, and what it leaves."""

import itertools
import json
import math
import os
import re
import signal

import pytest
import torch
from safetensors.torch import load_file
from tiny import make_plain_store
from torch import nn
from training_runs import config, log

from csdiff.adapters.registry import AutoAdapter, build_adapter
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.losses import build_objective
from csdiff.training import train
from csdiff.training.config import ScheduleConfig, TrainConfig
from csdiff.training.console import Console
from csdiff.training.model import Embedder
from csdiff.training.optimization import EMA, learning_rate_factor
from csdiff.training.run_folder import Checkpoints
from csdiff.training.snapshots import Validator
from csdiff.training.task import AlignmentTask

pytestmark = pytest.mark.filterwarnings("ignore:.*has no csdiff.json")


def test_leaves_a_complete_adapter_folder_and_logs_every_number(plain_store, tmp_path):
    made = config(plain_store, tmp_path, **{"logging.trackers": ["tensorboard"]})
    result = train(made)
    assert result.adapter_dir == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "csdiff.json", "README.md", "diffusion_pytorch_model.safetensors"} <= names
    assert {"training.yaml", "metrics.jsonl", "checkpoints", "online", "logs"} <= names
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    store = EmbeddingStore.open(plain_store)
    text = store.read(range(8))["text_embeds"]
    final = AutoAdapter.from_pretrained(tmp_path)
    last = AutoAdapter.from_pretrained(Checkpoints(tmp_path / "checkpoints").named("latest"))
    assert final.embed(text).shape == (8, 16)
    assert torch.equal(final.embed(text), last.embed(text))
    assert not torch.equal(final.embed(text), AutoAdapter.from_pretrained(tmp_path / "online").embed(text))
    metadata = json.loads((tmp_path / "csdiff.json").read_text())
    assert (metadata["objective"]["name"], metadata["metrics"]) == ("cs_aligner", result.metrics)
    assert metadata["normalized"] is False
    assert metadata["statistics"]["norm_mean"] == pytest.approx(10, rel=0.2)
    steps = log(tmp_path, "train")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "info_nce", "cs", "grad_norm", "learning_rate", "samples_per_second"} <= steps[0].keys()
    validations = log(tmp_path, "validation")
    assert [line["step"] for line in validations] == [5, 10, 12]
    assert validations[-1]["average"] == result.metrics
    assert set(validations[-1]["baselines"]) == {"raw_text", "mean_shift", "ridge"}
    assert validations[-1]["online"] != validations[-1]["average"]


def test_the_closing_table_warns_of_few_rows(capsys):
    rows = {"count": 199, "centroid_gap": 0.5}
    Console(True).table("held out", {"raw_text": rows, "adapter": rows})
    assert {"held out, 199 rows (few: read with care)", "raw text"} <= set(re.split("  +", capsys.readouterr().out))
    Console(True).table("held out", {"adapter": {**rows, "count": 200}})
    assert "few" not in capsys.readouterr().out


def test_learns(tmp_path):
    store = make_plain_store(tmp_path / "store", n=300)
    made = config(store, tmp_path / "out", max_steps=150, batch_size=128, learning_rate=1e-2)
    made.adapter_options["dropout"] = 0.0
    made.validation.every = made.checkpoint.every = 0
    made.ema.decay = 0.9
    metrics = train(made).metrics
    baselines = log(tmp_path / "out", "validation")[-1]["baselines"]
    assert metrics["text_to_image"]["r@1"] > baselines["raw_text"]["text_to_image"]["r@1"] + 0.3
    assert metrics["centroid_gap"] < 0.5 * baselines["raw_text"]["centroid_gap"]
    assert metrics["norm"]["mean_ratio"] == pytest.approx(1, abs=0.05)


def test_the_seed_decides_everything(plain_store, tmp_path):
    runs = {}
    for name, changes in {"one": {}, "again": {"validation.every": 1}, "other": {"seed": 1}}.items():
        train(config(plain_store, tmp_path / name, max_steps=3, **changes))
        runs[name] = (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()
    assert runs["one"] == runs["again"] != runs["other"]


def test_keeps_the_newest_and_the_best(plain_store, tmp_path, capsys):
    made = config(plain_store, tmp_path, **{"checkpoint.every": 1, "checkpoint.keep": 2})
    made.validation.every, made.validation.metric = 1, "cosine.text"
    train(made)
    values = [line["average"]["cosine"]["text"] for line in log(tmp_path, "validation")]
    best = 1 + values.index(max(values))
    assert ("--export best" in capsys.readouterr().out) == (best != 12)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "best", f"step-{best:08d}", "step-00000011", "step-00000012"}
    assert Checkpoints(tmp_path / "checkpoints").named("best").name == f"step-{best:08d}"
    assert Checkpoints(tmp_path / "checkpoints").named("latest").name == "step-00000012"


def test_the_best_checkpoint_is_exported(plain_store, tmp_path, capsys):
    best_first = {"validation.metric": "count", "validation.every": 1, "checkpoint.every": 0, "max_steps": 3}

    def export(which):
        metrics = train(config(plain_store, tmp_path, export=which, **best_first)).metrics
        folders = tmp_path, tmp_path / "online"
        return metrics, [json.loads((folder / "csdiff.json").read_text())["training"]["steps"] for folder in folders]

    last = export("last")
    assert "--export best" not in capsys.readouterr().out  # All steps are equally good.
    best = export("best")
    assert "Nothing is left to train" in capsys.readouterr().out
    for name in ("diffusion_pytorch_model.safetensors", "csdiff.json"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "checkpoints" / "step-00000001" / name).read_bytes()
    assert (last[1], best[1]) == ([3, 3], [1, 1])
    assert last[0] != best[0]
    assert export("last")[0] == last[0]


def test_a_finished_run_is_extended(plain_store, tmp_path):
    train(config(plain_store, tmp_path))
    before = AutoAdapter.from_pretrained(tmp_path).state_dict()
    again = train(config(plain_store, tmp_path))
    assert again.metrics == log(tmp_path, "validation")[-1]["average"]
    assert all(torch.equal(v, before[n]) for n, v in AutoAdapter.from_pretrained(tmp_path).state_dict().items())
    train(config(plain_store, tmp_path, max_steps=15))
    assert [line["step"] for line in log(tmp_path, "train")] == list(range(1, 16))


def test_unit_norm_rows_train_for_retrieval(tmp_path):
    store = make_plain_store(tmp_path / "store", unit_norm=True)
    train(config(store, tmp_path / "out", **{"data.accept_normalized": True}))
    assert json.loads((tmp_path / "out" / "csdiff.json").read_text())["normalized"] is True
    norms = AutoAdapter.from_pretrained(tmp_path / "out").embed(EmbeddingStore.open(store).read([0, 1])["text_embeds"])
    assert norms.norm(dim=1).tolist() == pytest.approx([1, 1], abs=0.02)


def test_other_text_dimensions_start_at_the_ridge_map(tmp_path):
    store = make_plain_store(tmp_path / "store", n=200, text_dim=24)
    made = config(store, tmp_path / "out", max_steps=1, learning_rate=1e-9)
    made.validation.limit = 1000
    metrics = train(made).metrics
    baselines = log(tmp_path / "out", "validation")[-1]["baselines"]
    assert set(baselines) == {"ridge"}
    assert metrics["text_to_image"]["r@1"] == pytest.approx(baselines["ridge"]["text_to_image"]["r@1"], abs=0.15)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_float32_weights(plain_store, tmp_path, precision):
    train(config(plain_store, tmp_path, mixed_precision=precision, micro_batch_size=10))
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(math.isfinite(line["loss"]) for line in log(tmp_path, "train"))


@pytest.mark.slow
def test_compiled_and_checkpointed_runs_agree_with_plain_ones(plain_store, tmp_path):
    losses = {}
    for name in ("plain", "checkpointed", "compiled"):
        made = config(plain_store, tmp_path / name, max_steps=3)
        made.gradient_checkpointing, made.compile = name == "checkpointed", name == "compiled"
        # Compiled dropout draws other random numbers.
        made.adapter_options["dropout"], made.validation.every = 0.0, 0
        train(made)
        losses[name] = [line["loss"] for line in log(tmp_path / name, "train")]
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(plain_store, tmp_path):
    train(config(plain_store, tmp_path, **{"checkpoint.keep": 0}))
    back = config(plain_store, tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000004"))
    back.checkpoint.keep = 0
    train(back)
    assert (tmp_path / "previous-1" / "step-00000012" / "config.json").is_file()
    assert [line["step"] for line in log(tmp_path, "train")] == list(range(1, 13))
    # Another run may start there, too.
    train(config(plain_store, tmp_path / "two", max_steps=14, resume=str(tmp_path)))
    assert [line["step"] for line in log(tmp_path / "two", "train")] == [13, 14]


def test_pictures_of_prompts_at_validation(pooled_store, tiny_decoder, tmp_path):
    made = config(pooled_store, tmp_path, max_steps=2, batch_size=16, **{"logging.trackers": ["tensorboard"]})
    made.validation.every, made.validation.decoder, made.validation.prompts = 0, str(tiny_decoder), ["a", "b"]
    train(made)
    assert len(list((tmp_path / "pictures" / "step-00000002").glob("*.png"))) == 2
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_a_signal_ends_a_validation_which_is_made_up_for(plain_store, tmp_path, monkeypatch):
    undisturbed, run = tmp_path / "undisturbed", tmp_path / "run"
    train(config(plain_store, undisturbed))
    original = Validator.measure

    def measure(self, *arguments):
        if not (run / "checkpoints").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, *arguments)

    monkeypatch.setattr(Validator, "measure", measure)
    made = config(plain_store, run, **{"checkpoint.every": 0})
    with pytest.raises(SystemExit) as caught:
        train(made)
    assert caught.value.code == 128 + signal.SIGTERM
    assert Checkpoints(run / "checkpoints").named("latest").name == "step-00000005"
    assert not log(run, "validation")
    train(made)
    there, here = (log(path, "validation") for path in (undisturbed, run))
    assert here == there
    name = "diffusion_pytorch_model.safetensors"
    assert (run / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_warms_up_to_the_peak_and_ends_low(name):
    config = ScheduleConfig(name=name, warmup_steps=10, final_ratio=0.1)
    factors = [learning_rate_factor(config, step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1
    assert factors[-1] == pytest.approx(1 if name == "constant" else 0.1)
    assert all(later <= earlier for earlier, later in itertools.pairwise(factors[10:]))


def test_default_warmup():
    for max_steps, warmup in ((2000, 100), (10**6, 500)):
        assert learning_rate_factor(ScheduleConfig(), warmup - 2, max_steps) < 1
        assert learning_rate_factor(ScheduleConfig(), warmup - 1, max_steps) == 1
    assert learning_rate_factor(ScheduleConfig(), 0, 1) == 1


@pytest.mark.parametrize("most", [0.0, 0.5])
def test_average_is_the_weighted_sum_of_the_past(most):
    parameter = nn.Parameter(torch.zeros(100))
    ema, expected = EMA({"w": parameter}, decay=most), torch.zeros(100)
    for step in range(1, 12):
        parameter.data.normal_()
        ema.update(step)
        decay = min(most, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(ema.average["w"], expected)
    # Without decay bit for bit.
    assert torch.equal(ema.average["w"], parameter) == (most == 0)


def poison(monkeypatch, steps):
    """Make the gradient of some steps infinite, as an overflow would."""
    counted = itertools.count()

    def average_gradients(self):
        if next(counted) in steps:
            next(iter(self.parameters.values())).grad.fill_(float("inf"))

    monkeypatch.setattr(AlignmentTask, "average_gradients", average_gradients)


def test_a_step_that_is_not_finite_is_skipped(plain_store, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 7})
    train(config(plain_store, tmp_path))
    skipped = log(tmp_path, "skipped")
    assert [line["step"] for line in skipped] == [4, 8]
    assert len(log(tmp_path, "train")) == 10
    assert "Step 4 skipped: the gradient is not finite" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values())


def test_a_first_batch_that_is_not_finite_is_skipped_in_float16_too():
    embedder, options = Embedder(build_adapter("mlp", embedding_dim=8)), TrainConfig(mixed_precision="fp16")
    task = AlignmentTask(embedder, build_objective("mse"), options)
    good = {"text_embeds": torch.ones(4, 8), "image_embeds": torch.zeros(4, 8)}
    assert task.step({"pairs": {**good, "image_embeds": torch.full((4, 8), torch.nan)}})[1] is not None
    assert task.step({"pairs": good})[1] is None
    assert (task.progress.step, task.progress.skipped) == (2, 1)


def test_stops_when_nothing_is_finite_any_more(plain_store, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    made = config(plain_store, tmp_path, max_steps=50, max_skipped_steps=4)
    with pytest.raises(CSDiffError, match=r"4 steps in a row were skipped.*last good checkpoint is .*step-00000005"):
        train(made)
    AutoAdapter.from_pretrained(Checkpoints(tmp_path / "checkpoints").named("latest"))
