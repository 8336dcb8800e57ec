"""`csdiff evaluate` on embeddings, as users call it."""

import json
import shutil
import sys
from importlib import import_module

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import make_plain_store

from csdiff.cli import run_command
from csdiff.embeddings import EmbeddingStore
from csdiff.evaluation.comparison import compare
from csdiff.evaluation.data import open_store, read_pairs
from csdiff.evaluation.evaluate import short_names
from csdiff.evaluation.predictions import predict
from csdiff.pipelines.decoders import read_adapter_card
from csdiff.tables import number

pytestmark = pytest.mark.filterwarnings("ignore:.*csdiff.json.*")


def run(*arguments):
    return run_command("evaluate", [str(argument) for argument in arguments], "csdiff evaluate")


def test_json_and_table(adapters, plain_store, tmp_path, capsys):
    file = tmp_path / "scores.json"
    assert run("--adapter", adapters["good"], "--data", plain_store, "--json", file) == 0
    scores = json.loads(file.read_text())
    real = scores["baselines"].pop("real")
    for found in (scores, *scores["baselines"].values()):
        for direction in ("text_to_image", "image_to_text"):
            assert {"r@1", "r@5", "r@10"} <= found[direction].keys()
        for name in ("centroid_gap", "distribution_gap", "frechet_distance", "kernel_distance", "cs_divergence"):
            assert isinstance(found[name], float)
        assert {"paired", "unpaired", "text"} == found["cosine"].keys()
        assert {"mean_ratio", "std_ratio"} == found["norm"].keys()
    assert set(scores["baselines"]) == {"raw_text", "mean_shift", "ridge"}
    assert scores["centroid_gap"] < 0.1 < scores["baselines"]["raw_text"]["centroid_gap"]
    assert abs(real["kernel_distance"]) < 0.1 * scores["baselines"]["raw_text"]["kernel_distance"]
    manifest = scores["manifest"]
    assert len(manifest["adapters"]["good"]["sha256"]) == 64
    assert manifest["data"]["pictures"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    table = capsys.readouterr().out
    assert "real vs real" in table
    assert number(scores["text_to_image"]["r@1"]) in table


def test_scores_repeat(adapters, plain_store, tmp_path):
    for name in ("a", "b"):
        assert run("--adapter", adapters["good"], "--data", plain_store, "--json", tmp_path / name) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_baselines_are_fitted_to_train(adapters, plain_store, tmp_path):
    """With the held-out pairs themselves to fit to, the mean shift leaves no gap; cross-fitted it leaves some."""
    whole = ("--adapter", adapters["good"], "--data", plain_store, "--json")
    assert run(*whole, tmp_path / "crossed") == 0
    assert run(*whole, tmp_path / "fitted", "--train", plain_store) == 0
    crossed, fitted = (json.loads((tmp_path / name).read_text()) for name in ("crossed", "fitted"))
    assert (
        fitted["baselines"]["mean_shift"]["cosine"]["paired"] > crossed["baselines"]["mean_shift"]["cosine"]["paired"]
    )
    assert fitted["manifest"]["baselines_fitted_to"]["rows"] == 64
    assert crossed["manifest"]["baselines_fitted_to"]["folds"] == 5


def test_baselines_are_fitted_to_the_adapters_own_training_store(adapters, plain_store, tmp_path, monkeypatch, capsys):
    """Where `csdiff.json` names one, by any name; an explicit --train wins, and a store that has changed is not it."""
    from csdiff.embeddings import write_store

    monkeypatch.chdir(tmp_path)
    values = EmbeddingStore.open(plain_store).read(slice(None))
    fewer = {name: value[:40] for name, value in values.items()}
    write_store(tmp_path / "mine", **values, fingerprint={"data": {"source": "mine"}, "normalized": False})
    write_store(tmp_path / "other", **fewer, fingerprint={"data": {"source": "other"}, "normalized": False})
    adapter = shutil.copytree(adapters["good"], tmp_path / "adapter")
    metadata = json.loads((adapter / "csdiff.json").read_text())

    def fitted(*more, source):
        metadata["data"] = {"train": "mine", "rows": 64, "source": {"source": source}}
        (adapter / "csdiff.json").write_text(json.dumps(metadata))
        assert run("--adapter", "adapter", "--data", plain_store, "--json", "s.json", *more) == 0
        scores = json.loads((tmp_path / "s.json").read_text())
        words = scores["baselines"]["ridge"]["fitted_on"]
        assert words in capsys.readouterr().out
        return words, scores["manifest"]["baselines_fitted_to"]

    words, manifest = fitted(source="mine")
    assert "mine" in words
    assert (manifest["rows"], manifest["own_training_store"]) == (64, True)
    words, manifest = fitted("--train", "other", source="mine")
    assert "other" in words
    assert (manifest["rows"], manifest["own_training_store"]) == (40, False)
    words, manifest = fitted(source="changed")
    assert "cross-fitted" in words
    assert manifest["folds"] == 5


def test_groups_follow_the_concepts_of_the_store(adapters, plain_store, tmp_path, capsys):
    shutil.copytree(plain_store, tmp_path / "named")
    for file in (tmp_path / "named/metadata").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("concept", [[f"kind {row % 3}" for row in range(len(table))]]), file)
    assert run("--adapter", adapters["good"], "--data", tmp_path / "named", "--json", tmp_path / "s.json") == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert {"v_measure", "ari"} == scores["groups"].keys() == scores["baselines"]["ridge"]["groups"].keys()
    assert "groups, V-measure" in capsys.readouterr().out
    assert run("--data", plain_store, "--adapter", adapters["good"], "--concepts", "colour") == 2
    assert "'colour'" in capsys.readouterr().err


