"""`csdiff evaluate` on embeddings, as users call it, and the page about it."""

import json
import re
import shutil
import sys
from importlib import import_module

import pyarrow.parquet as pq
import pytest
import torch
from tiny import make_plain_store

from csdiff.adapters import TransformerAdapter
from csdiff.embeddings import EmbeddingStore, write_store
from csdiff.evaluation.comparison import compare
from csdiff.evaluation.data import open_store, predict, read_pairs
from csdiff.evaluation.evaluate import short_names
from csdiff.pipelines.decoders import read_adapter_card
from csdiff.tables import number

pytestmark = pytest.mark.filterwarnings("ignore:.*csdiff.json.*")


@pytest.fixture
def copy_store(plain_store, tmp_path):
    """Copies of the plain store that say what they were made from."""

    def make(name, rows=64, **fingerprint):
        values = {key: value[:rows] for key, value in EmbeddingStore.open(plain_store).read(slice(None)).items()}
        write_store(tmp_path / name, **values, fingerprint={"normalized": False, **fingerprint})
        return tmp_path / name

    return make


def test_json_and_table(adapters, plain_store, scores, run, tmp_path):
    options = {"adapter": adapters["good"], "data": plain_store}
    found = scores(**options)
    first = (tmp_path / "scores.json").read_bytes()
    real = found["baselines"].pop("real")
    assert set(found["baselines"]) == {"raw_text", "mean_shift", "ridge"}
    assert all(column.keys() >= real.keys() for column in (found, *found["baselines"].values()))
    assert found["centroid_gap"] < 0.1 < found["baselines"]["raw_text"]["centroid_gap"]
    assert abs(real["kernel_distance"]) < 0.1 * found["baselines"]["raw_text"]["kernel_distance"]
    manifest = found["manifest"]
    assert len(manifest["adapters"]["good"]["sha256"]) == 64
    assert manifest["data"]["pictures"] == 64
    assert manifest["versions"]["torch"] == torch.__version__
    assert "real vs real" in run.table
    assert number(found["text_to_image"]["r@1"]) in run.table
    scores(**options)
    assert (tmp_path / "scores.json").read_bytes() == first


def test_a_split_is_named_where_there_are_several(captioned_pictures, picture_adapter, tmp_path):
    for name in ("train", "test"):
        shutil.copytree(captioned_pictures, tmp_path / name)
        (tmp_path / name / "metadata.jsonl").unlink()
    card, places = read_adapter_card(picture_adapter), (captioned_pictures, captioned_pictures / "metadata.jsonl")
    for place, split, named in (
        (tmp_path, "test", "test"),
        (tmp_path, "all", "all"),
        *((p, "test", None) for p in places),
    ):
        with open_store(str(place), card, "cpu", split) as (_, found):
            assert found == named


def test_baselines_are_fitted_to_train(adapters, plain_store, scores):
    """With the held-out pairs themselves to fit to, the mean shift leaves no gap; cross-fitted it leaves some."""
    options = {"adapter": adapters["good"], "data": plain_store}
    crossed, fitted = scores(**options), scores(**options, train=plain_store)
    cosines = [found["baselines"]["mean_shift"]["cosine"]["paired"] for found in (crossed, fitted)]
    assert cosines[0] < cosines[1]


@pytest.mark.parametrize(
    ("source", "more", "words", "manifest"),
    [
        ("mine", {}, "mine", {"rows": 64, "own_training_store": True}),
        ("mine", {"train": "other"}, "other", {"rows": 40, "own_training_store": False}),
        ("changed", {}, "cross-fitted", {"folds": 5}),
        ("other", {}, "other", {"rows": 40, "own_training_store": True}),
        ("inside", {}, "train", {"rows": 50, "own_training_store": True}),
    ],
)
def test_baselines_are_fitted_to_the_adapters_own_training_store(
    source, more, words, manifest, adapters, plain_store, copy_store, changed, scores, run, tmp_path, monkeypatch
):
    """Where `csdiff.json` names one or a run puts it; an explicit --train wins, a store that has changed is not it."""
    monkeypatch.chdir(tmp_path)
    copy_store("mine", data={"source": "mine"})
    copy_store("other", rows=40, data={"source": "other"})
    copy_store("adapter/store/train", rows=50, data={"source": "inside"})
    trained = {"train": "mine", "store": "other", "rows": 64, "source": {"source": source}}
    adapter = changed(adapters["good"], lambda metadata: metadata.update(data=trained))
    found = scores(adapter=adapter, data=plain_store, **more)
    said = found["baselines"]["ridge"]["fitted_on"]
    assert words in said
    assert said in run.table
    assert manifest.items() <= found["manifest"]["baselines_fitted_to"].items()


