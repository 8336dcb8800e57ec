"""`csdiff info`: what is in an adapter, store, run, checkpoint, pipeline or encoder folder, and what is wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.files import flatten, read_json, read_jsonl, read_safetensors_header

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}
ENCODERS = ("text_encoder", "image_encoder", "tokenizer")
# Buffers of an adapter, not parameters.
STATISTICS = {"clip_mean", "clip_std", "text_mean", "text_std", "norm_scale", "norm_shift"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass
class InfoConfig:
    """Tells what is in a folder: an adapter, a store, a training run, a checkpoint, a pipeline or an encoder."""

    path: str = ""
    """The folder, or a safetensors file."""
    check: bool = False
    """Also read everything: compare checksums, load weights, look for values that are not finite."""
    text_encoder: str | None = None
    """With --check: where an adapter's text encoder is now, if not where its csdiff.json says."""
    image_encoder: str | None = None
    """With --check: where an adapter's image encoder is now, if not where its csdiff.json says."""


def inspect_path(config: InfoConfig) -> dict:
    """Describes a folder (or a safetensors file) from its JSON files and the headers of its weights.

    Args:
        config: Where, and whether everything is read.

    Returns:
        `path`, `kind` (run, checkpoint, pipeline, decoder, store, adapter, encoder or weights), `files`, `bytes`, what
        is known of the kind, and `problems`: sentences, empty when nothing is wrong.

    Raises:
        CSDiffError: Nothing there, or nothing that is known.
    """
    from csdiff.options import check_options

    check_options(config)
    path, problems = Path(config.path), []
    if not config.path:
        raise CSDiffError("path: expected a folder, found none; for example `csdiff info runs/adapter`.")
    if path.is_file() and path.suffix == ".safetensors":
        facts = _weights([path], problems)
        return {"path": str(path), "kind": "weights", "files": 1, "bytes": facts.pop("weights"), **facts,
                "problems": problems}  # fmt: skip
    if not path.is_dir():
        found = "a file" if path.exists() else "nothing"
        raise CSDiffError(f"path: expected a folder or a .safetensors file, found {found} at {path}.")
    kind, describe = _kind(path)
    facts = describe(path, problems, config)
    files = [file for file in path.rglob("*") if file.is_file() and not file.is_symlink()]
    size = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    kind = "decoder" if facts.get("decoder") else kind
    return {"path": str(path), "kind": kind, **size, **facts, "problems": problems}


def _kind(path: Path) -> tuple[str, Callable]:
    """In this order: a run is an adapter folder too, and so is a checkpoint."""
    from csdiff.adapters.registry import CLASS_NAMES
    from csdiff.embeddings.layout import is_store
    from csdiff.training.run_folder import CONFIG_NAME

    config = _read(path / "config.json", [])
    if (path / CONFIG_NAME).is_file():
        return "run", _run
    if (path / "state").is_dir():
        return "checkpoint", _checkpoint
    if (path / "model_index.json").is_file():
        return "pipeline", _pipeline
    if is_store(path):
        return "store", _store
    if config.get("_class_name") in CLASS_NAMES or _read(path / "csdiff.json", []).get("kind") == "adapter":
        return "adapter", _adapter
    if "model_type" in config:
        return "encoder", _encoder
    names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "it is empty"
    raise CSDiffError(
        "path: expected an adapter, a store, a training run, a checkpoint, a pipeline or an encoder, found none of "
        f"them in {path} ({names})."
    )


@contextmanager
def _noting(problems: list[str]) -> Iterator[None]:
    """What is wrong with a file goes to the list instead of ending the command."""
    try:
        yield
    except (CSDiffError, OSError) as error:
        problems.append(str(error))


def _read(file: Path, problems: list[str]) -> dict:
    with _noting(problems):
        return read_json(file)
    return {}