def test_an_encoder_that_moved_is_named_by_the_user(picture_adapter, captioned_pictures, tiny_clip, tmp_path, capsys):
    adapter = shutil.copytree(picture_adapter, tmp_path / "adapter")
    metadata = json.loads((adapter / "csdiff.json").read_text())
    for tower in ("text", "image"):
        metadata[f"{tower}_encoder"]["id"] = str(tmp_path / "gone")
    (adapter / "csdiff.json").write_text(json.dumps(metadata))
    options = ("--adapter", adapter, "--data", captioned_pictures)
    assert run(*options) == 2
    assert "--text_encoder" in capsys.readouterr().err
    assert run(*options, "--text_encoder", tiny_clip, "--image_encoder", tiny_clip) == 0
    assert run(*options, "--text_encoder", "tiny-clip", "--image_encoder", tiny_clip) == 2
    assert "gone" in capsys.readouterr().err


def test_compare_says_what_is_real(adapters, plain_store, tmp_path, capsys):
    copy = shutil.copytree(adapters["good"], tmp_path / "copy")
    folders = (adapters["good"], adapters["bad"], copy)
    assert run("--compare", *folders, "--data", plain_store, "--json", tmp_path / "c.json", "--bootstrap", 200) == 0
    scores = json.loads((tmp_path / "c.json").read_text())
    assert list(scores["adapters"]) == ["good", "bad", "copy"]
    assert scores["centroid_gap"] == scores["adapters"]["good"]["centroid_gap"]
    found = {(d["first"], d["second"], d["metric"]): d for d in scores["comparison"]["differences"]}
    gap = found["good", "bad", "centroid_gap"]
    assert gap["real"]
    assert gap["better"] == "good"
    assert gap["low"] <= gap["difference"] <= gap["high"] < 0
    assert found["good", "bad", "kernel_distance"]["better"] == "good"
    assert not any(d["real"] or d["difference"] for key, d in found.items() if key[:2] == ("good", "copy"))
    low, high = scores["comparison"]["intervals"]["bad"]["centroid_gap"]
    assert low < scores["adapters"]["bad"]["centroid_gap"] < high
    assert "good" in capsys.readouterr().out


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Two predictors of equal worth: the interval of their difference leaves 0 out in about one of twenty samples."""
    generator = torch.Generator().manual_seed(0)
    missed = {"cosine.paired": 0, "centroid_gap": 0, "kernel_distance": 0, "text_to_image.r@5": 0}
    trials = 30
    for _ in range(trials):
        image = torch.randn(50, 6, generator=generator) + 0.5
        guesses = {name: image + torch.randn(50, 6, generator=generator) for name in "ab"}
        result = compare(guesses, image, image, torch.arange(50), resamplings=100)
        for entry in result["differences"]:
            if entry["metric"] in missed:
                missed[entry["metric"]] += entry["real"]
    # 1.5 of 30 are expected; 7 and more happen about once in a thousand.
    assert all(count < 7 for count in missed.values()), missed


def differences(first, second, image, ids, **options):
    found = compare({"a": first, "b": second}, image, image, ids, resamplings=200, **options)["differences"]
    assert all(entry["low"] <= entry["difference"] <= entry["high"] for entry in found)
    return {entry["metric"]: entry for entry in found}


def test_a_zero_difference_is_never_real_and_every_interval_holds_its_estimate():
    """Identical adapters, predictions that are all tied, and medians, which jump by whole ranks between resamples."""
    generator = torch.Generator().manual_seed(3)
    image, ids = torch.randn(41, 6, generator=generator), torch.arange(41)
    noisy, other = (image + torch.randn(41, 6, generator=generator) for _ in range(2))
    assert not any(entry["real"] for entry in differences(noisy, noisy.clone(), image, ids).values())
    tied = torch.ones(41, 6)
    assert not any(
        entry["real"] for entry in differences(tied, 2 * tied, image, ids).values() if "norm" not in entry["metric"]
    )
    for seed in range(20):
        for entry in differences(noisy, other, image, ids, seed=seed).values():
            assert entry["difference"] or not entry["real"]
    # One caption of 41 in another place: the median of some resamples moves, that of the sample does not.
    moved = noisy.clone()
    moved[0] = -image[0]
    assert not differences(noisy, moved, image, ids)["text_to_image.median_rank"]["real"]


def test_more_images_than_are_resampled_keep_the_whole_gallery():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(60, 4, generator=generator)
    near, far = (image + s * torch.randn(60, 4, generator=generator) for s in (0.3, 3.0))
    ids = torch.arange(60)
    whole, part = (compare({"a": near, "b": far}, image, image, ids, 200, limit=n) for n in (None, 30))
    assert (whole["images"], part["images"]) == (60, 30)
    value = [next(d for d in r["differences"] if d["metric"] == "text_to_image.median_rank") for r in (whole, part)]
    assert all(entry["better"] == "a" for entry in value)
    # Among 30 images no median rank could be as bad.
    assert value[1]["difference"] < -15 / 2


@pytest.fixture
def stores(tmp_path):
    """Stores that the adapters cannot be measured on, and what is said of them."""
    return {
        "narrow": make_plain_store(tmp_path / "narrow", image_dim=12),
        "unit": make_plain_store(tmp_path / "unit", unit_norm=True),
        "few": make_plain_store(tmp_path / "few", n=5),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("narrow", "expected image embeddings of 16 dimensions, as the adapter"),
        ("unit", "expected raw embeddings, as the adapter"),
        ("few", "at least 8 different images to evaluate on, found 5"),
    ],
)
def test_refuses_stores_that_do_not_fit(name, expected, stores, adapters, tmp_path, capsys):
    file = tmp_path / "scores.json"
    assert run("--adapter", adapters["good"], "--data", stores[name], "--json", file) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in message
    assert not file.exists()


def test_refuses_another_encoder(adapters, plain_store, tmp_path, capsys):
    from csdiff.embeddings import write_store

    rows = EmbeddingStore.open(plain_store).read(slice(None))
    for name, digest in (("trained", "a" * 64), ("other", "b" * 64)):
        fingerprint = {"text_encoder": {"id": name, "weights_sha256": digest, "dim": 16}}
        write_store(tmp_path / name, **rows, fingerprint={**fingerprint, "normalized": False})
    adapter = shutil.copytree(adapters["good"], tmp_path / "adapter")
    metadata = json.loads((adapter / "csdiff.json").read_text())
    metadata["text_encoder"] = {"id": "trained", "weights_sha256": "a" * 64, "dim": 16}
    (adapter / "csdiff.json").write_text(json.dumps(metadata))
    assert run("--adapter", adapter, "--data", tmp_path / "trained") == 0
    assert run("--adapter", adapter, "--data", tmp_path / "other") == 2
    assert "text encoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "data: expected held-out pairs"),
        (("--data", "nowhere/at/all"), "--data nowhere/at/all: expected an embedding store"),
        (("--data", "x", "--adapter", "nowhere/at/all"), "nowhere/at/all"),
        (("--data", "x", "--json", "nowhere/at/all.json"), "expected an existing folder for it"),
        (("--data", "x", "--compare", "a", "a"), "two or more different adapters"),
        (("--data", "x", "--bootstrap", "3"), "bootstrap"),
        (("--data", "x", "--prompts", "p.txt"), "prompts: expected a decoder to draw them with"),
        (("--data", "x", "--picture_baselines", "magic"), "found magic"),
    ],
)
def test_bad_options_are_one_sentence(arguments, expected, capsys):
    assert run(*arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


def test_refuses_numbers_that_are_not_finite(adapters, plain_store, tmp_path, capsys):
    store = shutil.copytree(plain_store, tmp_path / "store")
    rows = np.load(store / "text_emb/text_emb_0.npy")
    rows[3, 2] = np.nan
    np.save(store / "text_emb/text_emb_0.npy", rows)
    assert run("--adapter", adapters["good"], "--data", store) == 2
    assert "row 3 of text_emb/text_emb_0.npy is not finite" in capsys.readouterr().err


def test_short_names_are_told_from_baselines_and_from_each_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("raw_text", "mean_shift", "ridge", "image", "real"):
        assert short_names([f"runs/{name}"]) == {f"runs/{name}": f"runs/{name}"}
        assert short_names([name]) == {name: f"{tmp_path.name}/{name}"}
    assert list(short_names(["a/x", "b/x", "b/y"]).values()) == ["a/x", "b/x", "y"]
    assert list(short_names(["1/a/x", "2/a/x"]).values()) == ["1/a/x", "2/a/x"]
    assert list(short_names(["a/x", "./a/x"]).values()) == ["a/x", "./a/x"]


def test_an_adapter_called_like_a_baseline_has_a_column_of_its_own(adapters, plain_store, tmp_path, capsys):
    ridge = shutil.copytree(adapters["good"], tmp_path / "runs" / "ridge")
    options = ("--compare", ridge, adapters["bad"], "--data", plain_store, "--bootstrap", 100)
    assert run(*options, "--json", tmp_path / "s.json") == 0
    scores = json.loads((tmp_path / "s.json").read_text())
    assert list(scores["adapters"]) == ["runs/ridge", "bad"]
    assert "runs/ridge" in capsys.readouterr().out


def test_data_the_adapter_was_trained_on_is_told_of(adapters, plain_store, tmp_path, caplog):
    from csdiff.embeddings import write_store

    values = EmbeddingStore.open(plain_store).read(slice(None))
    for name in ("seen", "unseen"):
        write_store(tmp_path / name, **values, fingerprint={"data": {"source": name}, "normalized": False})
    adapter = shutil.copytree(adapters["good"], tmp_path / "adapter")
    metadata = json.loads((adapter / "csdiff.json").read_text())
    metadata["data"] = {"source": {"source": "seen"}}
    (adapter / "csdiff.json").write_text(json.dumps(metadata))
    for name in ("unseen", "seen"):
        caplog.clear()
        assert run("--adapter", adapter, "--data", tmp_path / name) == 0
        assert ("these numbers are not held out" in caplog.text) == (name == "seen")


def nothing_is_measured(*_, **__):
    raise AssertionError("measured before everything was checked")


@pytest.mark.parametrize("missing", ["train", "scikit-learn"])
def test_what_is_missing_is_refused_before_data_is_embedded(
    missing, picture_adapter, captioned_pictures, monkeypatch, capsys
):
    monkeypatch.setattr("csdiff.embeddings.extraction.embed", nothing_is_measured)
    more = ()
    if missing == "train":
        more = ("--train", "nowhere/at/all")
    else:
        # None in sys.modules is how Python itself marks a module that cannot be imported
        monkeypatch.setitem(sys.modules, "sklearn", None)
    assert run("--adapter", picture_adapter, "--data", captioned_pictures, *more) == 2
    assert missing in capsys.readouterr().err


def test_encoder_of_every_adapter_is_asked_for_before_the_first_is_measured(
    adapters, plain_store, tmp_path, monkeypatch, capsys
):
    from csdiff.adapters import TransformerAdapter

    reads = TransformerAdapter(
        embedding_dim=16, num_layers=1, num_attention_heads=1, attention_head_dim=8, states_dim=16
    )
    reads.save_pretrained(tmp_path / "reads")
    monkeypatch.setattr(import_module("csdiff.evaluation.evaluate"), "predict", nothing_is_measured)
    assert run("--compare", adapters["good"], tmp_path / "reads", "--data", plain_store) == 2
    assert "names no text encoder" in capsys.readouterr().err


def test_data_are_embedded_as_the_adapter_was_trained(picture_adapter, captioned_pictures, tmp_path, monkeypatch):
    adapter = shutil.copytree(picture_adapter, tmp_path / "adapter")
    metadata = json.loads((adapter / "csdiff.json").read_text())
    metadata["text_encoder"] |= {"revision": "abc", "pooling": "mean"}
    metadata["image_encoder"] |= {"revision": "def"}
    metadata["tokenizer"] = {"max_length": 9}
    (adapter / "csdiff.json").write_text(json.dumps(metadata))
    asked = []

    def embed(config):
        asked.append(config)
        raise InterruptedError

    monkeypatch.setattr("csdiff.embeddings.extraction.embed", embed)
    card = read_adapter_card(adapter)
    with pytest.raises(InterruptedError), open_store(str(captioned_pictures), "data", card, None, False, "test"):
        pass
    config = asked[0]
    assert (config.text_revision, config.pooling, config.max_length) == ("abc", "mean", 9)
    assert config.image_revision == "def"


def test_captions_are_encoded_as_the_adapter_was_trained(plain_store, tmp_path, monkeypatch):
    from csdiff.adapters import TransformerAdapter

    adapter = TransformerAdapter(
        embedding_dim=16, num_layers=1, num_attention_heads=1, attention_head_dim=8, states_dim=16
    )
    adapter.metadata = {
        "text_encoder": {"id": "somewhere", "revision": "abc", "pooling": "mean"},
        "tokenizer": {"max_length": 9},
    }
    adapter.save_pretrained(tmp_path / "adapter")
    asked = []

    def load(*names, **options):
        asked.append((names[0], options))
        raise InterruptedError

    monkeypatch.setattr("csdiff.embeddings.load_text_encoder", load)
    pairs = read_pairs(str(plain_store), EmbeddingStore.open(plain_store), "data", 64)
    with pytest.raises(InterruptedError):
        predict(read_adapter_card(tmp_path / "adapter"), pairs)
    assert asked == [("somewhere", {"revision": "abc", "pooling": "mean", "max_length": 9})]
