"""Which kind of folder it is, and what is in it: what `csdiff info` does."""

from __future__ import annotations

from pathlib import Path

from csdiff.embeddings.layout import is_store
from csdiff.errors import CSDiffError
from csdiff.info.adapters import describe_adapter, is_adapter
from csdiff.info.config import InfoConfig
from csdiff.info.files import folder_size, header
from csdiff.info.pipelines import describe_encoder, describe_pipeline, is_encoder, is_pipeline
from csdiff.info.runs import describe_checkpoint, describe_run, is_checkpoint, is_run
from csdiff.info.stores import describe_store

# In this order: a run is an adapter folder too, and so is a checkpoint.
KINDS = {
    "run": (is_run, describe_run),
    "checkpoint": (is_checkpoint, describe_checkpoint),
    "pipeline": (is_pipeline, describe_pipeline),
    "store": (is_store, describe_store),
    "adapter": (is_adapter, describe_adapter),
    "encoder": (is_encoder, describe_encoder),
}


def inspect_path(config: InfoConfig) -> dict:
    """Describes a folder (or a safetensors file) from its JSON files and the headers of its weights.

    Args:
        config: Where, and whether everything is read.

    Returns:
        `path`, `kind` (run, checkpoint, pipeline, store, adapter, encoder or weights), `files`, `bytes`, what is known
        of the kind, and `problems`: sentences, empty when nothing is wrong.

    Raises:
        CSDiffError: Nothing there, or nothing that is known.
    """
    if not config.path:
        raise CSDiffError("path: expected a folder, found none; for example `csdiff info runs/adapter`.")
    path = Path(config.path)
    problems: list[str] = []
    if path.is_file() and path.suffix == ".safetensors":
        return _weights_file(path)
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CSDiffError(f"path: expected a folder or a .safetensors file, found {found} at {path}.")
    for kind, (is_kind, describe) in KINDS.items():
        if is_kind(path):
            facts = describe(path, problems, config.check)
            if kind == "pipeline" and facts["decoder"]:
                kind = "decoder"
            return {"path": str(path), "kind": kind, **folder_size(path), **facts, "problems": problems}
    names = sorted(entry.name for entry in path.iterdir())[:5]
    raise CSDiffError(
        f"path: expected an adapter, a store, a training run, a checkpoint, a pipeline or an encoder, found none of "
        f"them in {path} ({', '.join(names) or 'it is empty'})."
    )


def _weights_file(path: Path) -> dict:
    problems: list[str] = []
    tensors = header(path, problems)
    dtypes = sorted({dtype for dtype, _ in tensors.values()})
    return {
        "path": str(path),
        "kind": "weights",
        "files": 1,
        "bytes": path.stat().st_size,
        "parameters": sum(count for _, count in tensors.values()),
        "dtype": ", ".join(dtypes),
        "tensors": len(tensors),
        "problems": problems,
    }
