"""Rows a second that a core reads from an embedding store, against others; images a second that `embed` encodes.

    python benchmarks/store.py            # the table, a few minutes and 3 GB in the temporary folder
    python benchmarks/store.py --quick    # half a minute

Prints markdown. A row is a pair: one text and one image embedding in float16, read as float32 tensors. Batches of
4096 rows come in the order of a random permutation of the whole store, except for embedding-reader, which reads one
column from start to end only (its row counts as half a pair). Everything is in the page cache, every contestant has
one thread of torch and a process of its own, and time is that of the process's processors, so that other work on the
machine weighs little. "First pass" starts with the store just opened; "later" is the median of the passes after it.
Memory is what the process holds more at the end than before it opened the store, mapped pages included. "embed" reads
2,000 images of 256 x 192 with four captions each from a folder and encodes them with the shipped CLIP; images a second
are those of a core's processor time, start-up left out, and as the clock saw them on a machine that may be shared.
"""

import argparse
import contextlib
import datetime
import json
import multiprocessing
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from csdiff.embeddings import EmbedConfig, EmbeddingStore, StoreBatches, embed, write_store

BATCH = 4096
SHARD = 10_000


def write_inputs(folder: Path, rows: int, dim: int) -> None:
    """The same pairs as a store and as a data set of `datasets`."""
    from datasets import Dataset, Features, List, Value

    draw = torch.Generator().manual_seed(0)
    pairs = [torch.randn(rows, dim, generator=draw).half() for _ in range(2)]
    write_store(folder / "store", text_embeds=pairs[0], image_embeds=pairs[1], shard_size=SHARD)
    import pyarrow as pa

    columns = [pa.FixedSizeListArray.from_arrays(pa.array(side.numpy().reshape(-1)), dim) for side in pairs]
    features = Features({name: List(Value("float16"), dim) for name in ("text", "image")})
    Dataset(pa.table(columns, names=["text", "image"]), info=None).cast(features).save_to_disk(folder / "datasets")


def csdiff(folder: Path) -> Iterator[float]:
    batches = StoreBatches(EmbeddingStore.open(folder / "store", verify=False), BATCH)
    while True:
        for _ in range(batches.epoch_size):
            batches.read(batches.step)
            batches.step += 1
        yield batches.epoch_size * BATCH


def numpy_by_hand(folder: Path) -> Iterator[float]:
    """What one writes first: numpy's memory maps, fancy indexing shard by shard, and a conversion."""
    sides = [
        [np.load(file, mmap_mode="r") for file in sorted((folder / f"store/{side}").iterdir(), key=number)]
        for side in ("text_emb", "img_emb")
    ]
    rows, dim = sum(map(len, sides[0])), sides[0][0].shape[1]
    while True:
        order = np.random.default_rng(0).permutation(rows)
        for start in range(0, rows - BATCH + 1, BATCH):
            index = order[start : start + BATCH]
            shard, local = index // SHARD, index % SHARD
            for side in sides:
                out = np.empty((BATCH, dim), np.float32)
                for k in np.unique(shard):
                    out[shard == k] = side[k][local[shard == k]]
                torch.from_numpy(out)
        yield rows // BATCH * BATCH


def hugging_face(folder: Path) -> Iterator[float]:
    from datasets import load_from_disk

    dataset = load_from_disk(folder / "datasets").with_format("torch", dtype=torch.float32)
    while True:
        order = np.random.default_rng(0).permutation(len(dataset))
        for start in range(0, len(dataset) - BATCH + 1, BATCH):
            batch = dataset[order[start : start + BATCH]]
            assert batch["text"].shape[0] == batch["image"].shape[0] == BATCH
        yield len(dataset) // BATCH * BATCH


def embedding_reader(folder: Path) -> Iterator[float]:
    from embedding_reader import EmbeddingReader

    reader = EmbeddingReader(str(folder / "store/img_emb"), file_format="npy")
    while True:
        rows = 0
        for embeddings, _ in reader(batch_size=BATCH, show_progress=False):
            rows += len(torch.from_numpy(np.ascontiguousarray(embeddings)).float())
        yield rows / 2


CONTESTANTS: dict[str, tuple[Callable, str]] = {
    "csdiff": (csdiff, "random"),
    "numpy memory maps by hand": (numpy_by_hand, "random"),
    "datasets": (hugging_face, "random"),
    "embedding-reader": (embedding_reader, "sequential"),
}


