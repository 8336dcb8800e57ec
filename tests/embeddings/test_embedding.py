"""`csdiff embed`: what is stored, what is left out, and that nothing but the input decides the bytes."""

import json
import shutil
import tarfile

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from embedding_runs import PICTURES, config, content
from PIL import Image

from csdiff.embeddings import EmbeddingStore, embed, load_image_encoder, load_text_encoder
from csdiff.errors import CSDiffError

# Rows of the data set: pictures 3 and 5 cannot be read, 2 has one caption, 7 has one that is not empty.
CAPTIONS = {i: [f"thing {i}", f"a thing {i}"] for i in range(PICTURES) if i not in (3, 5)}
CAPTIONS |= {2: ["a very long caption of a thing that no encoder could ever take in as a whole"], 7: ["thing 7"]}
ROWS = [(f"{i:02d}.png", caption) for i in sorted(CAPTIONS) for caption in CAPTIONS[i]]


def pairs(store):
    return list(zip(store.image_ids(slice(None)), store.captions(slice(None)), strict=True))


def test_rows_are_the_raw_embeddings_of_their_captions_and_images(store, dataset, tiny_clip):
    opened = EmbeddingStore.open(store)
    everything = opened.read(slice(None))
    assert pairs(opened) == ROWS
    text = load_text_encoder(tiny_clip).embed([caption for _, caption in ROWS])
    image = load_image_encoder(tiny_clip).encode([Image.open(dataset / name) for name, _ in ROWS]).embeds
    # float16 keeps eleven bits.
    torch.testing.assert_close(everything["text_embeds"], text, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(everything["image_embeds"], image, rtol=1e-3, atol=2e-3)
    assert not opened.normalized


def test_shards_are_the_clip_retrieval_layout(store):
    files = {f"{name}/{name}_{k}.npy" for name in ("img_emb", "text_emb") for k in range(4)}
    files |= {f"metadata/metadata_{k}.parquet" for k in range(4)}
    assert set(content(store)) == {"csdiff.json", "report.json", *files}
    assert [len(np.load(store / f"img_emb/img_emb_{k}.npy", allow_pickle=False)) for k in range(4)] == [5, 5, 8, 2]
    assert np.load(store / "text_emb/text_emb_0.npy", allow_pickle=False).dtype == np.float16


def test_the_fingerprint_says_what_made_the_store(store, tiny_clip):
    found = json.loads((store / "csdiff.json").read_text())
    text, image = load_text_encoder(tiny_clip), load_image_encoder(tiny_clip)
    assert (found["format"], found["kind"], found["rows"], found["dtype"]) == (1, "store", len(ROWS), "float16")
    assert found["text_encoder"] == text.describe()
    assert found["image_encoder"] == image.describe()
    assert found["tokenizer"] == text.caption_tokenizer.describe()
    assert found["preprocessing"].items() >= image.describe_preprocessing().items()
    assert found["normalized"] is False


def test_what_was_left_out_is_counted_and_listed(store, dataset):
    report = json.loads((store / "report.json").read_text())
    assert (report["items"], report["rows"]) == (PICTURES, len(ROWS))
    assert report["skipped"] == {"empty_caption": 1, "missing_image": 1, "unreadable_image": 1}
    assert report["truncated_captions"] == 1
    assert [problem["id"] for problem in report["problems"]] == ["03.png", "05.png", "07.png"]
    assert "UnidentifiedImageError" in report["problems"][0]["detail"]
    assert report["truncated"][0].startswith("02.png: caption 0 has")
    assert report["not_read"] == {".heic": {"count": 2, "first": ["a.heic", "b.heic"]}}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"captions_per_image": "first"}, [(f"{i:02d}.png", CAPTIONS[i][0]) for i in sorted(CAPTIONS)]),
        ({"long_captions": "skip"}, [row for row in ROWS if row[0] != "02.png"]),
    ],
)
def test_which_captions_become_rows(embedded, options, expected):
    assert pairs(embedded(**options)) == expected


