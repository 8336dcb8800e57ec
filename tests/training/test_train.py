"""A run from data to adapter: what it leaves, in every combination that makes sense."""

import json
import math
import os
import shutil
import signal

import numpy as np
import pytest
import torch
import training_runs
from PIL import Image
from safetensors.torch import load_file
from tiny import make_plain_store

from csdiff.adapters.registry import AutoAdapter
from csdiff.embeddings import load_text_encoder, write_store
from csdiff.embeddings.config import EmbedConfig
from csdiff.embeddings.extraction import embed
from csdiff.embeddings.store import EmbeddingStore
from csdiff.errors import CSDiffError
from csdiff.training import train
from csdiff.training.loop import Loop
from csdiff.training.samples import draw_sheet
from csdiff.training.validation import Validator

pytestmark = pytest.mark.filterwarnings("ignore:.*has no csdiff.json")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of 40 captioned pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    draw = np.random.default_rng(0)
    lines = []
    for index in range(40):
        pixels = np.broadcast_to(draw.integers(0, 255, (2, 2, 3)), (2, 2, 3)).astype(np.uint8)
        Image.fromarray(pixels).resize((32, 32), 0).save(folder / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"thing {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def rich_store(pictures, tiny_clip, tmp_path_factory):
    """The pictures embedded with the tiny CLIP, token states included."""
    output = tmp_path_factory.mktemp("rich") / "store"
    encoders = {"text_encoder": str(tiny_clip), "image_encoder": str(tiny_clip)}
    embed(EmbedConfig(str(pictures), str(output), text_states=True, image_tokens=True, progress=False, **encoders))
    return output


@pytest.fixture(scope="module")
def pooled_store(pictures, tiny_clip, tmp_path_factory):
    """The same without token states."""
    output = tmp_path_factory.mktemp("pooled") / "store"
    encoders = {"text_encoder": str(tiny_clip), "image_encoder": str(tiny_clip)}
    embed(EmbedConfig(str(pictures), str(output), progress=False, **encoders))
    return output


@pytest.fixture(scope="module")
def norm_store(tiny_clip, tmp_path_factory):
    """Six hundred captions and embeddings that follow from them linearly but for noise, token states included."""
    folder = tmp_path_factory.mktemp("norms")
    text = load_text_encoder(str(tiny_clip)).encode([f"thing number {number}" for number in range(600)])
    image = 2 * text.embeds.flip(1) + 0.1 * torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) + 1
    states = {"text_embeds": text.embeds, "text_states": text.states, "text_mask": text.mask}
    captions = [f"thing number {number}" for number in range(600)]
    encoder = {"id": str(tiny_clip)}
    write_store(
        folder / "store", image_embeds=image, captions=captions, fingerprint={"text_encoder": encoder}, **states
    )
    return folder / "store"


def test_leaves_a_complete_adapter_folder(plain_store, tmp_path):
    made = training_runs.config(plain_store, tmp_path, **{"logging.trackers": ["tensorboard"], "logging.curves": True})
    result = train(made)
    assert result.adapter_dir == tmp_path
    names = {path.name for path in tmp_path.iterdir()}
    assert {"config.json", "csdiff.json", "README.md", "diffusion_pytorch_model.safetensors"} <= names
    assert {"training.yaml", "metrics.jsonl", "curves.png", "checkpoints", "online", "logs"} <= names
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    store = EmbeddingStore.open(plain_store)
    text = store.read(range(8))["text_embeds"]
    final = AutoAdapter.from_pretrained(tmp_path)
    last = AutoAdapter.from_pretrained(tmp_path / "checkpoints" / "latest")
    assert final.embed(text).shape == (8, 16)
    assert torch.equal(final.embed(text), last.embed(text))
    assert not torch.equal(final.embed(text), AutoAdapter.from_pretrained(tmp_path / "online").embed(text))
    metadata = json.loads((tmp_path / "csdiff.json").read_text())
    assert metadata["objective"]["name"] == "cs_aligner"
    assert metadata["metrics"] == result.metrics
    assert metadata["normalized"] is False
    assert metadata["statistics"]["norm_mean"] == pytest.approx(10, rel=0.2)