def test_groups_follow_the_concepts_of_the_store(adapters, plain_store, scores, run, refused, tmp_path):
    shutil.copytree(plain_store, tmp_path / "named")
    for file in (tmp_path / "named/metadata").glob("*.parquet"):
        table = pq.read_table(file)
        pq.write_table(table.append_column("concept", [[f"kind {row % 3}" for row in range(len(table))]]), file)
    found = scores(adapter=adapters["good"], data=tmp_path / "named")
    assert {"v_measure", "ari"} == found["groups"].keys() == found["baselines"]["ridge"]["groups"].keys()
    assert "groups, V-measure" in run.table
    refused("'colour'", data=plain_store, adapter=adapters["good"], concepts="colour")


def test_an_encoder_that_moved_is_named_by_the_user(
    picture_adapter, captioned_pictures, tiny_clip, changed, run, refused
):
    def move(metadata):
        for tower in ("text", "image"):
            metadata[f"{tower}_encoder"]["id"] = "/no/longer/here"

    options = {"adapter": changed(picture_adapter, move), "data": captioned_pictures}
    refused("--text_encoder", **options)
    options["image_encoder"] = tiny_clip
    assert run(**options, text_encoder=tiny_clip)[0] == 0
    refused("/no/longer/here", **options, text_encoder="tiny-clip")


def test_compare_says_what_is_real(adapters, plain_store, scores, tmp_path):
    """Adapters called like a baseline get a column of their own."""
    copy = shutil.copytree(adapters["good"], tmp_path / "runs" / "ridge")
    found = scores(compare=[adapters["good"], adapters["bad"], copy], data=plain_store, bootstrap=200)
    assert list(found["adapters"]) == ["good", "bad", "runs/ridge"]
    assert found["centroid_gap"] == found["adapters"]["good"]["centroid_gap"]
    pairs = {(d["first"], d["second"], d["metric"]): d for d in found["comparison"]["differences"]}
    gap = pairs["good", "bad", "centroid_gap"]
    assert (gap["real"], gap["better"]) == (True, "good")
    assert gap["low"] <= gap["difference"] <= gap["high"] < 0
    assert pairs["good", "bad", "kernel_distance"]["better"] == "good"
    assert not any(d["real"] or d["difference"] for key, d in pairs.items() if key[:2] == ("good", "runs/ridge"))
    low, high = found["comparison"]["intervals"]["bad"]["centroid_gap"]
    assert low < found["adapters"]["bad"]["centroid_gap"] < high


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Two predictors of equal worth: the interval of their difference leaves 0 out in about one of twenty samples."""
    generator = torch.Generator().manual_seed(0)
    missed = {"cosine.paired": 0, "centroid_gap": 0, "kernel_distance": 0, "text_to_image.r@5": 0}
    for _ in range(30):
        image = torch.randn(50, 6, generator=generator) + 0.5
        guesses = {name: image + torch.randn(50, 6, generator=generator) for name in "ab"}
        for entry in compare(guesses, image, image, torch.arange(50), resamplings=100)["differences"]:
            if entry["metric"] in missed:
                missed[entry["metric"]] += entry["real"]
    # 1.5 of 30 are expected; 7 and more happen about once in a thousand.
    assert all(count < 7 for count in missed.values()), missed


def differences(first, second, image, **options):
    ids = torch.arange(len(image))
    found = compare({"a": first, "b": second}, image, image, ids, resamplings=200, **options)["differences"]
    assert all(entry["low"] <= entry["difference"] <= entry["high"] for entry in found)
    assert all(entry["difference"] or not entry["real"] for entry in found)
    return {entry["metric"]: entry for entry in found}


def test_a_zero_difference_is_never_real_and_every_interval_holds_its_estimate():
    """Identical adapters, predictions that are all tied, and medians, which jump by whole ranks between resamples."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(41, 6, generator=generator)
    noisy, other = (image + torch.randn(41, 6, generator=generator) for _ in range(2))
    assert not any(entry["real"] for entry in differences(noisy, noisy.clone(), image).values())
    tied = differences(torch.ones(41, 6), 2 * torch.ones(41, 6), image)
    assert not any(entry["real"] for key, entry in tied.items() if "norm" not in key)
    for seed in range(20):
        differences(noisy, other, image, seed=seed)
    # One caption of 41 in another place: the median of some resamples moves, that of the sample does not.
    moved = noisy.clone()
    moved[0] = -image[0]
    assert not differences(noisy, moved, image)["text_to_image.median_rank"]["real"]


