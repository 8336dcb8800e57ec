"""Caption files of data sets that captions are measured on, in the formats they are published in.

- COCO captions: `annotations/captions_val2017.json` (`images`, `annotations`); images in `val2017/` beside.
- COCO and Flickr30k in Karpathy's form: `dataset_coco.json`, `dataset_flickr30k.json` (`images` with `sentences` and
  `split`); images by `filepath`, or in a folder beside.
- Flickr30k: `flickr_annotations_30k.csv` (`raw`, `filename`, `split`), `results.csv` (bars between columns), or
  `results_20130124.token`; images in `flickr30k-images/` beside.
- Urban-1k: the folder with `image/1.jpg` and `caption/1.txt`.
- DOCCI: `docci_descriptions.jsonlines` (`image_file`, `description`, `split`); images in `images/` beside.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from csdiff.data.images import is_image_name
from csdiff.data.items import Row
from csdiff.data.listing import inside, no_split
from csdiff.data.text_files import lines, read_text
from csdiff.errors import CSDiffError

# Where images lie, beside the caption file or one folder up.
_FOLDERS = ("images", "Images", "flickr30k-images", "flickr30k_images", "test_images")
_FOLDERS += ("train2014", "val2014", "train2017", "val2017")


def image_folder(folder: Path, source: Path, names: Sequence[str]) -> Path:
    """Where the images of a caption file lie: the folder or a usual place, where one of the first thousand is."""
    # captions_val2017.json belongs to val2017.
    own, places = source.stem.removeprefix("captions_"), (source.parent, source.parent.parent)
    inner = (place / name for place in places for name in _FOLDERS)
    for place in (folder, *(place / own for place in places), *places, *inner):
        # A few may be missing.
        if any(inside(place, name, allow_outside=True).exists() for name in names[:1000]):
            return place
    raise CSDiffError(
        f"{source}: expected its images beside it ({names[0]} in images, ...), found none; give the folder of the "
        "images as source and this file as captions_file."
    )


def of_split(path: Path, rows: Iterable[Row], split: str) -> list[Row]:
    """Rows of a split, all where none states one. COCO's "restval" belongs to "train", as everyone trains."""
    rows = list(rows)
    splits = {row.split for row in rows if row.split}
    if not splits or split == "all":
        return rows
    wanted = {split, "restval"} if split == "train" else {split}
    return [row for row in rows if row.split in wanted] or no_split(path, split, sorted(splits))


def coco(content: dict) -> Iterable[Row] | None:
    """COCO captions or Karpathy's form; None where a JSON object is neither."""
    images = content.get("images")
    if isinstance(images, list) and isinstance(content.get("annotations"), list):
        rows = {image["id"]: Row(image["file_name"], []) for image in images}
        for annotation in content["annotations"]:
            rows[annotation["image_id"]].captions.append(annotation["caption"].strip())
        return [row for row in rows.values() if row.captions]
    if not images or "sentences" not in images[0]:
        return None
    names = ["/".join(filter(None, (image.get("filepath"), image["filename"]))) for image in images]
    captions = [[sentence["raw"].strip() for sentence in image["sentences"]] for image in images]
    return [Row(n, c, split=i.get("split")) for n, c, i in zip(names, captions, images, strict=True)]


def annotations(columns: dict[str, list[str]]) -> Iterable[Row]:
    """Flickr30k's CSV."""
    captions = [[caption.strip() for caption in json.loads(raw)] for raw in columns["raw"]]
    return [Row(n, c, split=s) for n, c, s in zip(columns["filename"], captions, columns["split"], strict=True)]


def bars(text: str) -> Iterable[Row]:
    """Flickr30k's `results.csv`: a row a caption."""
    # One line of the published file lacks its second bar: "...jpg| 4   A dog runs ...".
    rows = [[part.strip() for part in line.split("|", 2)] for line in lines(text)[1:] if line.strip()]
    return [Row(row[0], [row[2] if len(row) == 3 else row[1].lstrip("01234 ")]) for row in rows]


def tokens(text: str) -> Iterable[Row]:
    """Flickr30k's and Flickr8k's `.token`: a row a caption."""
    pairs = (line.split("\t", 1) for line in lines(text) if line.strip())
    return [Row(name.rsplit("#", 1)[0], [caption.strip()]) for name, caption in pairs]


def docci(rows: Iterable[dict]) -> Iterable[Row]:
    """DOCCI's JSON lines."""
    return [Row(row["image_file"], [row["description"].strip()], split=row.get("split")) for row in rows]


def urban(folder: Path) -> Iterable[Row]:
    """Urban-1k: a folder with `image` and `caption`."""
    images = {file.stem: file.name for file in (folder / "image").iterdir() if is_image_name(file.name)}
    for text in sorted((folder / "caption").glob("*.txt"), key=lambda file: (len(file.stem), file.stem)):
        if text.stem in images:
            # One long caption an image, over several lines in some files.
            yield Row(images[text.stem], [" ".join(read_text(text).split())])