def test_logs_every_number(plain_store, tmp_path):
    result = train(training_runs.config(plain_store, tmp_path))
    steps = training_runs.log(tmp_path, "train")
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert {"loss", "info_nce", "cs", "grad_norm", "learning_rate", "samples_per_second"} <= steps[0].keys()
    validations = training_runs.log(tmp_path, "validation")
    assert [line["step"] for line in validations] == [5, 10, 12]
    assert validations[-1]["average"] == result.metrics
    assert set(validations[-1]["baselines"]) == {"raw_text", "mean_shift", "ridge"}
    assert validations[-1]["online"] != validations[-1]["average"]


def test_learns(tmp_path):
    store = make_plain_store(tmp_path / "store", n=300)
    made = training_runs.config(store, tmp_path / "out", max_steps=150, batch_size=128, learning_rate=1e-2)
    made.adapter_options["dropout"] = 0.0
    made.validation.every = made.checkpoint.every = 0
    made.ema.decay = 0.9
    metrics = train(made).metrics
    baselines = training_runs.log(tmp_path / "out", "validation")[-1]["baselines"]
    assert metrics["text_to_image"]["r@1"] > baselines["raw_text"]["text_to_image"]["r@1"] + 0.3
    assert metrics["centroid_gap"] < 0.5 * baselines["raw_text"]["centroid_gap"]
    assert metrics["norm"]["mean_ratio"] == pytest.approx(1, abs=0.05)


def test_the_seed_decides_everything(plain_store, tmp_path):
    runs = {}
    for name, seed in {"one": 0, "again": 0, "other": 1}.items():
        train(training_runs.config(plain_store, tmp_path / name, max_steps=3, seed=seed))
        runs[name] = (tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes()
    assert runs["one"] == runs["again"] != runs["other"]


def test_keeps_the_newest_and_the_best(plain_store, tmp_path):
    made = training_runs.config(plain_store, tmp_path, **{"checkpoint.every": 1, "checkpoint.keep": 2})
    made.validation.every, made.validation.metric = 1, "cosine.text"
    train(made)
    values = [line["average"]["cosine"]["text"] for line in training_runs.log(tmp_path, "validation")]
    best = 1 + values.index(max(values))
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"latest", "best", f"step-{best:08d}", "step-00000011", "step-00000012"}
    assert (tmp_path / "checkpoints" / "best").resolve().name == f"step-{best:08d}"
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000012"


def test_the_best_checkpoint_is_exported(plain_store, tmp_path):
    best_first = {"validation.metric": "count", "validation.every": 1, "checkpoint.every": 0, "max_steps": 3}
    made = training_runs.config(plain_store, tmp_path, **best_first)
    last = train(made).metrics
    files = "diffusion_pytorch_model.safetensors", "csdiff.json"
    assert json.loads((tmp_path / "csdiff.json").read_text())["training"]["steps"] == 3
    made.export = "best"
    assert train(made).metrics != last
    for name in files:
        assert (tmp_path / name).read_bytes() == (tmp_path / "checkpoints" / "step-00000001" / name).read_bytes()
    assert json.loads((tmp_path / "online" / "csdiff.json").read_text())["training"]["steps"] == 1
    made.export = "last"
    assert train(made).metrics == last


