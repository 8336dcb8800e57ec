"""Reading stores: ours and foreign ones, whole and damaged ones, small ones and one far larger than memory."""

import json
import os
import shutil
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_plain_store

from csdiff.embeddings import EmbeddingStore, write_store
from csdiff.errors import CSDiffError

FILE = "img_emb/img_emb_1.npy"


def rows(n, dim, seed=0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) * 3


def write_shards(path, lengths, dtype="float32"):
    """A foreign store with shards of these lengths."""
    text, image = rows(sum(lengths), 5).numpy().astype(dtype), rows(sum(lengths), 7, 1).numpy().astype(dtype)
    edges = np.cumsum([0, *lengths])
    for name, array in (("text_emb", text), ("img_emb", image)):
        (path / name).mkdir(parents=True)
        for number, (start, stop) in enumerate(pairwise(edges)):
            np.save(path / name / f"{name}_{number}.npy", array[start:stop])
    return text, image


def open_foreign(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return EmbeddingStore.open(path, **options)


@pytest.mark.parametrize("lengths", [[23], [4, 0, 9, 1, 12], [1] * 11], ids=str)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rows_come_in_the_order_asked_for(tmp_path, lengths, dtype):
    text, image = write_shards(tmp_path, lengths, dtype)
    store = open_foreign(tmp_path)
    assert (len(store), store.text_dim, store.image_dim) == (len(text), 5, 7)
    drawn = np.random.default_rng(0).integers(0, len(text), 40)
    for indices in (drawn, [len(text) - 1, 0, 0], torch.arange(len(text)).flip(0), [], slice(2, 9)):
        batch = store.read(indices)
        asked = indices if isinstance(indices, slice) else np.asarray(indices, dtype=int)
        assert batch["text_embeds"].dtype == batch["image_embeds"].dtype == torch.float32
        assert np.array_equal(batch["text_embeds"], text[asked].astype(np.float32))
        assert np.array_equal(batch["image_embeds"], image[asked].astype(np.float32))
    blocks = torch.cat([block["image_embeds"] for block in store.blocks(6)])
    assert np.array_equal(blocks, image.astype(np.float32))


def test_wrong_rows_and_columns_are_refused(plain_store):
    store = open_foreign(plain_store)
    for bad in (-1, len(store)):
        with pytest.raises(IndexError, match=f"row {bad} is outside 0..{len(store) - 1}"):
            store.read([0, bad])
    with pytest.raises(KeyError, match="has no text_states; it has text_embeds, image_embeds"):
        store.read([0], keys=["text_states"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_what_is_written_is_read_rounded_to_the_dtype(tmp_path, dtype):
    states, mask = rows(25, 12).reshape(25, 4, 3), torch.arange(4)[None] < (torch.arange(25) % 4 + 1)[:, None]
    given = {"text_embeds": rows(25, 5), "image_embeds": rows(25, 7, 1), "text_states": states, "text_mask": mask}
    write_store(tmp_path / "s", **given, captions=[f"c{i}" for i in range(25)], dtype=dtype, shard_size=10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a store of ours has nothing unknown
        store = EmbeddingStore.open(tmp_path / "s")
    batch = store.read(range(25))
    assert batch.keys() == given.keys()
    for key, column in given.items():
        expected = column if key == "text_mask" else column.to(getattr(torch, dtype)).float()
        assert torch.equal(batch[key], expected), key
    assert store.captions([24, 0]) == ["c24", "c0"]
    assert store.fingerprint["dtype"] == dtype
    assert not store.normalized
    store.verify()


def test_statistics_are_those_of_the_rows_stored(tmp_path):
    image = rows(2500, 7, 1) + torch.arange(7)
    write_store(tmp_path / "s", image_embeds=image, text_embeds=rows(2500, 5), dtype="float32", shard_size=999)
    stated = EmbeddingStore.open(tmp_path / "s").statistics
    (tmp_path / "s/csdiff.json").unlink()
    measured = open_foreign(tmp_path / "s").statistics
    for found in (stated, measured):
        assert found.count == 2500
        torch.testing.assert_close(found.mean, image.double().mean(0).float())
        torch.testing.assert_close(found.std, image.double().std(0, correction=0).float())
        assert found.norm_mean == pytest.approx(float(image.double().norm(dim=1).mean()), rel=1e-6)
        assert found.norm_std == pytest.approx(float(image.double().norm(dim=1).std(correction=0)), rel=1e-6)


def test_a_foreign_store_warns_of_what_is_unknown(plain_store):
    with pytest.warns(UserWarning, match=r"no csdiff\.json: unknown are .*encoders.*tokenizer.*norms vary") as caught:
        store = EmbeddingStore.open(plain_store)
    assert len(caught) == 1
    assert store.fingerprint is None
    assert not store.normalized
    assert store.captions([3]) == ["a picture of thing 3"]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_unit_norm_rows_are_recognised(tmp_path, dtype):
    unit = torch.nn.functional.normalize(rows(20, 7))
    write_store(tmp_path, image_embeds=unit, dtype=dtype)
    assert EmbeddingStore.open(tmp_path).normalized
    (tmp_path / "csdiff.json").unlink()
    with pytest.warns(UserWarning, match="all rows sampled have norm 1"):
        assert EmbeddingStore.open(tmp_path).normalized


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"img_emb_1\.npy is missing \(sha256 expected [0-9a-f]{64}, found no file\)"),
        (flip_a_byte, r"img_emb_1\.npy is damaged: .* sha256 [0-9a-f]{64}, found .* with [0-9a-f]{64}"),
        (lambda f: f.write_bytes(f.read_bytes()[:-9]), r"img_emb_1\.npy is damaged: .* sha256 .*, found .* with"),
    ],
    ids=["missing", "flipped", "truncated"],
)
def test_a_bad_shard_is_named_with_both_checksums(tmp_path, damage, message):
    write_store(tmp_path, image_embeds=rows(20, 7), text_embeds=rows(20, 5), shard_size=8)
    damage(tmp_path / "img_emb/img_emb_1.npy")
    with pytest.raises(CSDiffError, match=message):
        EmbeddingStore.open(tmp_path)
    # Large stores leave the checksums to `verify`.
    with pytest.raises(CSDiffError, match=message):
        EmbeddingStore.open(tmp_path, verify=False).verify()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: np.save(p / FILE, rows(3, 7)), "shard 1 has 4 rows in text_emb and 3 rows in img_emb"),
        (lambda p: (p / FILE).unlink(), "shard 1 has 4 rows in text_emb and no file in img_emb"),
        (lambda p: np.save(p / FILE, rows(4, 6)), r"img_emb_1\.npy: expected rows of \(7,\)"),
        (lambda p: np.save(p / FILE, np.array([{}, 1])), r"img_emb_1\.npy"),
        (lambda p: np.save(p / FILE, torch.ones(4)), r"img_emb_1\.npy: expected .* 2 dimensions"),
        (lambda p: np.save(p / FILE, np.asfortranarray(rows(4, 7).numpy())), "in Fortran order"),
        (lambda p: np.save(p / FILE, rows(4, 7).numpy().astype(">f4")), "expected float16"),
        (lambda p: (p / FILE).write_bytes((p / FILE).read_bytes()[:-4]), r"img_emb_1\.npy"),
        (lambda p: (p / FILE).write_bytes((p / FILE).read_bytes() + b"1234"), r"img_emb_1\.npy is damaged"),
        (lambda p: (p / FILE).write_bytes(b"PK"), r"img_emb_1\.npy is not a whole npy file"),
        (lambda p: [shutil.rmtree(p / name) for name in ("img_emb", "text_emb")], "the clip-retrieval layout"),
        (lambda p: (p / "csdiff.json").write_text("{"), r"csdiff\.json: expected JSON"),
        (lambda p: (p / "csdiff.json").write_text('{"kind": "adapter"}'), 'expected "kind": "store", found'),
        (lambda p: (p / ".partial").mkdir(), "not finished; run the same `csdiff embed` again"),
    ],
)
def test_foreign_folders_that_do_not_fit_together(tmp_path, spoil, message):
    write_shards(tmp_path, [6, 4])
    spoil(tmp_path)
    with pytest.raises(CSDiffError, match=message) as error:
        open_foreign(tmp_path)
    assert "\n" not in str(error.value)


