"""Data sets that captions are measured on, from local files in the formats they are published in.

- COCO captions: `annotations/captions_val2017.json` (`images`, `annotations`); images in `val2017/` beside.
- COCO and Flickr30k in Karpathy's form: `dataset_coco.json`, `dataset_flickr30k.json` (`images` with `sentences` and
  `split`); images by `filepath`, or in a folder beside.
- Flickr30k: `flickr_annotations_30k.csv` (`raw`, `filename`, `split`), `results.csv` (bars between columns), or
  `results_20130124.token`; images in `flickr30k-images/` beside.
- Urban-1k: the folder with `image/1.jpg` and `caption/1.txt`.
- DOCCI: `docci_descriptions.jsonlines` (`image_file`, `description`, `split`); images in `images/` beside.

A image is looked for where its data set keeps it, then in the usual places around the caption file.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from csdiff.data.images import is_image_name
from csdiff.data.items import caption_list
from csdiff.data.splits import ALL
from csdiff.data.tables import CaptionTable
from csdiff.data.text_files import read_lines, read_text
from csdiff.errors import CSDiffError

# Where images lie, beside the caption file or one folder up.
_FOLDERS = (
    "images",
    "Images",
    "flickr30k-images",
    "flickr30k_images",
    "train2014",
    "val2014",
    "train2017",
    "val2017",
    "test_images",
)

Entry = tuple[str, list[str], str | None]
"""File name, captions, and split of one image."""


def benchmark_table(source: Path, split: str = ALL, images: Path | None = None) -> tuple[Path, CaptionTable] | None:
    """Folder and captions of a data set in a published format, or None where the source is something else.

    Args:
        source: Caption file, or the folder of Urban-1k.
        split: "train", "val", "test", ... of formats that state it for every image; "all" for every split.
            COCO's "restval" belongs to "train", as everyone trains.
        images: Folder of the images, when they do not lie beside the caption file.

    Returns:
        A folder, and the captions by file name relative to it.

    Raises:
        CSDiffError: the file is damaged, has no such split, or its first image is nowhere to be found.
    """
    reader = _reader(source)
    if reader is None:
        return None
    try:
        entries = list(reader(source))
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise CSDiffError(
            f"{source}: expected captions as they are published, found something else ({reason})."
        ) from error
    splits = {entry[2] for entry in entries if entry[2]}
    if splits and split != ALL:
        wanted = {split, "restval"} if split == "train" else {split}
        entries = [entry for entry in entries if entry[2] in wanted]
        if not entries:
            raise CSDiffError(
                f"{source}: expected the split {split!r}, found {', '.join(sorted(splits))}; choose one."
            )
    if not entries:
        raise CSDiffError(f"{source}: expected at least one image with captions, found none.")
    names = [name for name, *_ in entries]
    folder = source / "image" if source.is_dir() else image_folder(source, names, images)
    if folder is None:
        raise CSDiffError(
            f"{source}: expected its images beside it ({names[0]} in {', '.join(_FOLDERS[:2])}, ...), found none; "
            "give the folder of the images as source and this file as captions_file."
        )
    return folder, CaptionTable(names, [caption_list(captions) for _, captions, _ in entries])


def image_folder(source: Path, names: Sequence[str], images: Path | None = None) -> Path | None:
    """Where the images of a caption file lie: `images`, or a usual place around the file; None where none is found."""
    places = [images] if images else [source.parent, source.parent.parent]
    if images is None:
        # captions_val2017.json belongs to val2017.
        own = source.stem.removeprefix("captions_")
        places = [p / own for p in places] + places + [p / inner for p in places for inner in _FOLDERS]
    # A few may be missing.
    return next((place for place in places if any((place / name).is_file() for name in names[:20])), None)


def _reader(source: Path) -> Callable[[Path], Iterable[Entry]] | None:
    """What reads a source, told by its name and its beginning."""
    if source.is_dir():
        return _urban if (source / "image").is_dir() and (source / "caption").is_dir() else None
    if source.name.endswith((".token", ".token.txt")):
        return _token
    if source.suffix == ".jsonlines":
        return _docci
    if source.suffix not in (".json", ".csv"):
        return None
    with source.open("rb") as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).decode("latin-1")
    if source.suffix == ".csv":
        head = start.partition("\n")[0]
        if head.replace(" ", "").startswith("image_name|"):
            return _bars
        return _annotations if {"raw", "filename", "split"} <= set(head.strip().split(",")) else None
    # A list of objects, or one object with other keys, is a table of one's own.
    if not start.lstrip().startswith("{"):
        return None
    content = _json(source)
    if isinstance(content.get("images"), list) and isinstance(content.get("annotations"), list):
        return _coco
    if isinstance(content.get("images"), list) and content["images"] and "sentences" in content["images"][0]:
        return _karpathy
    return None


def _json(path: Path) -> dict:
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise CSDiffError(f"{path} is not readable JSON ({error}); copy it again.") from error


def _coco(path: Path) -> Iterable[Entry]:
    content = _json(path)
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"].strip())
    return [(image["file_name"], captions[image["id"]], None) for image in content["images"] if captions[image["id"]]]


def _karpathy(path: Path) -> Iterable[Entry]:
    for image in _json(path)["images"]:
        name = "/".join(filter(None, (image.get("filepath"), image["filename"])))
        yield name, [sentence["raw"].strip() for sentence in image["sentences"]], image.get("split")


def _annotations(path: Path) -> Iterable[Entry]:
    for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
        yield row["filename"], [caption.strip() for caption in json.loads(row["raw"])], row["split"]


def _bars(path: Path) -> Iterable[Entry]:
    lines = read_lines(path)[1:]
    # One line of the published file lacks its second bar: "...jpg| 4   A dog runs ...".
    rows = [[part.strip() for part in line.split("|", 2)] for line in lines if line.strip()]
    return _gathered((row[0], row[2] if len(row) == 3 else row[1].lstrip("01234 ")) for row in rows)


def _token(path: Path) -> Iterable[Entry]:
    lines = (line.split("\t", 1) for line in read_lines(path) if line.strip())
    return _gathered((name.rsplit("#", 1)[0], caption.strip()) for name, caption in lines)


def _gathered(pairs: Iterable[tuple[str, str]]) -> Iterable[Entry]:
    captions: dict[str, list[str]] = {}
    for name, caption in pairs:
        captions.setdefault(name, []).append(caption)
    return [(name, values, None) for name, values in captions.items()]


def _urban(folder: Path) -> Iterable[Entry]:
    images = {file.stem: file.name for file in (folder / "image").iterdir() if is_image_name(file.name)}
    texts = sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem))
    for text in texts:
        if text.stem in images:
            # One long caption a image, over several lines in some files.
            yield images[text.stem], [" ".join(read_text(text).split())], None


def _docci(path: Path) -> Iterable[Entry]:
    for line in read_lines(path):
        if line.strip():
            row = json.loads(line)
            yield row["image_file"], [row["description"].strip()], row.get("split")