def test_a_random_caption_depends_on_the_seed_only(embedded):
    options = {"captions_per_image": "random", "image_encoder": None}
    one, same, other = (
        embedded(name, seed=seed, shard_size=size, **options).captions(slice(None))
        for name, seed, size in (("a", 0, 4), ("b", 0, 7), ("c", 1, 4))
    )
    assert one == same != other
    # Without an image encoder nobody minds that picture 3 is no image.
    assert len(one) == len(CAPTIONS) + 1


def test_token_states_and_dtypes(embedded, tiny_clip):
    batch = embedded(text_states=True, image_tokens=True, dtype="bfloat16").read([0, 5])
    expected = load_text_encoder(tiny_clip).encode([ROWS[i][1] for i in (0, 5)])
    torch.testing.assert_close(batch["text_states"], expected.states.bfloat16().float(), rtol=1e-2, atol=1e-2)
    assert torch.equal(batch["text_mask"], expected.mask)
    assert batch["image_tokens"].shape == (2, 17, 32)
    assert batch["image_embeds"].equal(batch["image_embeds"].bfloat16().float())


def test_unpaired_sides(embedded, dataset, tmp_path):
    (tmp_path / "captions.txt").write_text("one\ntwo\n\nthree\n")
    text = embedded("text", tmp_path / "captions.txt")
    assert (text.image_dim, text.captions(slice(None))) == (None, ["one", "two", "three"])
    (tmp_path / "images").mkdir()
    shutil.copy(dataset / "00.png", tmp_path / "images")
    image = embedded("image", tmp_path / "images")
    assert (image.text_dim, len(image)) == (None, 1)
    online = embedded("online", text_encoder=None)
    assert (online.text_dim, online.captions([0, 1])) == (None, [caption for _, caption in ROWS[:2]])


def test_tar_files_and_further_columns(embedded, dataset, tmp_path):
    for shard, indices in enumerate(((0, 1), (4,))):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for index in indices:
                (tmp_path / "j").write_text(json.dumps({"caption": f"thing {index}", "style": f"s{index}"}))
                tar.add(dataset / f"{index:02d}.png", f"{index}.png")
                tar.add(tmp_path / "j", f"{index}.json")
    opened = embedded(source=tmp_path / "{0..1}.tar", metadata_columns=["style"])
    assert opened.image_ids(slice(None)) == ["0/0", "0/1", "1/4"]
    assert opened.column("style") == ["s0", "s1", "s4"]
    assert len(list((tmp_path / "s/img_emb").iterdir())) == 2


def test_a_finished_store_is_left_alone_and_another_one_refused(store, dataset, tiny_clip, tmp_path, capsys):
    before = content(store)
    embed(config(dataset, tiny_clip, store, max_skipped=0.5, workers=1))
    assert content(store) == before
    said = capsys.readouterr().err
    assert all(fact in said for fact in ("20 rows of 13 items", "complete already", "missing image (1)", ".heic (2)"))
    with pytest.raises(CSDiffError, match="dtype is 'float16' there and 'float32' now; choose another output"):
        embed(config(dataset, tiny_clip, store, dtype="float32"))
    (tmp_path / "captions.csv").write_text("text\na cat")
    with pytest.raises(CSDiffError, match=r"it is of other images or captions(?!.*[0-9a-f]{64})"):
        embed(config(tmp_path / "captions.csv", tiny_clip, store))
    assert content(store) == before


def test_too_much_left_out_stops_the_run_and_a_higher_limit_goes_on(embedded, store, tmp_path):
    with pytest.raises(CSDiffError, match=r"expected at most 0\.0% of 13 items.*found 1 already, for example 03\.png"):
        embedded(max_skipped=0)
    with pytest.raises(CSDiffError, match="not finished"):
        EmbeddingStore.open(tmp_path / "s")
    with pytest.raises(CSDiffError, match="dtype is 'float16' there and 'float32' now"):
        embedded(dtype="float32")
    embedded()
    assert content(tmp_path / "s") == content(store)


@pytest.mark.parametrize(
    ("count", "message"),
    [(12, "found 11 already"), (9, r"expected at least one usable item, found none: missing image \(9\)")],
)
def test_ten_are_always_allowed_but_never_everything(embedded, tmp_path, count, message):
    rows = [f"x{index}.png,a caption" for index in range(count)]
    (tmp_path / "metadata.csv").write_text("\n".join(["file_name,text", *rows]))
    with pytest.raises(CSDiffError, match=message):
        embedded(source=tmp_path)