def _weights(files: Iterable[Path], problems: list[str], apart: Iterable[str] = ()) -> dict:
    """`parameters` (without those named `apart`), `dtype` and `weights` (bytes) of files, from their headers."""
    counts: dict[str, int] = {}
    size = 0
    for file in files:
        with _noting(problems):
            for name, (dtype, shape) in read_safetensors_header(file).items():
                if name not in apart:
                    counts[DTYPES.get(dtype, dtype)] = counts.get(DTYPES.get(dtype, dtype), 0) + math.prod(shape)
            size += file.stat().st_size
    dtype = ", ".join(sorted(counts, key=counts.get, reverse=True))
    return {"parameters": sum(counts.values()), "dtype": dtype, "weights": size}


def _folder_weights(folder: Path, problems: list[str]) -> dict:
    """The weights of a model, without its variants (`model.fp16.safetensors`), or what is in their place."""
    files = sorted(folder.glob("*.safetensors"))
    for index in folder.glob("*.safetensors.index.json"):
        listed = _read(index, problems).get("weight_map")
        missing = [n for n in sorted(set(listed.values())) if not (folder / n).is_file()] if listed else []
        problems.extend(f"{folder / name} is missing: {index.name} lists it" for name in missing)
    if not files:
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
        found = f"the pickle {pickles[0]}, which is never read" if pickles else "none"
        problems.append(f"{folder}: expected *.safetensors, found {found}")
    return _weights([file for file in files if file.name.count(".") == 1] or files, problems)


def _adapter(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """Class, dimensions, parameters, encoders, training, metrics, and the decoders that an adapter fits."""
    from csdiff.adapters import AutoAdapter
    from csdiff.adapters.folder import WEIGHTS, find_variant, read_config, read_metadata, weight_files

    config, metadata, files = {}, {}, []
    with _noting(problems):
        config = dict(read_config(folder))
    with _noting(problems):
        metadata = read_metadata(folder)
    kind = config.pop("_class_name", None)
    with _noting(problems):
        name = "adapter_model.safetensors" if kind == "LoRAAdapter" else WEIGHTS
        files = weight_files(folder, find_variant(folder, name=name), name)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)
    problems.extend(f"{folder / name} is a pickle; it is never read, and nobody should" for name in pickles)
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    facts = {
        "class": kind,
        "text_dim": settings.pop("text_dim", None) or settings.get("embedding_dim"),
        "embedding_dim": settings.pop("embedding_dim", None),
        **_weights(files, problems, STATISTICS),
        "options": settings,
        **{key: metadata.get(key) for key in (*ENCODERS, "normalized", "statistics", "objective", "training")},
        "data": {key: value for key, value in (metadata.get("data") or {}).items() if key != "source"},
        **{key: metadata.get(key) for key in ("metrics", "versions")},
    }
    if config and metadata:
        facts["decoders"] = decoders(facts)
    if options.check and not problems:
        with _noting(problems):
            encoders = {"text_encoder": options.text_encoder, "image_encoder": options.image_encoder}
            AutoAdapter.from_pretrained(folder, **encoders)
    return facts


def decoders(adapter: dict) -> dict[str, str]:
    """Which decoder presets an adapter fits: "fits", or why not.

    Args:
        adapter: Its `embedding_dim`, `image_encoder` and `normalized`, as in `config.json` and `csdiff.json`.
    """
    from csdiff.embeddings.fingerprint import compare_encoders
    from csdiff.pipelines.decoders import resolve_decoder
    from csdiff.pipelines.presets import PRESETS

    verdicts = {}
    for name, preset in PRESETS.items():
        shipped = resolve_decoder(name) if preset.embedding_dim is None else None
        width = preset.embedding_dim or shipped.embedding_dim
        encoder = shipped.encoder("image") if shipped else {"id": preset.image_encoder}
        result = compare_encoders(encoder, adapter["image_encoder"], "image")
        if adapter["embedding_dim"] != width:
            verdicts[name] = f"no: it takes {width} dimensions, found {adapter['embedding_dim']}"
        elif adapter["normalized"]:
            verdicts[name] = "no: it takes raw embeddings, found an adapter of unit-norm ones"
        elif result.verdict == "same":
            verdicts[name] = "fits"
        else:
            known = "no: another image encoder" if result.verdict == "different" else "perhaps"
            verdicts[name] = f"{known}: {result.reason}"
    return verdicts