@pytest.mark.parametrize("kind", ["mlp", "linear", "transformer", "lora", "diffusion"])
def test_exported_norms_have_the_mean_and_spread_of_held_out_ones(norm_store, tmp_path, kind):
    made = training_runs.config(norm_store, tmp_path, adapter=kind, max_steps=2, batch_size=16)
    made.adapter_options = {"mlp": made.adapter_options, "linear": {}, "lora": {"rank": 2}}.get(kind, SMALL)
    made.objective = "diffusion" if kind == "diffusion" else "cs_aligner"
    made.data.validation_fraction = 0.5
    norm = train(made).metrics["norm"]
    assert norm["mean_ratio"] == pytest.approx(1, abs=0.01)
    # The norms of a prior after two steps hardly vary, and the map that is fitted has a bounded steepness.
    assert kind == "diffusion" or norm["std_ratio"] == pytest.approx(1, abs=0.05)
    assert json.loads((tmp_path / "csdiff.json").read_text())["training"]["norm_calibration"] == "held-out"


def test_a_finished_run_is_extended(plain_store, tmp_path):
    train(training_runs.config(plain_store, tmp_path))
    before = AutoAdapter.from_pretrained(tmp_path).state_dict()
    again = train(training_runs.config(plain_store, tmp_path))
    assert again.metrics == training_runs.log(tmp_path, "validation")[-1]["average"]
    assert all(torch.equal(v, before[n]) for n, v in AutoAdapter.from_pretrained(tmp_path).state_dict().items())
    train(training_runs.config(plain_store, tmp_path, max_steps=15))
    assert [line["step"] for line in training_runs.log(tmp_path, "train")] == list(range(1, 16))


def test_starts_from_a_checkpoint_of_another_run(plain_store, tmp_path):
    train(training_runs.config(plain_store, tmp_path / "one"))
    resumed = training_runs.config(plain_store, tmp_path / "two", max_steps=14, resume=str(tmp_path / "one"))
    train(resumed)
    assert [line["step"] for line in training_runs.log(tmp_path / "two", "train")] == [13, 14]


def test_unit_norm_rows_train_for_retrieval(tmp_path):
    store = make_plain_store(tmp_path / "store", unit_norm=True)
    train(training_runs.config(store, tmp_path / "out", **{"data.accept_normalized": True}))
    assert json.loads((tmp_path / "out" / "csdiff.json").read_text())["normalized"] is True
    norms = AutoAdapter.from_pretrained(tmp_path / "out").embed(EmbeddingStore.open(store).read([0, 1])["text_embeds"])
    assert norms.norm(dim=1).tolist() == pytest.approx([1, 1], abs=0.02)


def test_other_text_dimensions_start_at_the_ridge_map(tmp_path):
    store = make_plain_store(tmp_path / "store", n=200, text_dim=24)
    made = training_runs.config(store, tmp_path / "out", max_steps=1, learning_rate=1e-9)
    made.validation.limit = 1000
    metrics = train(made).metrics
    baselines = training_runs.log(tmp_path / "out", "validation")[-1]["baselines"]
    assert set(baselines) == {"ridge"}
    assert metrics["text_to_image"]["r@1"] == pytest.approx(baselines["ridge"]["text_to_image"]["r@1"], abs=0.15)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_keeps_float32_weights(plain_store, tmp_path, precision):
    train(training_runs.config(plain_store, tmp_path, mixed_precision=precision, micro_batch_size=10))
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    losses = [line["loss"] for line in training_runs.log(tmp_path, "train")]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.slow
def test_compiled_and_checkpointed_runs_agree_with_plain_ones(plain_store, tmp_path):
    losses = {}
    for name in ("plain", "checkpointed", "compiled"):
        made = training_runs.config(plain_store, tmp_path / name, max_steps=3)
        made.gradient_checkpointing, made.compile = name == "checkpointed", name == "compiled"
        # Compiled dropout draws other random numbers.
        made.adapter_options["dropout"], made.validation.every = 0.0, 0
        train(made)
        losses[name] = [line["loss"] for line in training_runs.log(tmp_path / name, "train")]
    assert losses["checkpointed"] == pytest.approx(losses["plain"], rel=1e-5)
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=1e-5)