def test_a_shard_of_which_nothing_is_left_is_empty(embedded, dataset, tmp_path):
    lines = (dataset / "metadata.jsonl").read_text().splitlines()
    folder = shutil.copytree(dataset, tmp_path / "data")
    # The second shard has the unreadable and the missing picture only.
    (folder / "metadata.jsonl").write_text("\n".join([lines[0], lines[1], lines[3], lines[5], lines[4]]))
    opened = embedded(source=folder, shard_size=2, text_states=True, image_tokens=True)
    assert [pq.read_metadata(tmp_path / f"s/metadata/metadata_{k}.parquet").num_rows for k in range(3)] == [4, 0, 2]
    assert opened.read([0, 5])["text_states"].shape == (2, 16, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": ""}, "source: expected a data set, found nothing; give --source"),
        ({"text_encoder": None, "image_encoder": None}, "expected at least one encoder"),
        ({"text_encoder": None, "text_states": True}, "text_states: .*text_encoder"),
        ({"max_skipped": 1.5}, "max_skipped"),
        ({"source": "nowhere/at/all"}, "nowhere/at/all: expected a folder, a file or the id"),
        ({"text_encoder": "nowhere/at/all"}, "expected a folder with a text encoder"),
        ({"caption_column": "titel"}, "expected the column 'titel'"),
        ({"max_length": 17}, "max_length: expected at most 16, the tokenizer's limit, found 17"),
        ({"pooling": "mean"}, "expected pooling projection for a clip"),
        ({"captions_file": "missing.csv"}, "missing.csv"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_anything_is_written(embedded, tmp_path, options, message):
    with pytest.raises((CSDiffError, OSError), match=message):
        embedded(**options)
    assert not (tmp_path / "s").exists()


def test_a_folder_with_other_things_in_it_is_not_written_into(embedded, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(CSDiffError, match=r"expected an empty folder or an unfinished store, but it holds thesis.tex"):
        embedded(".")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "csdiff.json").write_text('{"kind": "adapter"}')
    with pytest.raises(CSDiffError, match="but it is an adapter"):
        embedded(".")
    for place in ("thesis.tex", "thesis.tex/s"):
        with pytest.raises(CSDiffError, match="cannot be written"):
            embedded(place)


def test_half_surrogates_are_replaced_and_counted(tiny_clip, tmp_path):
    texts = ["cut emoji \ud83d", "whole \ud83d\ude00", "a<|endoftext|>b", "x" * 200_000]
    (tmp_path / "captions.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    report = embed(config(tmp_path / "captions.jsonl", tiny_clip, tmp_path / "s", image_encoder=None))
    assert report.replaced_captions == json.loads((tmp_path / "s/report.json").read_text())["replaced_captions"] == 1
    assert report.skipped == {"huge_caption": 1}
    opened = EmbeddingStore.open(tmp_path / "s")
    kept = ["cut emoji \ufffd", "whole \U0001f600", "a<|endoftext|>b"]
    assert opened.captions(slice(None)) == kept
    expected = load_text_encoder(tiny_clip).embed(kept)
    torch.testing.assert_close(opened.read(range(3))["text_embeds"], expected, rtol=1e-3, atol=2e-3)


def test_places_are_the_same_by_any_name_and_from_any_folder(dataset, tiny_clip, store, tmp_path, monkeypatch):
    """Relative names, a second start from another folder, and an encoder that moved: one store."""
    shutil.copytree(tiny_clip, tmp_path / "clip")
    shutil.copytree(dataset, tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    embed(config("data", "clip", "s"))
    before = content(tmp_path / "s")
    assert json.loads(before["csdiff.json"])["text_encoder"]["id"] == str(tmp_path / "clip")
    monkeypatch.chdir(tmp_path / "elsewhere")
    shutil.move(tmp_path / "clip", tmp_path / "elsewhere/renamed")
    embed(config("../data", "renamed", "../s"))
    assert content(tmp_path / "s") == before
