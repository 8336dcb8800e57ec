"""What a folder is, told by its JSON files and the names in it; no model library is imported."""

from __future__ import annotations

from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.files import read_json

KINDS = {
    "run": "a training run",
    "checkpoint": "a checkpoint of a training run",
    "pipeline": "a diffusers pipeline, for --decoder",
    "store": "an embedding store",
    "adapter": "an adapter",
    "encoder": "an encoder",
}


def kind_of(folder: Path) -> str | None:
    """The key in KINDS, or None; in their order, as a run is an adapter folder too, and so is a checkpoint."""
    config, metadata = (_read(folder / name) for name in ("config.json", "csdiff.json"))
    # diffusers has adapters of its own (T2IAdapter, MotionAdapter), which make no embeddings.
    ours = str(config.get("_class_name")).endswith("Adapter") and "embedding_dim" in config
    adapter = ours or metadata.get("kind") == "adapter"
    fits = {
        "run": (folder / "training.yaml").is_file(),
        "checkpoint": adapter and (folder / "state").is_dir(),
        "pipeline": (folder / "model_index.json").is_file(),
        "store": is_store(folder),
        "adapter": adapter,
        "encoder": "model_type" in config,
    }
    return next((kind for kind in KINDS if fits[kind]), None)


def is_store(path: str | Path) -> bool:
    """Whether a folder is an embedding store, finished or not, ours or foreign, rather than a captioned data set."""
    path = Path(path)
    # Of clip-retrieval, and of a store that is not finished.
    names = ("text_emb", "img_emb", ".partial")
    return any((path / name).is_dir() for name in names) or _read(path / "csdiff.json").get("kind") == "store"


def described(folder: Path) -> str:
    """What a folder is where something else is wanted: "is an embedding store", "holds a.png, b.png, ..."."""
    kind = kind_of(folder)
    if kind == "run" and not (folder / "config.json").is_file():
        return "is an unfinished training run: run it to its end, or take what it has with csdiff export"
    if kind is not None:
        return f"is {KINDS[kind]}"
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    inner = [f"{entry.name} ({KINDS[found]})" for entry in entries[:100] if (found := kind_of(entry))]
    if inner:
        return f"holds {', '.join(inner[:5])}: name one of them"
    names = ", ".join(entry.name for entry in entries[:3]) + " and others" * (len(entries) > 3)
    return f"holds {names}" if names else "is empty"


def _read(file: Path) -> dict:
    try:
        return read_json(file)
    except CSDiffError:
        return {}