COMBINATIONS = {
    "transformer, cached states": ("rich", {"adapter": "transformer"}),
    "transformer, text tower in the loop": ("pooled", {"adapter": "transformer"}),
    "mlp, text tower in the loop": ("pooled", {"data.text": "online"}),
    "linear": ("pooled", {"adapter": "linear"}),
    "lora": ("pooled", {"adapter": "lora"}),
    "diffusion prior": ("rich", {"adapter": "diffusion", "objective": "diffusion"}),
    "tokens cached": ("rich", {"objective_options": {"token_weight": 0.5}}),
    "tokens, both towers in the loop": ("pooled", {"objective_options": {"token_weight": 0.5}, "data.images": "DATA"}),
    "tokens, lora": ("rich", {"adapter": "lora", "objective_options": {"token_weight": 0.5}}),
    "tokens, transformer": ("rich", {"adapter": "transformer", "objective_options": {"token_weight": 0.5}}),
    "tokens, transformer, both towers in the loop": (
        "pooled",
        {"adapter": "transformer", "objective_options": {"token_weight": 0.5}, "data.images": "DATA"},
    ),
    "unpaired": ("pooled", {"data.unpaired_text": "STORE", "data.unpaired_image": "STORE"}),
    "unpaired, lora": ("pooled", {"adapter": "lora", "data.unpaired_text": "STORE"}),
    "image adapter": ("pooled", {"image_adapter": "mlp", "objective": "info_nce"}),
    "learnable temperature": ("pooled", {"objective_options": {"learnable_temperature": True}}),
    "eclipse": ("pooled", {"objective": "eclipse"}),
}
SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_combination(rich_store, pooled_store, pictures, tmp_path, name):
    which, changes = COMBINATIONS[name]
    store = {"rich": rich_store, "pooled": pooled_store}[which]
    known = {"DATA": str(pictures), "STORE": str(store)}
    changes = {key: known.get(value, value) if isinstance(value, str) else value for key, value in changes.items()}
    made = training_runs.config(store, tmp_path, max_steps=3, batch_size=16, micro_batch_size=7, **changes)
    adapter = changes.get("adapter", "mlp")
    made.adapter_options = {"lora": {"rank": 2, "dropout": 0.1}, "linear": {}}.get(adapter, made.adapter_options)
    if adapter in ("transformer", "diffusion"):
        made.adapter_options = SMALL
    result = train(made)
    assert result.metrics["count"] >= 2
    assert ("tokens" in training_runs.log(tmp_path, "train")[-1]) == name.startswith("tokens")
    loaded = AutoAdapter.from_pretrained(tmp_path)
    rows = EmbeddingStore.open(store).read([0, 1])
    states = (rows.get("text_states"), rows.get("text_mask")) if loaded.uses_text_states else (None, None)
    if states[0] is None and loaded.uses_text_states:
        return
    assert loaded.embed(rows["text_embeds"], *states).isfinite().all()
    metadata = json.loads((tmp_path / "csdiff.json").read_text())
    assert metadata["text_encoder"]["dim"] == 16
    assert metadata["image_encoder"]["weights_sha256"]
    assert (tmp_path / "image_adapter" / "config.json").exists() == (name == "image adapter")


def test_a_transformer_with_the_token_term_resumes_to_the_bit(rich_store, tmp_path):
    states = []
    for name, start in (("undisturbed", "auto"), ("resumed", str(tmp_path / "undisturbed/checkpoints/step-00000002"))):
        made = training_runs.config(rich_store, tmp_path / name, adapter="transformer", batch_size=16, max_steps=4)
        made.adapter_options, made.objective_options = {**SMALL, "dropout": 0.2}, {"token_weight": 0.5}
        made.micro_batch_size, made.checkpoint.every, made.checkpoint.keep, made.resume = 7, 2, 0, start
        train(made)
        states.append(load_file(tmp_path / name / "checkpoints/step-00000004/state/weights.safetensors"))
    assert any("proj_to_clip_embeddings" in name for name in states[0])
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    losses = [
        [line["loss"] for line in training_runs.log(tmp_path / name, "train")] for name in ("undisturbed", "resumed")
    ]
    assert losses[0][2:] == losses[1][-2:]