def number(file: Path) -> int:
    return int(file.stem.rpartition("_")[2])


def resident() -> int:
    with contextlib.suppress(OSError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    return 0


def measure(name: str, folder: Path, seconds: float, result) -> None:
    """Rows a second of CPU time in the first pass, in later ones, and the growth of the process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for file in (folder / "store").rglob("*.npy"):
        file.read_bytes()  # into the page cache
    try:
        passes, rates, before = CONTESTANTS[name][0](folder), [], None
        started = time.monotonic()
        while len(rates) < 2 or (time.monotonic() - started < seconds and len(rates) < 20):
            before = resident() if before is None else before
            clock = time.process_time()
            rows = next(passes)
            rates.append(rows / (time.process_time() - clock))
        result.put((rates[0], statistics.median(rates[1:]), resident() - before))
    except ImportError:
        result.put(None)


def embed_images(folder: Path, count: int) -> None:
    """Prints the images a second of `csdiff embed`, and the processor time of one."""
    draw = np.random.default_rng(0)
    words = [
        "a",
        "the",
        "red",
        "small",
        "cat",
        "dog",
        "house",
        "tree",
        "runs",
        "under",
        "green",
        "hat",
        "apple",
        "night",
    ]
    (folder / "images").mkdir()
    lines = []
    for name in (f"{i:05d}.jpg" for i in range(count)):
        small = Image.fromarray(draw.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((256, 192), Image.Resampling.BICUBIC).save(folder / "images" / name, quality=85)
        captions = [" ".join(draw.choice(words, draw.integers(4, 14))) for _ in range(4)]
        lines.append(json.dumps({"file_name": name, "captions": captions}))
    (folder / "images/metadata.jsonl").write_text("\n".join(lines))
    options = {"device": "cpu", "progress": False, "batch_size": 32}
    # What is loaded once is left out: a first run over one image.
    (folder / "first.jsonl").write_text(lines[0].replace('"file_name": "', '"file_name": "images/'))
    embed(EmbedConfig(source=str(folder / "first.jsonl"), output=str(folder / "one"), **options))
    clock, started = time.process_time(), time.monotonic()
    embed(EmbedConfig(source=str(folder / "images"), output=str(folder / "many"), **options))
    clock, wall = time.process_time() - clock, time.monotonic() - started
    print(f"\nembed: {count:,} images with four captions each, {torch.get_num_threads()} threads: ", end="")
    print(f"{count / clock:,.0f} images/s a core ({clock / count * 1e3:.1f} ms each), {count / wall:,.0f} images/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small store, one second a contestant")
    parser.add_argument("--rows", type=int, help="rows of the stores (default 200,000; quick 30,000)")
    parser.add_argument("--dims", type=int, nargs="+", help="widths (default 768 1280; quick 768)")
    options = parser.parse_args()
    rows = options.rows or (30_000 if options.quick else 200_000)
    context = multiprocessing.get_context("spawn")
    print(f"{platform.machine()}, {datetime.date.today()}, torch {torch.__version__}, {rows:,} rows\n")
    print("| reader | order | dim | rows/s a core, first pass | later | of csdiff | memory |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for dim in options.dims or ((768,) if options.quick else (768, 1280)):
        folder = Path(tempfile.mkdtemp(prefix="store-benchmark-"))
        try:
            write_inputs(folder, rows, dim)
            reference = None
            for name, (_, order) in CONTESTANTS.items():
                result = context.Queue()
                process = context.Process(target=measure, args=(name, folder, 1 if options.quick else 8, result))
                process.start()
                found = result.get()
                process.join()
                if found is None:
                    print(f"| {name} | {order} | {dim} | not installed | | | |", flush=True)
                    continue
                first, later, memory = found
                reference = reference or later
                line = f"| {name} | {order} | {dim} | {first:,.0f} | {later:,.0f} | {later / reference:.2f} "
                print(f"{line}| {memory / 2**20:,.0f} MB |", flush=True)
        finally:
            shutil.rmtree(folder)
    with tempfile.TemporaryDirectory(prefix="store-benchmark-") as folder:
        embed_images(Path(folder), 500 if options.quick else 2000)


if __name__ == "__main__":
    main()
