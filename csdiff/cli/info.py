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
from csdiff.tables import number

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

    Returns:
        `path`, `kind` (run, checkpoint, pipeline, decoder, store, adapter, encoder or weights), `files`, `bytes`, what
        is known of the kind, and `problems`: sentences, empty when nothing is wrong.

    Raises:
        CSDiffError: Nothing there, or nothing that is known.
    """
    from csdiff.options import check_options

    check_options(config)
    path, look = Path(config.path), _Look(config)
    if not config.path or not path.exists():
        raise CSDiffError(f"path: expected a folder, found nothing at {config.path!r}; give another path.")
    if path.is_file() and path.suffix != ".safetensors":
        raise CSDiffError(f"path: expected a folder or a .safetensors file, found the file {path}.")
    kind, describe = look.kind(path) if path.is_dir() else ("weights", lambda file: look.weights([file]))
    facts = describe(path)
    files = [file for file in (path, *path.rglob("*")) if file.is_file() and not file.is_symlink()]
    size = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    kind = "decoder" if facts.get("decoder") else kind
    return {"path": str(path), "kind": kind, **size, **facts, "problems": look.problems}


class _Look:
    """Describes folders by their kind; what is wrong with a file goes to `problems` instead of ending the command."""

    def __init__(self, options: InfoConfig):
        self.options, self.problems = options, []

    @contextmanager
    def noting(self) -> Iterator[None]:
        try:
            yield
        except (CSDiffError, OSError) as error:
            self.problems.append(str(error))

    def read(self, file: Path) -> dict:
        with self.noting():
            return read_json(file)
        return {}

    def kind(self, path: Path) -> tuple[str, Callable[[Path], dict]]:
        """In this order: a run is an adapter folder too, and so is a checkpoint."""
        from csdiff.adapters.registry import CLASS_NAMES
        from csdiff.embeddings.layout import is_store
        from csdiff.training.run_folder import CONFIG_NAME

        config, metadata = (_Look(self.options).read(path / name) for name in ("config.json", "csdiff.json"))
        if (path / CONFIG_NAME).is_file():
            return "run", self.run
        if (path / "state").is_dir():
            return "checkpoint", self.checkpoint
        if (path / "model_index.json").is_file():
            return "pipeline", self.pipeline
        if is_store(path):
            return "store", self.store
        if config.get("_class_name") in CLASS_NAMES or metadata.get("kind") == "adapter":
            return "adapter", self.adapter
        if "model_type" in config:
            return "encoder", self.encoder
        names = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "it is empty"
        raise CSDiffError(
            "path: expected an adapter, a store, a training run, a checkpoint, a pipeline or an encoder, found none "
            f"in {path} ({names})."
        )

    def weights(self, files: Iterable[Path], apart: Iterable[str] = ()) -> dict:
        """`parameters` (without those named `apart`), `dtype` and `weights` (bytes) of files, from their headers."""
        counts: dict[str, int] = {}
        size = 0
        for file in files:
            with self.noting():
                for name, (dtype, shape) in read_safetensors_header(file).items():
                    if name not in apart:
                        counts[DTYPES.get(dtype, dtype)] = counts.get(DTYPES.get(dtype, dtype), 0) + math.prod(shape)
                size += file.stat().st_size
        dtype = ", ".join(sorted(counts, key=counts.get, reverse=True))
        return {"parameters": sum(counts.values()), "dtype": dtype, "weights": size}

    def model_weights(self, folder: Path) -> dict:
        """The weights of a model, without its variants (`model.fp16.safetensors`), or what is in their place."""
        files = sorted(folder.glob("*.safetensors"))
        for index in folder.glob("*.safetensors.index.json"):
            listed = set((self.read(index).get("weight_map") or {}).values())
            missing = [name for name in sorted(listed) if not (folder / name).is_file()]
            self.problems += [f"{folder / name} is missing: {index.name} lists it" for name in missing]
        if not files:
            pickles = ", ".join(_pickles(folder)) or "none"
            self.problems.append(f"{folder}: expected *.safetensors, found {pickles} (pickles are never read)")
        return self.weights([file for file in files if file.name.count(".") == 1] or files)

    def check_finite(self, folder: Path) -> None:
        from safetensors.torch import load_file

        for file in sorted(folder.glob("*.safetensors")):
            for name, tensor in load_file(file).items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    self.problems.append(f"{file}: tensor {name} holds NaN or infinity")

    def adapter(self, folder: Path) -> dict:
        """Class, dimensions, parameters, encoders, training, metrics, and the decoders that an adapter fits."""
        from csdiff.adapters import AutoAdapter
        from csdiff.adapters.folder import WEIGHTS, find_variant, read_config, read_metadata, weight_files

        config, metadata, files = {}, {}, []
        with self.noting():
            config = dict(read_config(folder))
        with self.noting():
            metadata = read_metadata(folder)
        kind = config.pop("_class_name", None)
        with self.noting():
            name = "adapter_model.safetensors" if kind == "LoRAAdapter" else WEIGHTS
            files = weight_files(folder, find_variant(folder, name=name), name)
        self.problems += [f"{folder / name} is a pickle, and never read" for name in _pickles(folder)]
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        facts = {
            "class": kind,
            "text_dim": settings.pop("text_dim", None) or settings.get("embedding_dim"),
            "embedding_dim": settings.pop("embedding_dim", None),
            **self.weights(files, STATISTICS),
            "options": settings,
            **{key: metadata.get(key) for key in (*ENCODERS, "normalized", "statistics", "objective", "training")},
            "data": {key: value for key, value in (metadata.get("data") or {}).items() if key != "source"},
            **{key: metadata.get(key) for key in ("metrics", "versions")},
        }
        if config and metadata:
            facts["decoders"] = decoders(facts)
        if self.options.check and not self.problems:
            with self.noting():
                encoders = {name: getattr(self.options, name) for name in ("text_encoder", "image_encoder")}
                AutoAdapter.from_pretrained(folder, **encoders)
        return facts

    def run(self, folder: Path) -> dict:
        """Progress, checkpoints, and the adapter: the finished one, else that of the newest checkpoint."""
        from csdiff.training.config import TrainConfig
        from csdiff.training.run_folder import METRICS_NAME, RunFolder

        run = RunFolder(TrainConfig(output_dir=str(folder)))
        checkpoints = run.checkpoints
        steps, newest, finished = checkpoints.steps(), checkpoints.latest(), (folder / "config.json").is_file()
        config: dict = {}
        with self.noting():
            config = run.saved_options()
        facts = {
            "finished": finished,
            "steps": steps[-1] if steps else 0,
            "max_steps": config.get("max_steps"),
            "train": config.get("data.train"),
            "checkpoints": steps,
        }
        if newest is None and not finished:
            self.problems.append(f"{folder}: the run has left no checkpoint yet; the same command starts it anew")
            return facts
        if newest is not None:
            facts["progress"] = self.progress(newest)
        for name in ("best", "latest"):
            if (named := checkpoints.named(name)) is not None:
                facts[name] = named.name
                if not named.is_dir():
                    self.problems.append(f"{checkpoints.folder / name} names {named.name}, which is missing")
        facts |= self.adapter(folder if finished else newest)
        measured = [line for line in read_jsonl(folder / METRICS_NAME) if line.get("kind") == "validation"]
        if measured and not facts["metrics"]:
            facts["last_validation"] = {"step": measured[-1]["step"], **(measured[-1].get("average") or {})}
        for step in steps if self.options.check else ():
            self.weights(sorted((checkpoints.path(step) / "state").glob("*.safetensors")))
        return facts

    def checkpoint(self, folder: Path) -> dict:
        """The counters of a checkpoint and its adapter."""
        self.weights(sorted((folder / "state").glob("*.safetensors")))
        return {"progress": self.progress(folder), **self.adapter(folder)}

    def progress(self, checkpoint: Path) -> dict:
        content = self.read(checkpoint / "state" / "state.json").get("progress") or {}
        return {key: value for key, value in content.items() if key != "baselines"}

    def store(self, folder: Path) -> dict:
        """Rows, columns, encoders, statistics and what was left out of a store."""
        from csdiff.embeddings import EmbeddingStore
        from csdiff.embeddings.layout import ARRAY_FOLDERS, REPORT_FILE, find_shards

        known = (folder / "csdiff.json").is_file()
        metadata = self.read(folder / "csdiff.json") if known else {}
        report = self.read(folder / REPORT_FILE) if (folder / REPORT_FILE).is_file() else {}
        facts = {
            "layout": "csdiff" if known else "clip-retrieval, without csdiff.json: encoders and checksums are unknown",
            **{key: metadata.get(key) for key in ENCODERS},
            "items": report.get("items"),
            "left_out": report.get("skipped") or {},
            "truncated_captions": report.get("truncated_captions"),
            "versions": metadata.get("versions"),
        }
        with self.noting(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = EmbeddingStore.open(folder, verify=self.options.check)
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
            for key in ("statistics", "text_statistics") if known or self.options.check else ():
                values = getattr(store, key).to_dict() if getattr(store, key) else {}
                facts[key] = {name: value for name, value in values.items() if not isinstance(value, list)}
            if self.options.check:
                for _ in store.blocks():  # reading refuses rows that are not finite
                    pass
        return facts

    def pipeline(self, folder: Path) -> dict:
        """Class and components of a pipeline; of a decoder also how `csdiff generate` would use it."""
        from csdiff.pipelines.decoders import resolve_decoder

        index = self.read(folder / "model_index.json")
        metadata = self.read(folder / "csdiff.json") if (folder / "csdiff.json").is_file() else {}
        components = {}
        for name, value in index.items():
            if not (isinstance(value, list) and len(value) == 2 and value[1]):
                continue
            components[name], part = {"class": value[1]}, folder / name
            if not part.is_dir():
                self.problems.append(f"{part} is missing: model_index.json lists {name}")
            elif (part / "config.json").is_file():
                components[name] |= self.model_weights(part)
            elif any(part.glob("*.safetensors")):
                self.problems.append(f"{part / 'config.json'} is missing")
        decoder = None
        with _Look(self.options).noting():
            source = resolve_decoder(folder)
            decoder = {
                "hand_over": source.hand_over,
                "embedding_dim": source.embedding_dim,
                "preset": source.preset and source.preset.name,
                "image_encoder": (source.encoder("image") or {}).get("id"),
                "sampling": (source.fingerprint or {}).get("sampling"),
            }
        for name in components if self.options.check and not self.problems else ():
            self.check_finite(folder / name)
        return {
            "class": index.get("_class_name"),
            "parameters": sum(part.get("parameters", 0) for part in components.values()),
            "components": components,
            "decoder": decoder,
            **{key: metadata.get(key) for key in ENCODERS},
            "versions": {"diffusers": index.get("_diffusers_version")},
        }

    def encoder(self, folder: Path) -> dict:
        """Class, dimensions and, with --check, the hashes of the weights of a transformers model."""
        from csdiff.embeddings.fingerprint import weights_sha256

        config = self.read(folder / "config.json")
        facts = {
            "class": ", ".join(config.get("architectures") or []) or config.get("model_type"),
            "projection_dim": config.get("projection_dim"),
            **self.model_weights(folder),
            "versions": {"transformers": config.get("transformers_version")},
        }
        if self.options.check and not self.problems:
            towers = ("text", "image") if config.get("model_type") == "clip" else (None,)
            facts["weights_sha256"] = {tower or "all": weights_sha256(folder, tower) for tower in towers}
            self.check_finite(folder)
        return facts


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES)


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


def as_text(facts: dict) -> str:
    """An aligned list under the dotted names of `--json`, and the problems."""
    apart = {name: facts[name] for name in ("kind", "path", "problems")}
    values = {name: value for name, value in flatten(facts).items() if name not in apart and value not in (None, {})}
    width = max(map(len, values), default=0)
    rows = [f"  {name:<{width}}  {_value(name, value)}" for name, value in values.items()]
    end = ["problems" if apart["problems"] else "no problems found", *(f"  {p}" for p in apart["problems"])]
    return "\n".join([f"{apart['kind'].capitalize()} {apart['path']}", *rows, "", *end])


def _value(name: str, value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    if type(value) is int and name.rpartition(".")[2] in ("bytes", "weights"):
        return f"{value / 1e6:,.2f} MB"
    return str(value)[:12] if "sha256" in name else number(value)
