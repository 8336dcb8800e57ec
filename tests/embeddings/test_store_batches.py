"""Shuffled batches: every row once an epoch, the same for any number of processes, resumable anywhere."""

from itertools import islice

import numpy as np
import pytest
import torch

from csdiff.embeddings import EmbeddingStore, ImageGroups, StoreBatches, write_store
from csdiff.embeddings.loader import row_order
from csdiff.errors import CSDiffError


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp("batches") / "store"
    rows = torch.arange(53).float()[:, None] * torch.tensor([1.0, -1.0])
    write_store(path, image_embeds=rows, captions=[f"row {i}" for i in range(53)], shard_size=20)
    return EmbeddingStore.open(path)


def test_orders_are_random_permutations_of_seed_and_epoch():
    orders = {(s, e): tuple(row_order(200, s, e)) for s in range(3) for e in range(3)}
    assert all(sorted(order) == list(range(200)) for order in orders.values())
    assert len(set(orders.values())) == 9
    # Each tenth of the rows is spread evenly over the tenths of the order: chi-squared, 81 degrees of freedom.
    counts = np.zeros((10, 10))
    for seed in range(100):
        np.add.at(counts, (np.arange(1000) // 100, row_order(1000, seed, 0) // 100), 1)
    # 125 is the 99.9th percentile; a permutation is a little more even than independent draws.
    assert 40 < ((counts - 1000) ** 2 / 1000).sum() < 125
    # Resuming elsewhere must continue the same order: these numbers may never change.
    assert row_order(8, 0, 0).tolist() == [0, 1, 6, 3, 5, 2, 7, 4]
    groups = ImageGroups(np.arange(12), np.arange(12) // 4)
    assert [groups.pick(np.arange(3), 0, epoch).tolist() for epoch in (0, 1, 4)] == [[1, 6, 11], [2, 7, 8], [0, 5, 10]]


def test_an_epoch_has_every_row_once_but_the_incomplete_batch(store):
    batches = StoreBatches(store, batch_size=10, seed=1)
    assert batches.epoch_size == 5
    steps = [batch["index"] for batch in islice(batches, 15)]
    epochs = [torch.cat(steps[start : start + 5]) for start in (0, 5, 10)]
    assert all(len(epoch.unique()) == 50 for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    assert batches.step == 15


def test_batches_hold_the_rows_of_a_split_with_all_that_belongs_to_them(store):
    rows = np.arange(0, 53, 3)
    batches = list(islice(StoreBatches(store, 6, rows=rows, captions=True), 3))
    assert sorted(torch.cat([batch["index"] for batch in batches]).tolist()) == rows.tolist()
    for batch in batches:
        assert torch.equal(batch["image_embeds"][:, 0], batch["index"].float())
        assert batch["captions"] == [f"row {i}" for i in batch["index"].tolist()]


IMAGES = np.random.default_rng(0).permutation(np.repeat(np.arange(20), [1, 2, 3, 4, 5, 3, 3, 3, 2, 2] * 2))[:53]


@pytest.fixture(scope="module")
def groups():
    """The rows of the store as captions of twenty images, one to five of each, in no order."""
    return ImageGroups(np.arange(53), IMAGES)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("start", [0, 5, 13])
def test_the_global_batch_is_the_same_for_any_processes_and_resumed_anywhere(
    store, groups, grouped, world_size, start
):
    given = groups if grouped else None
    whole = StoreBatches(store, 10, seed=4, groups=given)
    parts = [StoreBatches(store, 10, 4, rank, world_size, start, groups=given) for rank in range(world_size)]
    for step, split in zip(range(start, 16), zip(*parts, strict=True), strict=False):
        expected = whole.read(step)
        for key in ("index", "image_embeds"):
            assert torch.equal(torch.cat([part[key] for part in split]), expected[key])
        assert max(len(part["index"]) for part in split) - min(len(part["index"]) for part in split) <= 1


def test_an_epoch_has_one_caption_of_every_image(store, groups):
    batches = StoreBatches(store, 10, seed=5, groups=groups)
    assert (len(groups), batches.epoch_size) == (20, 2)
    steps = [IMAGES[batch["index"]] for batch in islice(batches, 8)]
    assert all(len(set(step)) == 10 for step in steps)
    assert all(sorted(np.concatenate(steps[i : i + 2])) == list(range(20)) for i in range(0, 8, 2))


def test_every_caption_of_an_image_comes_equally_often_and_at_random(groups):
    # Sixty epochs: a multiple of one to five captions.
    picked = np.stack([groups.pick(np.arange(20), 3, epoch) for epoch in range(60)])
    assert all(len(set(IMAGES[column])) == 1 for column in picked.T)
    rows, times = np.unique(picked, return_counts=True)
    assert len(rows) == 53
    assert (times * np.array([(IMAGES[row] == IMAGES).sum() for row in rows]) == 60).all()
    assert all((picked[epoch] != groups.pick(np.arange(20), 4, epoch)).any() for epoch in range(60))
    pairs = ImageGroups(np.arange(2000), np.arange(2000) // 2)
    first, second, later = (pairs.pick(np.arange(1000), 0, epoch) % 2 for epoch in (0, 1, 2))
    assert (first != second).all()
    assert 440 < first.sum() < 560
    assert 440 < (first == later).sum() < 560


def test_rows_of_one_image_are_known_by_their_identity(tmp_path):
    rows = torch.arange(10.0).reshape(5, 2)
    write_store(tmp_path / "store", image_embeds=rows, image_ids=["b", "a", "b", "c", "a"], shard_size=2)
    store = EmbeddingStore.open(tmp_path / "store")
    assert store.image_numbers().tolist() == [0, 1, 0, 2, 1]
    # The numbers do not matter, the order of appearance does.
    groups = ImageGroups(np.array([4, 3, 2]), np.array([9, 1, 5]))
    assert groups.pick(np.arange(3), 0, 0).tolist() == [4, 3, 2]


def test_a_batch_larger_than_the_data_is_refused(store):
    two_images = ImageGroups(np.arange(4), np.arange(4) // 2)
    for size, options, fact in (
        (54, {}, "53 .*rows"),
        (3, {"groups": two_images}, "2 .*images"),
        (4, {"world_size": 8}, "8 "),
    ):
        with pytest.raises(CSDiffError, match=rf"batch_size: expected .*{fact}.*found {size}"):
            StoreBatches(store, size, **options)


def test_an_error_while_reading_ahead_reaches_the_caller(store):
    with pytest.raises(KeyError, match="has no text_embeds"):
        next(iter(StoreBatches(store, 4, keys=["text_embeds"])))