def _run(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """Progress, checkpoints, and the adapter: the finished one, else that of the newest checkpoint."""
    import yaml

    from csdiff.training.run_folder import CONFIG_NAME, METRICS_NAME, Checkpoints

    checkpoints = Checkpoints(folder / "checkpoints")
    steps, newest, finished = checkpoints.steps(), checkpoints.latest(), (folder / "config.json").is_file()
    config = {}
    try:
        config = dict(yaml.safe_load((folder / CONFIG_NAME).read_text(encoding="utf-8")) or {})
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        problems.append(f"{folder / CONFIG_NAME} is not YAML ({error})")
    facts = {
        "finished": finished,
        "steps": steps[-1] if steps else 0,
        "max_steps": config.get("max_steps"),
        "train": (config.get("data") or {}).get("train"),
        "checkpoints": steps,
    }
    if newest is None and not finished:
        problems.append(f"{folder}: the run has left no checkpoint yet; the same command starts it anew")
        return facts
    if newest is not None:
        facts["progress"] = _progress(newest, problems)
    for name in ("best", "latest"):
        if (named := checkpoints.named(name)) is not None:
            facts[name] = named.name
            if not named.is_dir():
                problems.append(f"{checkpoints.folder / name} names {named.name}, which is missing")
    facts |= _adapter(folder if finished else newest, problems, options)
    if not facts["metrics"]:
        measured = [line for line in read_jsonl(folder / METRICS_NAME) if line.get("kind") == "validation"]
        for last in measured[-1:]:
            facts["last_validation"] = {"step": last["step"], **(last.get("average") or {})}
    for step in steps if options.check else ():
        _weights(sorted((checkpoints.path(step) / "state").glob("*.safetensors")), problems)
    return facts


def _checkpoint(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """The counters of a checkpoint and its adapter."""
    _weights(sorted((folder / "state").glob("*.safetensors")), problems)
    return {"progress": _progress(folder, problems), **_adapter(folder, problems, options)}


def _progress(checkpoint: Path, problems: list[str]) -> dict:
    content = _read(checkpoint / "state" / "state.json", problems).get("progress") or {}
    return {key: value for key, value in content.items() if key != "baselines"}


def _store(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """Rows, columns, encoders, statistics and what was left out of a store."""
    from csdiff.embeddings import EmbeddingStore
    from csdiff.embeddings.layout import ARRAY_FOLDERS, REPORT_FILE, find_shards

    known = (folder / "csdiff.json").is_file()
    metadata = _read(folder / "csdiff.json", problems) if known else {}
    report = _read(folder / REPORT_FILE, []) if known else {}
    facts = {
        "layout": "csdiff" if known else "clip-retrieval, without csdiff.json: encoders and checksums are unknown",
        **{key: metadata.get(key) for key in ENCODERS},
        "items": report.get("items"),
        "left_out": report.get("skipped") or {},
        "truncated_captions": report.get("truncated_captions"),
        "versions": metadata.get("versions"),
    }
    with _noting(problems), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        store = EmbeddingStore.open(folder, verify=options.check)
        shards = {key: len(find_shards(folder / name, stem, "npy")) for key, (name, stem) in ARRAY_FOLDERS.items()}
        rows = store.read(range(min(1, len(store))))
        facts |= {
            "rows": len(store),
            "text_dim": store.text_dim,
            "image_dim": store.image_dim,
            "dtype": metadata.get("dtype"),
            "columns": {key: {"shards": shards[key], "shape": list(rows[key].shape[1:])} for key in store.keys},
            "captions": store.metadata is not None and "caption" in store.metadata.names,
            "normalized": store.normalized,
        }
        for key in ("statistics", "text_statistics") if known or options.check else ():
            facts[key] = _short(getattr(store, key))
        for key in [key for key in store.keys if key != "text_mask"] if options.check else ():
            bad = sum(int((~block[key].flatten(1).isfinite().all(1)).sum()) for block in store.blocks(keys=[key]))
            if bad:
                problems.append(f"{folder}: {bad:,} rows of {key} hold NaN or infinity")
    return facts


def _short(statistics) -> dict | None:
    """Statistics without their vectors."""
    return statistics and {key: value for key, value in statistics.to_dict().items() if not isinstance(value, list)}


def _pipeline(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """Class and components of a pipeline; of a decoder also how `csdiff generate` would use it."""
    from csdiff.pipelines.decoders import resolve_decoder

    index = _read(folder / "model_index.json", problems)
    metadata = _read(folder / "csdiff.json", problems) if (folder / "csdiff.json").is_file() else {}
    components = {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and value[1]):
            continue
        components[name], part = {"class": value[1]}, folder / name
        if not part.is_dir():
            problems.append(f"{part} is missing: model_index.json lists {name}")
        elif (part / "config.json").is_file():
            components[name] |= _folder_weights(part, problems)
        elif any(part.glob("*.safetensors")):
            problems.append(f"{part / 'config.json'} is missing")
    decoder = None
    with _noting([]):
        source = resolve_decoder(folder)
        decoder = {
            "hand_over": source.hand_over,
            "embedding_dim": source.embedding_dim,
            "preset": source.preset and source.preset.name,
            "image_encoder": (source.encoder("image") or {}).get("id"),
            "sampling": (source.fingerprint or {}).get("sampling"),
        }
    for name in components if options.check and not problems else ():
        problems.extend(_not_finite(folder / name))
    return {
        "class": index.get("_class_name"),
        "parameters": sum(part.get("parameters", 0) for part in components.values()),
        "components": components,
        "decoder": decoder,
        **{key: metadata.get(key) for key in ENCODERS},
        "versions": {"diffusers": index.get("_diffusers_version")},
    }


def _encoder(folder: Path, problems: list[str], options: InfoConfig) -> dict:
    """Class, dimensions and, with --check, the hashes of the weights of a transformers model, as in `csdiff.json`."""
    from csdiff.embeddings.fingerprint import weights_sha256

    config = _read(folder / "config.json", problems)
    facts = {
        "class": ", ".join(config.get("architectures") or []) or config.get("model_type"),
        "projection_dim": config.get("projection_dim"),
        **_folder_weights(folder, problems),
        "versions": {"transformers": config.get("transformers_version")},
    }
    if options.check and not problems:
        towers = ("text", "image") if config.get("model_type") == "clip" else (None,)
        facts["weights_sha256"] = {tower or "all": weights_sha256(folder, tower) for tower in towers}
        problems.extend(_not_finite(folder))
    return facts


def _not_finite(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    return [
        f"{file}: tensor {name} holds NaN or infinity"
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def as_text(facts: dict) -> str:
    """An aligned list under the names of `--json`: single facts, a paragraph a section, the problems last."""
    facts = {name: value for name, value in facts.items() if value is not None and value != {}}
    problems = facts.pop("problems")
    title = f"{facts.pop('kind').capitalize()} {facts.pop('path')}"
    size = f"{_bytes(facts.pop('bytes'))} in {facts.pop('files')} files"
    sections = {name: value for name, value in facts.items() if isinstance(value, dict)}
    lines = [title, *_rows({"size": size, **{k: v for k, v in facts.items() if k not in sections}})]
    for name, section in sections.items():
        parts = [part for part in section.values() if isinstance(part, dict)]
        # Parts that are alike (columns, components) go on a line each.
        if len(parts) == len(section) and not any(isinstance(v, dict) for part in parts for v in part.values()):
            section = {name: _inline(part) for name, part in section.items()}
        lines += ["", name, *_rows({key: value for key, value in flatten(section).items() if value is not None})]
    return "\n".join([*lines, "", "problems" if problems else "no problems found", *(f"  {p}" for p in problems)])


def _inline(part: dict) -> str:
    return ", ".join(_value(k, v) if k == "class" else f"{k} {_value(k, v)}" for k, v in part.items())


def _rows(values: dict) -> list[str]:
    width = max(map(len, values), default=0) + 2
    return [f"  {name:<{width}}{_value(name, value)}" for name, value in values.items()]


def _value(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return _bytes(value) if name == "weights" else str(value) if name.endswith("seed") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return str(value)[:12] if name.endswith("sha256") else str(value)


def _bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
