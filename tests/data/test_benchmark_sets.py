"""Published data sets, on a few pictures written in their formats."""

import csv
import json

import pytest
from PIL import Image

from csdiff.data import open_source
from csdiff.errors import CSDiffError

CAPTIONS = {"one.jpg": ["a red square", "red, all of it"], "two.jpg": ["a blue square", "blue as the sea"]}


@pytest.fixture
def pictures(tmp_path):
    """`pictures(folder)` writes both pictures there."""

    def write(folder):
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, colour in zip(CAPTIONS, ("red", "blue"), strict=True):
            Image.new("RGB", (8, 8), colour).save(path / name)
        return path

    return write


def read(source, **options):
    opened = open_source(source, **options)
    items = [item for unit in range(opened.units(10)) for item in opened.read(unit, 10)]
    assert all(item.image.is_file() for item in items)
    return {item.image.name: item.captions for item in items}


def test_coco(tmp_path, pictures):
    pictures("val2017")
    (tmp_path / "annotations").mkdir()
    file = tmp_path / "annotations/captions_val2017.json"
    images = [{"id": 9, "file_name": "one.jpg"}, {"id": 4, "file_name": "two.jpg"}, {"id": 5, "file_name": "none.jpg"}]
    annotations = [
        {"id": 1, "image_id": 4, "caption": "a blue square"},
        {"id": 2, "image_id": 9, "caption": "a red square\n"},
        {"id": 3, "image_id": 9, "caption": "red, all of it"},
        {"id": 7, "image_id": 4, "caption": "blue as the sea"},
    ]
    file.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    assert read(file) == CAPTIONS


def test_karpathy_splits(tmp_path, pictures):
    pictures("flickr30k-images")
    images = [
        {"filename": name, "split": split, "imgid": 0, "sentences": [{"raw": f" {text}"} for text in CAPTIONS[name]]}
        for name, split in (("one.jpg", "restval"), ("two.jpg", "test"))
    ]
    file = tmp_path / "dataset_flickr30k.json"
    file.write_text(json.dumps({"dataset": "flickr30k", "images": images}))
    assert read(file, split="test") == {"two.jpg": CAPTIONS["two.jpg"]}
    assert read(file, split="train") == {"one.jpg": CAPTIONS["one.jpg"]}
    assert read(file, split="all") == CAPTIONS
    with pytest.raises(CSDiffError, match="expected the split 'val', found restval, test"):
        open_source(file, split="val")


def test_karpathy_file_paths(tmp_path, pictures):
    pictures("val2014")
    images = [{"filepath": "val2014", "filename": "one.jpg", "split": "test", "sentences": [{"raw": "red"}]}]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    assert read(tmp_path / "dataset_coco.json", split="test") == {"one.jpg": ["red"]}


def test_flickr_annotations(tmp_path, pictures):
    pictures("flickr30k-images")
    file = tmp_path / "flickr_annotations_30k.csv"
    with file.open("w", newline="") as opened:
        writer = csv.writer(opened)
        writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
        for index, (name, captions) in enumerate(CAPTIONS.items()):
            writer.writerow([json.dumps(captions), "[0, 1]", "test", name, index])
    assert read(file, split="test") == CAPTIONS


def test_flickr_with_bars_and_its_broken_line(tmp_path, pictures):
    pictures("flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| {i}| {text} ." for name, texts in CAPTIONS.items() for i, text in enumerate(texts)]
    (tmp_path / "results.csv").write_text("\n".join([*lines, "two.jpg| 4   A dog runs ."]))
    found = read(tmp_path / "results.csv")
    assert found["one.jpg"] == ["a red square .", "red, all of it ."]
    assert found["two.jpg"][-1] == "A dog runs ."


def test_flickr_tokens(tmp_path, pictures):
    pictures("flickr30k-images")
    lines = [f"{name}#{i}\t{text}" for name, texts in CAPTIONS.items() for i, text in enumerate(texts)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines) + "\n")
    assert read(tmp_path / "results_20130124.token") == CAPTIONS


def test_urban(tmp_path, pictures):
    pictures("Urban1k/image")
    (tmp_path / "Urban1k/caption").mkdir()
    for name in CAPTIONS:
        (tmp_path / f"Urban1k/caption/{name[:-4]}.txt").write_text("A street.\nIt is long.\n")
    assert read(tmp_path / "Urban1k") == {name: ["A street. It is long."] for name in CAPTIONS}


def test_docci(tmp_path, pictures):
    pictures("images")
    file = tmp_path / "docci_descriptions.jsonlines"
    rows = [
        {"example_id": name[:-4], "split": split, "image_file": name, "description": CAPTIONS[name][0]}
        for name, split in (("one.jpg", "train"), ("two.jpg", "test"))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(file, split="test") == {"two.jpg": ["a blue square"]}


def test_pictures_elsewhere(tmp_path, pictures):
    elsewhere = pictures("far/away")
    file = tmp_path / "results_20130124.token"
    file.write_text("one.jpg#0\ta red square\n")
    with pytest.raises(CSDiffError, match=r"expected its images beside it \(one.jpg in .*captions_file"):
        open_source(file)
    assert read(elsewhere, captions_file=file) == {"one.jpg": ["a red square"]}


def test_damaged_and_foreign_files(tmp_path, pictures):
    pictures("images")
    (tmp_path / "coco.json").write_text('{"images": [{"id": 1}], "annotations": []}')
    (tmp_path / "cut.json").write_text('{"images": [')
    for name, expected in (("coco.json", "at least one image with captions"), ("cut.json", "not readable JSON")):
        with pytest.raises(CSDiffError, match=expected):
            open_source(tmp_path / name)
    (tmp_path / "images/metadata.json").write_text(json.dumps([{"file_name": "one.jpg", "caption": "red"}]))
    assert read(tmp_path / "images/metadata.json") == {"one.jpg": ["red"]}