def test_lora_is_saved_and_loaded(pooled_store, tiny_clip, tmp_path):
    made = training_runs.config(pooled_store, tmp_path, adapter="lora", batch_size=16, max_steps=4, learning_rate=1e-2)
    made.adapter_options = {"rank": 2}
    train(made)
    loaded = AutoAdapter.from_pretrained(tmp_path / "online")
    saved = load_file((tmp_path / "checkpoints/latest").resolve() / "state" / "weights.safetensors")
    weights = {name: value for name, value in saved.items() if name.startswith("online.") and "lora_B" in name}
    assert any(value.abs().max() > 0 for value in weights.values())
    parameters = dict(loaded.named_parameters())
    for name, value in weights.items():
        assert torch.equal(value, parameters[name.removeprefix("online.embedder.adapter.")])


def test_a_captioned_dataset_is_embedded_once(pictures, tiny_clip, tmp_path):
    encoders = {"data.text_encoder": str(tiny_clip), "data.image_encoder": str(tiny_clip)}
    train(training_runs.config(pictures, tmp_path, batch_size=16, max_steps=2, **encoders))
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "train").rglob("*.npy")}
    assert shards
    train(training_runs.config(pictures, tmp_path, batch_size=16, max_steps=3, **encoders))
    assert shards == {path: path.stat().st_mtime_ns for path in (tmp_path / "store" / "train").rglob("*.npy")}


def test_another_encoder_than_the_stores_is_refused(pooled_store, tmp_path):
    from tiny import make_tiny_clip

    other = make_tiny_clip(tmp_path / "clip", seed=5)
    for text in ("cached", "online"):
        made = training_runs.config(pooled_store, tmp_path / "out", **{"data.text_encoder": str(other)})
        made.data.text = text
        with pytest.raises(CSDiffError, match="text encoder"):
            train(made)
    assert not (tmp_path / "out").exists()


def test_unpaired_text_without_states_is_refused(rich_store, pooled_store, tmp_path):
    made = training_runs.config(rich_store, tmp_path / "out", adapter="transformer", batch_size=16)
    made.adapter_options, made.data.unpaired_text = SMALL, str(pooled_store)
    with pytest.raises(CSDiffError, match=r"unpaired_text.*no text_states"):
        train(made)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "image tokens.*has none"),
        ({"data.images": "DATA", "image_adapter": "mlp"}, "--image_adapter maps pooled embeddings only"),
        ({"data.images": "DATA", "adapter": "diffusion", "objective": "diffusion"}, "diffusion takes none"),
    ],
)
def test_a_token_term_without_tokens_is_refused(pooled_store, pictures, tmp_path, changes, words):
    made = training_runs.config(pooled_store, tmp_path / "out", batch_size=16, **{"adapter": "transformer", **changes})
    made.adapter_options, made.objective_options = SMALL, {"token_weight": 0.5}
    made.data.images = str(pictures) if "data.images" in changes else None
    with pytest.raises(CSDiffError, match=words) as caught:
        train(made)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_going_back_to_an_earlier_checkpoint_sets_the_later_ones_aside(plain_store, tmp_path):
    train(training_runs.config(plain_store, tmp_path, **{"checkpoint.keep": 0}))
    back = training_runs.config(plain_store, tmp_path, resume=str(tmp_path / "checkpoints" / "step-00000004"))
    back.checkpoint.keep = 0
    train(back)
    assert (tmp_path / "previous-1" / "step-00000012" / "config.json").is_file()
    assert [line["step"] for line in training_runs.log(tmp_path, "train")] == list(range(1, 13))