def test_more_images_than_are_resampled_keep_the_whole_gallery():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(60, 4, generator=generator)
    near, far = (image + s * torch.randn(60, 4, generator=generator) for s in (0.3, 3.0))
    part = differences(near, far, image, limit=30)["text_to_image.median_rank"]
    assert part["better"] == "a"
    # Among 30 images no median rank could be as bad.
    assert part["difference"] < -15 / 2


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"image_dim": 12}, "expected image embeddings of width 16, as the adapter"),
        ({"unit_norm": True}, "expected embeddings that are raw, as the adapter"),
        ({"n": 5}, "at least 8 different images to evaluate on, found 5"),
    ],
)
def test_refuses_stores_that_do_not_fit(options, expected, adapters, refused, tmp_path):
    store = make_plain_store(tmp_path / "store", **options)
    refused(expected, adapter=adapters["good"], data=store, json=tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


def test_refuses_another_encoder(adapters, copy_store, changed, run, refused):
    known = {name: {"id": name, "weights_sha256": name[0] * 64, "dim": 16} for name in ("trained", "other")}
    stores = {name: copy_store(name, text_encoder=encoder) for name, encoder in known.items()}
    adapter = changed(adapters["good"], lambda metadata: metadata.update(text_encoder=known["trained"]))
    assert run(adapter=adapter, data=stores["trained"])[0] == 0
    refused("text encoder", adapter=adapter, data=stores["other"])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "data: expected held-out pairs"),
        ({"data": "nowhere/at/all"}, "nowhere/at/all: expected an embedding store"),
        ({"data": "x", "adapter": "nowhere/at/all"}, "nowhere/at/all"),
        ({"data": "x", "json": "nowhere/at/all.json"}, "a file in an existing folder"),
        ({"data": "x", "report": "/proc/all.html"}, "report: /proc/all.html cannot be written"),
        ({"data": "x", "compare": ["a", "./a"]}, "two or more different adapters"),
        ({"data": "x", "prompts": "p.txt"}, "prompts: expected a decoder to draw them with"),
        ({"data": "x", "picture_baselines": "magic"}, "found magic"),
        ({"data": "x", "max_rows": 3}, "max_rows"),
        ({"data": "x", "size": 12}, "size: expected a multiple of 8 pixels, found 12"),
    ],
)
def test_bad_options_are_one_sentence(options, expected, refused):
    assert len(refused(expected, **options).splitlines()) == 1


