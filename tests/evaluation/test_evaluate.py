"""`csdiff evaluate` on embeddings, as users call it."""

import json
import shutil

import numpy as np
import pytest
import torch
from tiny import make_plain_store

from csdiff.cli import run_command
from csdiff.evaluation.comparison import compare
from csdiff.evaluation.table import number

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
        ("few", "at least 8 different pictures to evaluate on, found 5"),
    ],
)
def test_refuses_stores_that_do_not_fit(name, expected, stores, adapters, tmp_path, capsys):
    file = tmp_path / "scores.json"
    assert run("--adapter", adapters["good"], "--data", stores[name], "--json", file) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert expected in message
    assert not file.exists()


def test_refuses_another_encoder(adapters, plain_store, tmp_path, capsys):
    from csdiff.embeddings import EmbeddingStore, write_store

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
        (("--data", "x", "--bootstrap", "3"), "bootstrap: expected at least 100, found 3"),
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
    assert "found NaN or infinity in the text embeddings" in capsys.readouterr().err
