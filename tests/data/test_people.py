"""What people really have on disk: the cases that were reported, and their kinds."""

import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csdiff.data import Item, Problem, open_source
from csdiff.data.items import SourceOptions
from csdiff.data.listing import data_files
from csdiff.data.tables import UnreadableText, decode_text
from csdiff.errors import CSDiffError
from tests.data.test_data_sources import archive


@pytest.fixture
def image(pictures):
    """`image(path)` puts one there."""

    def put(*paths):
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(pictures / "0.png") as opened:
                opened.save(path, "PNG")
        return paths[0].parent

    return put


def captions(source):
    return {item.path: item.captions for item in source if isinstance(item, Item)}


def problems(source):
    return [item.reason for item in source if isinstance(item, Problem)]


def tar(path, names, pictures):
    """An archive in which texts say c, and everything else is a picture."""
    image = (pictures / "0.png").read_bytes()
    return archive(path, {n: b'{"text": "c"}' if n.endswith((".txt", ".json")) else image for n in names})


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("IMG.2020.1.jpg IMG.2020.1.txt IMG.2020.2.jpg IMG.2020.2.txt", {"IMG.2020.1.jpg": 1, "IMG.2020.2.jpg": 1}),
        ("a.jpg a.txt a.seg.png b.jpg b.txt", {"a.jpg": 1, "b.jpg": 1}),
        ("a.jpg a.prompt.txt", {"a.jpg": 1}),
        ("v1.5/a.b.png v1.5/a.b.json", {"v1.5/a.b.png": 1}),
        ("IMG.1.jpg IMG.2.jpg", {"IMG.1.jpg": 0, "IMG.2.jpg": 0}),
        ("._a.jpg a.jpg a.txt __MACOSX/a.jpg", {"a.jpg": 1}),
        ("a.input.jpg a.target.jpg a.txt", "ambiguous_entry"),
    ],
)
def test_names_in_archives(names, expected, tmp_path, pictures):
    source = open_source(tar(tmp_path / "x.tar", names.split(), pictures))
    if isinstance(expected, str):
        assert problems(source) == [expected]
        assert "target.jpg" in next(iter(source)).detail
    else:
        assert {name: len(texts) for name, texts in captions(source).items()} == expected
        assert not problems(source)


def test_every_file_that_pillow_opens_and_the_others_counted(tmp_path, image):
    read = ["a.png", "b.jfif", "c.avif", "e.jpe", "f.PNG", "h.jp2", "noending", "i.jpg_large"]
    image(*(tmp_path / name for name in read))
    hidden = ["._a.png", "Thumbs.db", ".ipynb_checkpoints/0.png", "__MACOSX/z.png"]
    for name in ["d.heic", "d2.heic", "x.docx", "y.svg", *hidden]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"nothing that Pillow knows")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/loop").symlink_to(tmp_path)
    source = open_source(tmp_path)
    assert set(captions(source)) == set(read)
    assert {ending: entry["count"] for ending, entry in source.not_read.items()} == {".heic": 2, ".docx": 1, ".svg": 1}
    assert source.not_read[".heic"]["first"] == ["d.heic", "d2.heic"]


def test_texts_beside_images(tmp_path, image):
    image(*(tmp_path / f"{name}.png" for name in ("a", "b", "c", "d")), tmp_path / "00000/000.jpg")
    (tmp_path / "a.caption").write_text("one\x0bline\u2028still\r\ntwo\n", newline="")
    (tmp_path / "b.png.txt").write_bytes("\ufeffwide".encode("utf-16-le"))
    (tmp_path / "c.TXT").write_text("upper")
    (tmp_path / "d.txt").write_bytes(b"it\x92s Excel's")
    # img2dataset's layout of files
    (tmp_path / "00000/000.txt").write_text("from the web")
    (tmp_path / "00000/000.json").write_text('{"caption": "from the web", "key": "000"}')
    (tmp_path / "00000_stats.json").write_text("{}")
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["from the web"]}), tmp_path / "00000.parquet")
    source = open_source(tmp_path)
    assert captions(source) == {
        "00000/000.jpg": ["from the web"],
        "a.png": ["one\x0bline\u2028still", "two"],
        "b.png": ["wide"],
        "c.png": ["upper"],
    }
    (problem,) = [item for item in source if isinstance(item, Problem)]
    assert problem.reason == "unreadable_caption"
    assert "0x92" in problem.detail