def test_short_names_are_told_from_baselines_and_from_each_other(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("raw_text", "mean_shift", "ridge", "image", "real"):
        assert short_names([f"runs/{name}"]) == {f"runs/{name}": f"runs/{name}"}
        assert short_names([name]) == {name: f"{tmp_path.name}/{name}"}
    assert list(short_names(["a/x", "b/x", "b/y"]).values()) == ["a/x", "b/x", "y"]
    assert list(short_names(["1/a/x", "2/a/x"]).values()) == ["1/a/x", "2/a/x"]


def test_data_the_adapter_was_trained_on_is_told_of(adapters, copy_store, changed, run, caplog, tmp_path):
    adapter = changed(adapters["good"], lambda metadata: metadata.update(data={"source": {"source": "seen"}}))
    for name in ("unseen", "seen"):
        caplog.clear()
        files = {kind: tmp_path / f"scores.{kind}" for kind in ("json", "report")}
        assert run(adapter=adapter, data=copy_store(name, data={"source": name}), **files)[0] == 0
        seen = name == "seen"
        assert json.loads(files["json"].read_text())["manifest"]["data"]["seen_by"] == ["adapter"] * seen
        for text in (caplog.text, run.table, files["report"].read_text()):
            assert ("not held out" in text) == seen


def nothing_is_measured(*_, **__):
    raise AssertionError("measured before everything was checked")


@pytest.fixture
def reader(tmp_path):
    """An adapter that reads token states."""
    adapter = TransformerAdapter(
        embedding_dim=16, num_layers=1, num_attention_heads=1, attention_head_dim=8, states_dim=16
    )

    def make(**metadata):
        adapter.metadata = metadata
        adapter.save_pretrained(tmp_path / "reader")
        return tmp_path / "reader"

    return make


@pytest.mark.parametrize(
    ("step", "options", "expected"),
    [
        ("embeddings.extraction.embed", {"train": "nowhere/at/all"}, "nowhere/at/all"),
        ("embeddings.extraction.embed", {}, "scikit-learn"),
        ("evaluation.evaluate._predictions", {"extractors": "nowhere/at/all"}, "nowhere/at/all"),
        ("evaluation.evaluate._predictions", {"extractors": "inception:nowhere.pth"}, "inception"),
        ("evaluation.evaluate._predictions", {"clip": "nowhere/at/all"}, "nowhere/at/all"),
    ],
)
def test_what_is_missing_is_refused_before_anything_is_embedded_or_measured(
    step, options, expected, picture_adapter, captioned_pictures, tiny_decoder, monkeypatch, refused, tmp_path
):
    module, _, name = f"csdiff.{step}".rpartition(".")
    monkeypatch.setattr(import_module(module), name, nothing_is_measured)
    if expected == "scikit-learn":
        # None in sys.modules is how Python itself marks a module that cannot be imported
        monkeypatch.setitem(sys.modules, "sklearn", None)
    if step.endswith("_predictions"):
        options = {"decoder": tiny_decoder, "output": tmp_path, **options}
    refused(expected, adapter=picture_adapter, data=captioned_pictures, **options)


def test_encoder_of_every_adapter_is_asked_for_before_the_first_is_measured(
    adapters, plain_store, reader, monkeypatch, refused
):
    monkeypatch.setattr(import_module("csdiff.evaluation.evaluate"), "held_out_metrics", nothing_is_measured)
    refused("names no text encoder", compare=[adapters["good"], reader()], data=plain_store)


def test_data_are_embedded_as_the_adapter_was_trained(picture_adapter, captioned_pictures, changed, monkeypatch):
    def change(metadata):
        metadata["text_encoder"] |= {"revision": "abc", "pooling": "mean"}
        metadata["image_encoder"] |= {"revision": "def"}
        metadata["tokenizer"] = {"max_length": 9}

    def embed(config, source):
        assert (config.text_revision, config.pooling, config.max_length) == ("abc", "mean", 9)
        assert config.image_revision == "def"
        raise InterruptedError

    monkeypatch.setattr("csdiff.embeddings.extraction.embed", embed)
    card = read_adapter_card(changed(picture_adapter, change))
    with pytest.raises(InterruptedError), open_store(str(captioned_pictures), card, None, "test"):
        pass


def test_captions_are_encoded_as_the_adapter_was_trained(plain_store, tiny_clip, reader, monkeypatch):
    encoder = {"id": str(tiny_clip), "revision": "abc", "pooling": "mean"}

    def load(id, device, **options):
        assert (id, options) == (str(tiny_clip), {"revision": "abc", "pooling": "mean", "max_length": 9})
        raise InterruptedError

    monkeypatch.setattr("csdiff.evaluation.data.load_text_encoder", load)
    pairs = read_pairs(str(plain_store), EmbeddingStore.open(plain_store), 64)
    with pytest.raises(InterruptedError):
        predict(read_adapter_card(reader(text_encoder=encoder, tokenizer={"max_length": 9})), pairs)


def test_the_page_runs(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (root / "docs/evaluation.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    names: dict = {}
    exec(code, names)
    scores = names["scores"]
    assert scores["centroid_gap"] < 0.1 < scores["baselines"]["raw_text"]["centroid_gap"]
    table = page[page.index("| key in the JSON") : page.index("The same keys stand under")]
    named = [key for line in table.splitlines()[2:] for key in re.findall(r"`([^`]+)`", line.split(" | ")[0])]
    for key in named:
        key = key.replace(".*", "").replace(".WIDTH", "")
        value = scores["text_to_image"] if key.startswith("r@") else scores
        for part in key.split("."):
            value = value[part]
