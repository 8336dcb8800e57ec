"""Published data sets, on two pictures written in their formats."""

import csv
import json

import pytest
from PIL import Image

from csdiff.data import open_source
from csdiff.errors import CSDiffError

CAPTIONS = {"one.jpg": ["a red square", "red, all of it"], "two.jpg": ["a blue square", "blue as the sea"]}
LINES = [(name, index, text) for name, texts in CAPTIONS.items() for index, text in enumerate(texts)]


def pictures(folder):
    folder.mkdir(parents=True)
    for name, colour in zip(CAPTIONS, ("red", "blue"), strict=True):
        Image.new("RGB", (8, 8), colour).save(folder / name)
    return folder


def read(source, **options):
    items = list(open_source(source, **options))
    assert all(item.image.is_file() for item in items)
    return {item.image.name: item.captions for item in items}


def coco(folder):
    pictures(folder / "val2017")
    (folder / "annotations").mkdir()
    images = [{"id": 9, "file_name": "one.jpg"}, {"id": 4, "file_name": "two.jpg"}, {"id": 5, "file_name": "none.jpg"}]
    ids = {"one.jpg": 9, "two.jpg": 4}
    annotations = [{"id": i, "image_id": ids[name], "caption": f"{text}\n"} for name, i, text in LINES]
    file = folder / "annotations/captions_val2017.json"
    file.write_text(json.dumps({"info": {}, "images": images, "licenses": [], "annotations": annotations}))
    return file


def karpathy(folder):
    pictures(folder / "val2014")
    images = [
        {"filename": n, "filepath": "val2014", "split": split, "sentences": [{"raw": f" {t}"} for t in CAPTIONS[n]]}
        for n, split in (("one.jpg", "restval"), ("two.jpg", "test"))
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}))
    return folder / "dataset_coco.json"


def annotations(folder):
    pictures(folder / "flickr30k-images")
    with (folder / "flickr_annotations_30k.csv").open("w", newline="") as file:
        rows = [[json.dumps(texts), "[0, 1]", "test", name, 0] for name, texts in CAPTIONS.items()]
        csv.writer(file).writerows([["raw", "sentids", "split", "filename", "img_id"], *rows])
    return folder / "flickr_annotations_30k.csv"


def bars(folder):
    pictures(folder / "flickr30k_images")
    lines = ["image_name| comment_number| comment", *(f"{name}| {i}| {text}" for name, i, text in LINES)]
    # The published file has a line that lacks a bar.
    lines[-1] = "two.jpg| 4   blue as the sea"
    (folder / "results.csv").write_text("\n".join(lines))
    return folder / "results.csv"


@pytest.mark.parametrize("write", [coco, karpathy, annotations, bars])
def test_two_captions_an_image(tmp_path, write):
    assert read(write(tmp_path), split="all") == CAPTIONS


def test_long_captions_in_files(tmp_path):
    pictures(tmp_path / "Urban1k/image")
    (tmp_path / "Urban1k/caption").mkdir()
    for name in CAPTIONS:
        (tmp_path / f"Urban1k/caption/{name[:-4]}.txt").write_text("A street.\nIt is long.\n")
    assert read(tmp_path / "Urban1k") == {name: ["A street. It is long."] for name in CAPTIONS}


def test_splits(tmp_path):
    file = karpathy(tmp_path)
    assert read(file, split="test") == {"two.jpg": CAPTIONS["two.jpg"]}
    assert read(file, split="train") == {"one.jpg": CAPTIONS["one.jpg"]}
    with pytest.raises(CSDiffError, match="expected the split 'val', found restval, test"):
        open_source(file, split="val")
    rows = [{"split": split, "image_file": f"val2014/{n}", "description": CAPTIONS[n][0]} for n, split in
            (("one.jpg", "train"), ("two.jpg", "test"))]  # fmt: skip
    (tmp_path / "docci_descriptions.jsonlines").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "docci_descriptions.jsonlines", split="test") == {"two.jpg": ["a blue square"]}


def test_pictures_elsewhere_and_damaged_files(tmp_path):
    file = tmp_path / "results_20130124.token"
    file.write_text("one.jpg#0\ta red square\n")
    with pytest.raises(CSDiffError, match=r"expected its images beside it \(one.jpg in .*captions_file"):
        open_source(file)
    assert read(pictures(tmp_path / "far/away"), captions_file=file) == {"one.jpg": ["a red square"]}
    for content in ('{"images": [{"id": 1}], "annotations": []}', '{"images": [', '{"images": [{"sentences": 1}]}'):
        (tmp_path / "coco.json").write_text(content)
        with pytest.raises(CSDiffError, match=r"coco\.json"):
            open_source(tmp_path / "coco.json")
