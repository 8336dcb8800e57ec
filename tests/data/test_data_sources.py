"""Every form in which captions and images come gives the same items."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from csdiff.data import Problem, decode_image, open_source
from csdiff.errors import CSDiffError

EXPECTED = [["thing 0", "thing zero"], ["thing 1"], ["thing 2"], ["thing 3"], ["thing 4"], ["thing 5"]]


def archive(path, members):
    """A tar file of these members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return path


def taken_table(folder):
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").unlink()
    return pa.Table.from_pylist(rows)


def as_csv(folder):
    pa.csv.write_csv(taken_table(folder), folder / "metadata.csv")
    return folder


def as_parquet_table(folder):
    pq.write_table(taken_table(folder), folder / "metadata.parquet")
    return folder


def as_table_file(folder):
    return (folder / "metadata.jsonl").rename(folder / "list.jsonl")


def as_parquet_with_images(folder):
    rows = [
        {"image": {"bytes": (folder / f"{i}.png").read_bytes(), "path": f"{i}.png"}, "captions": captions}
        for i, captions in enumerate(EXPECTED)
    ]
    path = folder.parent / "parquet"
    path.mkdir()
    # Row groups and files end in the middle of units.
    pq.write_table(pa.Table.from_pylist(rows[:5]), path / "train-00000.parquet", row_group_size=2)
    pq.write_table(pa.Table.from_pylist(rows[5:]), path / "train-00001.parquet")
    pq.write_table(pa.Table.from_pylist(rows[:1]), path / "test.parquet")
    return path


def as_saved_dataset(folder):
    from datasets import Dataset, Features, Image, List, Value

    features = Features({"picture": Image(), "captions": List(Value("string"))})
    rows = {"picture": [str(folder / f"{i}.png") for i in range(6)], "captions": EXPECTED}
    Dataset.from_dict(rows, features=features).save_to_disk(folder.parent / "saved", num_shards=1)
    return folder.parent / "saved"


def as_tar_files(folder):
    path = folder.parent / "shards"
    path.mkdir()
    for shard, indices in (("00000", (0, 1, 2, 3)), ("00001", (4, 5))):
        members = {}
        for index in indices:
            members[f"{index:04d}.png"] = (folder / f"{index}.png").read_bytes()
            if index % 2:
                members[f"{index:04d}.json"] = json.dumps({"caption": EXPECTED[index][0]}).encode()
            else:
                members[f"{index:04d}.txt"] = "\n".join(EXPECTED[index]).encode()
        archive(path / f"{shard}.tar", members)
    return path


FORMS = [lambda folder: folder, as_csv, as_parquet_table, as_table_file]
FORMS += [as_parquet_with_images, as_saved_dataset, as_tar_files]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_every_form_gives_the_same_items(form, captioned, pictures):
    path = form(captioned)
    source = open_source(path)
    items = list(source)
    assert (source.has_images, source.has_captions) == (True, True)
    assert source.count in (6, None)
    assert [item.captions for item in items] == EXPECTED
    found = [decode_image(item.image).tobytes() for item in items]
    assert found == [Image.open(pictures / f"{i}.png").tobytes() for i in range(6)]
    # Units cover the source in order whatever their size.
    ids = [item.id for item in items]
    assert len(set(ids)) == 6
    for size in (1, 2, 5, 100):
        assert [item.id for unit in range(source.units(size)) for item in source.read(unit, size)] == ids
    # The identity is JSON, and changes with the data.
    identity = source.identity()
    assert json.loads(json.dumps(identity)) == identity == open_source(path).identity()
    if (path / "metadata.jsonl").is_file():
        with (path / "metadata.jsonl").open("a") as file:
            file.write(json.dumps({"file_name": "5.png", "text": "another"}) + "\n")
        assert open_source(path).identity() != identity


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.txt", "a cat\n\na dog\n"),
        ("captions.csv", 'caption,source\n"a cat",x\n"",x\n"a dog",x\n'),
        ("captions.json", '["a cat", "", "a dog"]'),
        ("captions.jsonl", '{"text": ["a cat"]}\n{"text": null}\n{"text": "a dog"}\n'),
    ],
)
def test_captions_alone(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    source = open_source(tmp_path / name)
    assert not source.has_images
    assert [item.captions for item in source] == [["a cat"], [""], ["a dog"]]


def test_captions_file_beside_the_folder_and_named_columns(pictures, tmp_path):
    table = tmp_path / "table.tsv"
    table.write_text("where\twhat\tstyle\n2.png\ta\tx\n4.png\tb\ty\n")
    columns = {"image_column": "where", "caption_column": "what", "metadata_columns": ["style"]}
    items = open_source(pictures, captions_file=table, **columns)
    assert [(item.id, item.captions, item.extra) for item in items] == [
        ("2.png", ["a"], {"style": "x"}),
        ("4.png", ["b"], {"style": "y"}),
    ]


@pytest.mark.parametrize("truncated", [True, False])
def test_a_damaged_archive_gives_what_is_before_the_damage(captioned, truncated):
    path = as_tar_files(captioned)
    content = (path / "00000.tar").read_bytes()
    with tarfile.open(path / "00000.tar") as tar:
        place = tar.getmember("0002.png").offset
    damaged = content[: place + 600] if truncated else content[:place] + b"\xff" * 8 + content[place + 8 :]
    (path / "00000.tar").write_bytes(damaged)
    items = list(open_source(path))
    assert [item.captions for item in items[:2]] == EXPECTED[:2]
    assert [item.reason for item in items if isinstance(item, Problem)] == ["unreadable_archive"]
    assert items[-1].captions == EXPECTED[5]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nothing", None, "expected a folder, a file or the id"),
        ("{0..3}.tar", None, r"0\.tar: expected a tar file"),
        ("x.csv", "a,b\n1,2,3\n", r"x\.csv .*line 2 has not 2 fields"),
        ("x.jsonl", '{"text": "a"}\n{"text"\n', "line 2"),
        ("x.csv", "one,two\n1,2\n", "expected a column of captions .* found .one., .two."),
        ("x.parquet", "no parquet", r"x\.parquet is not a readable parquet file"),
        ("x.doc", "", r"found '\.doc'"),
        ("notes/a.md", "", "expected images"),
        ("x.csv", "caption\na\n", r"expected the column 'titel' \(caption_column\), found caption"),
    ],
)
def test_what_is_no_source_is_refused_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    column = "titel" if "titel" in message else None
    with pytest.raises(CSDiffError, match=message) as error:
        open_source(path.parent if path.suffix == ".md" else path, caption_column=column)
    assert "\n" not in str(error.value)


def test_a_pipe_is_not_run():
    with pytest.raises(CSDiffError, match="expected a tar file"):
        open_source("pipe:echo hello.tar")