def test_pictures_of_prompts_at_validation(pooled_store, tiny_decoder, tmp_path):
    decoder = shutil.copytree(tiny_decoder, tmp_path / "decoder")
    unet = json.loads((decoder / "unet" / "config.json").read_text())
    (decoder / "unet" / "config.json").write_text(json.dumps({**unet, "sample_size": 8}))
    made = training_runs.config(pooled_store, tmp_path / "out", max_steps=2, batch_size=16)
    made.validation.every, made.validation.decoder, made.validation.prompts = 0, str(decoder), ["a thing", "another"]
    made.logging.curves = True
    train(made)
    assert len(list((tmp_path / "out" / "pictures" / "step-00000002").glob("*.png"))) == 2
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        one = sheet.height
    pictures = tmp_path / "out" / "pictures"
    shutil.copytree(pictures / "step-00000002", pictures / "step-00000003")
    draw_sheet(tmp_path / "out", made.validation.prompts, made.seed)
    with Image.open(tmp_path / "out" / "samples.png") as sheet:
        assert sheet.height > one
        assert min(band[0] for band in sheet.getextrema()) == 0


def test_curves_that_cannot_be_drawn_stop_nothing(plain_store, tmp_path, capsys):
    (tmp_path / "curves.png").mkdir()
    changes = {"logging.curves": True, "logging.trackers": ["none"]}
    train(training_runs.config(plain_store, tmp_path, max_steps=2, **changes))
    assert "curves.png could not be drawn" in capsys.readouterr().out
    assert (tmp_path / "config.json").is_file()
    assert not (tmp_path / "logs").exists()


def test_a_signal_ends_a_validation_which_is_made_up_for(plain_store, tmp_path, monkeypatch):
    train(training_runs.config(plain_store, tmp_path / "undisturbed"))
    original = Validator.measure

    def measure(self, task):
        if task.ema.decay and not (tmp_path / "checkpoints").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, task)

    monkeypatch.setattr(Validator, "measure", measure)
    made = training_runs.config(plain_store, tmp_path, **{"checkpoint.every": 0})
    with pytest.raises(SystemExit) as caught:
        train(made)
    assert caught.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step-00000005"
    assert not training_runs.log(tmp_path, "validation")
    train(made)
    there, here = (training_runs.log(path, "validation") for path in (tmp_path / "undisturbed", tmp_path))
    assert here == there
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def poison(monkeypatch, steps):
    """Make the gradient of some steps infinite, as an overflow would."""
    original = Loop._clip

    def clip(self):
        if self.progress.step in steps:
            next(iter(self.task.parameters.values())).grad.fill_(float("inf"))
        return original(self)

    monkeypatch.setattr(Loop, "_clip", clip)


def test_a_step_that_is_not_finite_is_skipped(plain_store, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, {3, 7})
    train(training_runs.config(plain_store, tmp_path))
    skipped = training_runs.log(tmp_path, "skipped")
    assert [line["step"] for line in skipped] == [4, 8]
    assert len(training_runs.log(tmp_path, "train")) == 10
    assert "Step 4 skipped: the gradient is not finite" in capsys.readouterr().out
    assert all(v.isfinite().all() for v in load_file(tmp_path / "diffusion_pytorch_model.safetensors").values())


def test_a_damaged_row_is_skipped_with_its_batch(tmp_path):
    store = make_plain_store(tmp_path / "store")
    for name in ("text_emb", "img_emb"):
        rows = np.load(store / name / f"{name}_0.npy")
        rows[5] = np.nan
        np.save(store / name / f"{name}_0.npy", rows)
    made = training_runs.config(store, tmp_path / "out", **{"data.validation_fraction": 0.0})
    with pytest.raises(CSDiffError):
        train(made)


def test_stops_when_nothing_is_finite_any_more(plain_store, tmp_path, monkeypatch):
    poison(monkeypatch, set(range(5, 100)))
    made = training_runs.config(plain_store, tmp_path, max_steps=50, max_skipped_steps=4)
    with pytest.raises(CSDiffError, match=r"4 steps in a row were skipped.*last good checkpoint is .*step-00000005"):
        train(made)
    AutoAdapter.from_pretrained(tmp_path / "checkpoints" / "latest")