def test_metadata_of_another_length_or_none(tmp_path):
    make_plain_store(tmp_path, n=10)
    make_plain_store(tmp_path / "other", n=11)
    shutil.copy(tmp_path / "other/metadata/metadata_0.parquet", tmp_path / "metadata/metadata_0.parquet")
    with pytest.raises(CSDiffError, match="shard 0 has 10 rows in text_emb and 11 rows in metadata"):
        open_foreign(tmp_path)
    shutil.rmtree(tmp_path / "metadata")
    store = open_foreign(tmp_path)
    for ask in (lambda: store.captions([0]), store.image_numbers):
        with pytest.raises(CSDiffError, match=r"expected the column '.*' in metadata"):
            ask()


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files")
def test_a_large_store_is_mapped_not_read(tmp_path):
    count, width = 500_000, 1280
    (tmp_path / "img_emb").mkdir()
    with (tmp_path / "img_emb/img_emb_0.npy").open("wb") as file:
        header = {"descr": "<f2", "fortran_order": False, "shape": (count, width)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        # Holes: 1.3 GB that take no space.
        file.truncate(start + count * width * 2)
        for row in (7, count - 1):
            file.seek(start + (row * width + 3) * 2)
            file.write(np.float16(row % 5).tobytes())

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident()
    store = open_foreign(tmp_path)
    assert (len(store), store.image_dim) == (count, width)
    assert store.read([count - 1, 7, count - 1])["image_embeds"][:, 3].tolist() == [4, 2, 4]
    assert resident() - before < count * width


def test_more_shards_than_a_process_may_have_open_files(tmp_path):
    import resource

    (tmp_path / "img_emb").mkdir()
    for number in range(80):
        np.save(tmp_path / f"img_emb/img_emb_{number}.npy", torch.full((2, 3), float(number + 1)))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        assert open_foreign(tmp_path).read(slice(None))["image_embeds"][::2, 0].tolist() == list(range(1, 81))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_row_that_is_not_finite_is_named_wherever_it_is_read(tmp_path, value):
    write_shards(tmp_path, [20_000, 50])

    def spoil(name, where):
        array = np.load(tmp_path / name)
        array[where] = value
        np.save(tmp_path / name, array)

    spoil("img_emb/img_emb_0.npy", 3)
    store = open_foreign(tmp_path)
    for read in (lambda: store.read([9, 3, 20_001]), lambda: list(store.blocks(999)), lambda: store.statistics):
        with pytest.raises(CSDiffError, match=r"row 3 of img_emb/img_emb_0\.npy is not finite"):
            read()
    # A sample is looked at when the store is opened.
    spoil(FILE, slice(None))
    with pytest.raises(CSDiffError, match=r"row \d+ of img_emb/img_emb_1\.npy is not finite"):
        open_foreign(tmp_path)


@pytest.mark.parametrize("kind", ["zeros", "unit rows", "constant"])
def test_rows_of_zeros_unit_rows_among_raw_ones_and_constants_are_warned_of(tmp_path, kind):
    image = rows(1000, 16)
    without = image * (torch.arange(1000) % 10 != 3)[:, None]
    mixed = torch.cat([image[:600], torch.nn.functional.normalize(image[600:])])
    values, message = {
        "zeros": (without, r"10\.0% .*row 3 of img_emb/img_emb_0\.npy.*zeros"),
        "unit rows": (mixed, r"40\.\d% .*row 0 of .*_1\.npy.*norm 1"),
        "constant": (torch.ones(1000, 16), r"100\.0% of the image rows looked at, .* are the same"),
    }[kind]
    write_store(tmp_path, image_embeds=values, shard_size=600)
    (tmp_path / "csdiff.json").unlink()
    with pytest.warns(UserWarning, match=message):
        assert not EmbeddingStore.open(tmp_path).normalized


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_encoder", "openai/clip", "text_encoder: expected an object"),
        ("rows", "12", "rows: expected a whole number"),
        ("rows", 13, "expected 13 rows, found 12"),
        ("normalized", 1, "normalized: expected true or false"),
        ("files", [], "files: expected an object"),
        ("files", {"img_emb/a.npy": 5}, r"img_emb/a\.npy: expected bytes and sha256"),
        ("statistics", {"mean": [1, 2]}, "statistics: expected count"),
        ("statistics.std", [-1.0] * 7, "statistics: .*no deviation below 0"),
        ("text_statistics.std", [1.0] * 4, "text_statistics: .* of one length"),
        ("text_statistics.mean", [float("nan")] * 5, "text_statistics: .*finite"),
    ],
    ids=str,
)
def test_a_fingerprint_of_wrong_types_or_values_is_refused(tmp_path, name, value, message):
    write_store(tmp_path, image_embeds=rows(12, 7), text_embeds=rows(12, 5))
    content = json.loads((tmp_path / "csdiff.json").read_text())
    part, _, key = name.rpartition(".")
    (content[part] if part else content)[key] = value
    (tmp_path / "csdiff.json").write_text(json.dumps(content))
    with pytest.raises(CSDiffError, match=message) as error:
        EmbeddingStore.open(tmp_path)
    assert "csdiff.json" in str(error.value) or "rows" in name
    assert "\n" not in str(error.value)


