"""Build the captioned-picture data set in ``assets/data`` from pinned npm packages.

Emoji in four drawing styles, 128x128 on white, with several captions each, in three parquet files that
``datasets.load_dataset("parquet", data_files=...)`` reads with pictures decoded. The same package versions give
the same bytes. Five further sets of the same concepts, which only the shipped models are trained on, go to a fourth
file outside `assets/`.

    npm ci --prefix scripts            # fetches the pinned sources into scripts/node_modules
    python scripts/build_dataset.py    # writes assets/data/*.parquet and build/assets/further.parquet
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import resvg_py
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SIZE = 128
COMBINATION_SHARE = 0.08
CONCEPT_SHARE = 0.05
# style name in captions -> npm package (Iconify icon sets are SVG; the 3d set is rendered webp)
ICON_SETS = {"noto": "noto", "twemoji": "twemoji", "flat": "fluent-emoji-flat"}
STYLES = (*ICON_SETS, "3d")
# Further style -> npm package, and the styles above of which it is an older or shaded version: what is held out there
# is left out here as well.
FURTHER_SETS = {
    "emojione": ("emojione", ("twemoji",)),
    "fluent": ("fluent-emoji", ("3d", "flat")),
    "blob": ("noto-v1", ("noto",)),
    "firefox": ("fxemoji", ()),
    "streamline": ("streamline-emojis", ()),
}
# Emojibase groups left out: 2 = skin-tone and hair components; 9 = flags, which two of the four styles do not draw.
EXCLUDED_GROUPS = {2, 9}

FEATURES = {
    "image": {"_type": "Image"},
    "captions": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "label": {"dtype": "string", "_type": "Value"},
    "style": {"dtype": "string", "_type": "Value"},
    "concept": {"dtype": "string", "_type": "Value"},
    "group": {"dtype": "string", "_type": "Value"},
    "split": {"dtype": "string", "_type": "Value"},
}


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on `text` alone, so that splits never move."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def normalise_codepoints(code: str) -> str:
    """Lower case without the emoji-presentation selector, which the packages write inconsistently."""
    return "-".join(part for part in code.lower().split("-") if part != "fe0f")


def load_concepts(sources: Path) -> dict[str, dict]:
    data = json.loads((sources / "emojibase-data/en/data.json").read_text(encoding="utf-8"))
    messages = json.loads((sources / "emojibase-data/en/messages.json").read_text(encoding="utf-8"))
    groups = {group["order"]: group["message"] for group in messages["groups"]}
    concepts = {}
    for entry in data:
        if "group" not in entry or entry["group"] in EXCLUDED_GROUPS:
            continue
        concepts[normalise_codepoints(entry["hexcode"])] = {
            "label": entry["label"].replace("“", "").replace("”", ""),
            "tags": entry.get("tags", []),
            "group": groups[entry["group"]],
        }
    return concepts


class IconSet:
    """One Iconify SVG set: code points -> picture."""

    def __init__(self, folder: Path) -> None:
        self.icons = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        chars = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        self.names = {normalise_codepoints(code): name for code, name in chars.items()}

    def render(self, code: str) -> Image.Image | None:
        name = self.names.get(code)
        if name is None:
            return None
        name = self.icons.get("aliases", {}).get(name, {}).get("parent", name)
        return self.draw(name) if name in self.icons["icons"] else None

    def draw(self, name: str) -> Image.Image:
        icon = self.icons["icons"][name]
        width = icon.get("width", self.icons.get("width", 16))
        height = icon.get("height", self.icons.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" width="{SIZE}" height="{SIZE}">'
            f"{icon['body']}</svg>"
        )
        png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE))
        return Image.open(io.BytesIO(png))


class WebpSet:
    """The rendered 3d set: one webp file a code point."""

    def __init__(self, folder: Path) -> None:
        self.files = {normalise_codepoints(path.stem): path for path in sorted((folder / "assets").glob("*.webp"))}

    def render(self, code: str) -> Image.Image | None:
        path = self.files.get(code)
        if path is None:
            return None
        return Image.open(path).convert("RGBA").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def on_white(picture: Image.Image) -> Image.Image:
    picture = picture.convert("RGBA")
    canvas = Image.new("RGBA", picture.size, "white")
    canvas.alpha_composite(picture)
    return canvas.convert("RGB")


def webp_bytes(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", lossless=True, quality=70, method=4)
    return buffer.getvalue()


def make_captions(label: str, tags: list[str], style: str) -> list[str]:
    """Name and style first; the tags caption says the same without the name."""
    captions = [f"{label}, {style} style", f"a {style} emoji of {label}", f"a picture of {label} in {style} style"]
    # A tag list that only repeats the label would be a duplicate caption.
    words = [tag for tag in tags if tag != label][:6]
    if words:
        captions.append(f"{', '.join(words)}, {style} style")
    return captions


def assign_splits(styles_by_concept: dict[str, list[str]]) -> dict[tuple[str, str], str]:
    """Concept split by concept; combination split by (concept, style), never the last style of a concept."""
    splits = {}
    for concept, styles in styles_by_concept.items():
        if unit_hash(f"concept/{concept}") < CONCEPT_SHARE:
            splits.update({(concept, style): "concept" for style in styles})
            continue
        # Single-style concepts cannot be held out, so the share is of the pictures that can be.
        held_out = [s for s in styles if unit_hash(f"combination/{concept}/{s}") < COMBINATION_SHARE]
        if len(held_out) == len(styles):
            held_out = held_out[:-1]
        splits.update({(concept, style): "combination" if style in held_out else "train" for style in styles})
    return splits


def write_parquet(rows: list[dict], path: Path) -> None:
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("captions", pa.list_(pa.string())),
            ("label", pa.string()),
            ("style", pa.string()),
            ("concept", pa.string()),
            ("group", pa.string()),
            ("split", pa.string()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": FEATURES}})},
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    # The pictures are compressed already; small row groups keep random access cheap.
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, compression="zstd", row_group_size=500)


def make_row(picture: bytes, concept: str, entry: dict, style: str, split: str) -> dict:
    return {
        "image": {"bytes": picture, "path": f"{style}/{concept}.webp"},
        "captions": make_captions(entry["label"], entry["tags"], style),
        "label": entry["label"],
        "style": style,
        "concept": concept,
        "group": entry["group"],
        "split": split,
    }


def further_rows(sources: Path, concepts: dict[str, dict], splits: dict[tuple[str, str], str]) -> list[dict]:
    """The further sets, whose icons are known by name only, without any held-out concept or near twin."""

    def letters(name: str) -> str:
        return "".join(c for c in name.lower() if c.isascii() and c.isalnum())

    known = {concept for concept, _ in splits}
    by_name = {letters(concepts[concept]["label"]): concept for concept in sorted(known)}
    held_out = {concept for (concept, _), split in splits.items() if split == "concept"}
    rows = []
    for style, (package, twins) in FURTHER_SETS.items():
        icons = IconSet(sources / "@iconify-json" / package)
        for name, icon in icons.icons["icons"].items():
            concept = by_name.get(letters(name))
            twin_held_out = any(splits.get((concept, twin)) == "combination" for twin in twins)
            if concept is None or concept in held_out or twin_held_out or icon.get("hidden"):
                continue
            data = webp_bytes(on_white(icons.draw(name)))
            rows.append(make_row(data, concept, concepts[concept], style, "further"))
    return rows


def build(sources: Path, output: Path, further: Path) -> dict[Path, int]:
    concepts = load_concepts(sources)
    renderers = {style: IconSet(sources / "@iconify-json" / package) for style, package in ICON_SETS.items()}
    renderers["3d"] = WebpSet(sources / "@lobehub/fluent-emoji-3d")
    pictures: dict[tuple[str, str], bytes] = {}
    styles_by_concept: dict[str, list[str]] = defaultdict(list)
    for concept in concepts:
        for style in STYLES:
            picture = renderers[style].render(concept)
            if picture is not None:
                pictures[concept, style] = webp_bytes(on_white(picture))
                styles_by_concept[concept].append(style)
    splits = assign_splits(styles_by_concept)
    rows: dict[str, list[dict]] = {"train": [], "combination": [], "concept": []}
    for (concept, style), data in pictures.items():
        split = splits[concept, style]
        rows[split].append(make_row(data, concept, concepts[concept], style, split))
    files = {output / f"{split}.parquet": split_rows for split, split_rows in rows.items()}
    files[further] = further_rows(sources, concepts, splits)
    for path, file_rows in files.items():
        write_parquet(file_rows, path)
    counts = Counter(row["style"] for file_rows in files.values() for row in file_rows)
    print("pictures by style:", dict(counts))
    return {path: len(file_rows) for path, file_rows in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=Path, default=ROOT / "scripts/node_modules", help="folder of npm packages")
    parser.add_argument("--output", type=Path, default=ROOT / "assets/data", help="where the parquet files go")
    parser.add_argument("--further", type=Path, default=ROOT / "build/assets/further.parquet", help="the fourth file")
    arguments = parser.parse_args()
    for path, count in build(arguments.sources, arguments.output, arguments.further).items():
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(f"{path.name}: {count} pictures, {path.stat().st_size / 1e6:.1f} MB, sha256 {digest}")


if __name__ == "__main__":
    main()