@pytest.mark.parametrize("base", ["", "data/"])
def test_metadata_in_split_folders(tmp_path, image, base):
    for split in ("train", "test"):
        image(tmp_path / base / split / "a.png")
        (tmp_path / base / split / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": split}))
    for split in ("train", "test"):
        assert captions(open_source(tmp_path, split=split)) == {f"{base}{split}/a.png": [split]}
    assert len(captions(open_source(tmp_path, split="all"))) == 2
    with pytest.raises(CSDiffError, match=r"'validation'.*test, train"):
        open_source(tmp_path, split="validation")


def test_split_folders_without_tables_and_a_class_called_train(tmp_path, image):
    image(tmp_path / "a/train/1.png", tmp_path / "a/test/2.png", tmp_path / "b/train/1.png", tmp_path / "b/bus/2.png")
    assert list(captions(open_source(tmp_path / "a", split="test"))) == ["test/2.png"]
    assert len(captions(open_source(tmp_path / "b"))) == 2


def test_a_data_set_of_the_hub_as_it_lies_on_disk(tmp_path, pictures):
    content = (pictures / "0.png").read_bytes()
    for name in ("en/train-00000-of-00001", "en/dev-00000-of-00001", "de/train-00000-of-00001"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        table = pa.table({"image": [{"bytes": content, "path": None}], "text": [name]})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    config = "- config_name: {0}\n  data_files:\n  - split: train\n    path: {0}/train-*\n"
    configs = config.format("en") + config.format("de")
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n{configs}---\n# A card\n")
    (item,) = open_source(tmp_path, subset="de")
    assert item.captions == ["de/train-00000-of-00001"]
    for options, found in (({}, "en, de"), ({"subset": "fr"}, "en, de"), ({"subset": "en", "split": "test"}, "train")):
        with pytest.raises(CSDiffError, match=found):
            open_source(tmp_path, **options)
    (tmp_path / "README.md").unlink()
    names = ["a-train.csv", "val/b.csv", "test_1.csv", "latest.csv"]
    assert data_files(tmp_path, names, SourceOptions("valid")) == ["val/b.csv"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", b'image,caption\n1.jpg,A child .\n1.jpg,"A girl, going in"\n'),
        ("c.csv", "filepath\ttitle\n1.jpg\tA child .\n1.jpg\tA girl, going in\n".encode("utf-16")),
        ("c.csv", b"\xef\xbb\xbffile_name;caption\r\n1.jpg;A child .\r\n1.jpg;A girl, going in\r\n"),
        ("c.jsonlines", b'{"image": "1.jpg", "text": ["A child .", "A girl, going in"]}\n'),
        ("c.tsv", b"image|caption\n1.jpg|A child .\n1.jpg|A girl, going in"),
        ("x.token.txt", b"1.jpg#0\tA child .\n1.jpg#1\tA girl, going in\n"),
        ("c.csv", b'image,caption\r1.jpg,A child .\r1.jpg,"A girl, going in"'),
    ],
)
def test_tables_of_all_makes(name, content, tmp_path, image):
    images = image(tmp_path / "Images/1.jpg")
    (tmp_path / name).write_bytes(content)
    for source in (open_source(images, captions_file=tmp_path / name), open_source(tmp_path / name)):
        assert captions(source) == {"1.jpg": ["A child .", "A girl, going in"]}


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (b"image,caption\n1.png,it\x92s\n", ["line 2", "0x92", "UTF-8"]),
        (b"A child .\nA girl\n", ["cannot be matched", "image_column"]),
        (b"1.png,A child .\n", ["1.png", "image,caption"]),
        (b"image,caption\n1.png,a,b\n", ["line 2", "quotes"]),
    ],
)
def test_captions_that_cannot_be_matched_are_a_sentence(content, facts, tmp_path, image):
    (tmp_path / "captions.txt").write_bytes(content)
    with pytest.raises(CSDiffError) as error:
        open_source(image(tmp_path / "images/1.png"), captions_file=tmp_path / "captions.txt")
    assert all(fact in str(error.value) for fact in facts)


def test_captions_that_nobody_named_are_not_lost(tmp_path, image):
    image(tmp_path / "a/x.png", tmp_path / "b/images/x.png")
    (tmp_path / "a/list.csv").write_text("what,where\na cat,x.png\n")
    (tmp_path / "b/texts").mkdir()
    (tmp_path / "b/texts/x.txt").write_text("a cat")
    for folder, fact in (("a", "captions_file"), ("b", "texts/x.txt")):
        with pytest.raises(CSDiffError, match=fact):
            open_source(tmp_path / folder)
    (tmp_path / "a/list.csv").write_text("about,nothing\n1,2\n")
    assert open_source(tmp_path / "a").not_read[".csv"]["count"] == 1


def test_images_outside_the_source(tmp_path, image):
    image(tmp_path / "out.png", tmp_path / "in/sub/a.png")
    names = ["../out.png", str(tmp_path / "out.png"), "sub/../sub/a.png", str(tmp_path / "in/sub/a.png"), "sub\\a.png"]
    (tmp_path / "in/metadata.jsonl").write_text("\n".join(json.dumps({"file_name": n, "text": "t"}) for n in names))
    reasons = [getattr(item, "reason", None) for item in open_source(tmp_path / "in")]
    assert reasons == ["outside_image", "outside_image", None, None, None]
    assert not problems(open_source(tmp_path / "in", allow_outside=True))
    rows = [{"image": {"bytes": None, "path": name}, "text": "t"} for name in names[:3]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in/x.parquet")
    assert problems(open_source(tmp_path / "in/x.parquet")) == ["outside_image"] * 2
    assert not problems(open_source(tmp_path / "in/x.parquet", allow_outside=True))


def test_text_is_never_guessed():
    assert decode_text("a\x85b\u2029c\nd".encode()) == "a\x85b\u2029c\nd"
    assert decode_text("plain words".encode("utf-16-be")) == "plain words"
    with pytest.raises(UnreadableText, match="line 2"):
        decode_text("a\n日本".encode("shift_jis"))


def test_names_in_other_encodings_and_long_fields(tmp_path, image):
    image(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")))
    (tmp_path / "metadata.csv").write_bytes(b'file_name,caption\ncaf.png,"' + b"x" * 200_000 + b'"\n')
    (item,) = open_source(tmp_path)
    assert item.reason == "missing_image"
    (tmp_path / "metadata.csv").unlink()
    (item,) = open_source(tmp_path)
    assert item.id.encode() == b"caf\\udce9.png"
    assert item.image.is_file()