def test_metadata_parts_of_differing_types_are_one_column(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write_shards(tmp_path, [2, 2, 2, 2])
    (tmp_path / "metadata").mkdir()
    texts = pa.array(["a", "b"]), pa.array(["c", None], pa.large_string()), pa.array(["d", "d"]).dictionary_encode()
    for number, part in enumerate((*texts, pa.nulls(2))):
        ids = pa.array([number, 7]).cast(pa.int64() if number else pa.string())
        table = pa.table({"caption": part, "image_id": ids})
        pq.write_table(table, tmp_path / f"metadata/metadata_{number}.parquet")
    store = open_foreign(tmp_path)
    assert store.captions([0, 2, 3, 5, 6]) == ["a", "c", None, "d", None]
    assert store.image_ids([0, 1, 2, 3]) == ["0", "7", "1", "7"]
    assert store.image_numbers().tolist() == [0, 1, 2, 1, 3, 1, 4, 1]


def test_files_that_the_fingerprint_does_not_list_are_no_part_of_the_store(tmp_path):
    write_store(tmp_path, image_embeds=rows(20, 7), shard_size=20)
    np.save(tmp_path / FILE, rows(4, 7))
    assert len(EmbeddingStore.open(tmp_path)) == json.loads((tmp_path / "csdiff.json").read_text())["rows"] == 20


def test_a_fingerprint_of_another_store_does_not_change_what_is_measured(tmp_path):
    values = torch.randn(6, 4)
    write_store(tmp_path / "whole", text_embeds=values, image_embeds=values, dtype="float32")
    known = EmbeddingStore.open(tmp_path / "whole").fingerprint
    write_store(tmp_path / "part", text_embeds=values[:3], image_embeds=values[:3], fingerprint=known, dtype="float32")
    assert len(EmbeddingStore.open(tmp_path / "part")) == 3
