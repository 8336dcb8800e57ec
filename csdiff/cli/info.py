"""`csdiff info`: what is in an adapter, store, run, checkpoint, pipeline or encoder folder, and what is wrong."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.files import PICKLES, flatten, is_locked, read_json, read_safetensors_header
from csdiff.kinds import described, kind_of
from csdiff.tables import number

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "BOOL": "bool"}
# Buffers of an adapter, not parameters.
STATISTICS = {"clip_mean", "clip_std", "text_mean", "text_std", "norm_scale", "norm_shift"}
ENCODERS = ("text_encoder", "image_encoder", "tokenizer")


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
    if not config.path:
        raise CSDiffError("path: expected a folder, found none named; say which: csdiff info PATH.")
    if not path.exists():
        raise CSDiffError(f"path: expected a folder, found nothing at {config.path!r}; give another path.")
    if path.is_file() and path.suffix != ".safetensors":
        raise CSDiffError(f"path: expected a folder or a .safetensors file, found the file {path}.")
    describe = look.kind(path) if path.is_dir() else look.weights
    facts = describe(path)
    files = [file for file in sorted((path, *path.rglob("*"))) if file.is_file() and not file.is_symlink()]
    if config.check and not look.problems:
        look.read_all(file for file in files if file.suffix == ".safetensors")
    size = {"files": len(files), "bytes": sum(file.stat().st_size for file in files)}
    kind = "decoder" if facts.get("decoder") else describe.__name__
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

    def read(self, read: Callable, *arguments) -> dict | list:
        """What `read` returns; nothing where it fails."""
        with self.noting():
            return read(*arguments)
        return {}

    def json(self, file: Path) -> dict:
        """The object in a file; empty where there is none."""
        return self.read(read_json, file) if file.is_file() else {}

    def kind(self, path: Path) -> Callable[[Path], dict]:
        if kind := kind_of(path):
            return getattr(self, kind)
        raise CSDiffError(
            "path: expected an adapter, a store, a training run, a checkpoint, a pipeline or an encoder, but "
            f"{path} {described(path)}."
        )

    def weights(self, *files: Path) -> dict:
        """`parameters`, `dtype` and `weights` (bytes) of safetensors files, from their headers."""
        counts: Counter[str] = Counter()
        for file in files:
            for name, (dtype, shape) in self.read(read_safetensors_header, file).items():
                if name not in STATISTICS:
                    counts[DTYPES.get(dtype, dtype)] += math.prod(shape)
        dtypes, size = [dtype for dtype, _ in counts.most_common()], sum(file.stat().st_size for file in files)
        return {"parameters": counts.total(), "dtype": ", ".join(dtypes), "weights": size}

    def model_weights(self, folder: Path) -> dict:
        """The weights of a model, without its variants (`model.fp16.safetensors`), or what is in their place."""
        from csdiff.adapters.folder import WEIGHTS, find_variant, weight_files

        names = ("adapter_model.safetensors", "model.safetensors", WEIGHTS)
        name = next((name for name in names if any(folder.glob(f"{Path(name).stem}[.-]*"))), WEIGHTS)
        return self.weights(*self.read(weight_files, folder, find_variant(folder, name=name), name))

    def read_all(self, files: Iterable[Path]) -> None:
        from safetensors.torch import load_file

        for file in files:
            with self.noting():
                read_safetensors_header(file)
                for name, tensor in load_file(file).items():
                    if tensor.is_floating_point() and not tensor.isfinite().all():
                        self.problems.append(f"{file}: tensor {name} holds NaN or infinity")

    def adapter(self, folder: Path) -> dict:
        """What `config.json` and `csdiff.json` say, the weights, and the decoders that an adapter fits."""
        from csdiff.adapters import AutoAdapter
        from csdiff.adapters.folder import read_config, read_metadata

        config, metadata = self.read(read_config, folder), self.read(read_metadata, folder)
        pickles = sorted(file for file in folder.iterdir() if file.suffix in PICKLES)
        self.problems += [f"{file} is a pickle, and never read" for file in pickles]
        facts = {
            "class": config.get("_class_name"),
            **self.model_weights(folder),
            **{name: value for name, value in config.items() if not name.startswith("_")},
            **{name: value for name, value in metadata.items() if name not in ("format", "kind")},
            "data": {name: value for name, value in (metadata.get("data") or {}).items() if name != "source"},
        }
        if config and metadata:
            facts["decoders"] = decoders(facts)
        if self.options.check and not self.problems:
            encoders = {name: getattr(self.options, name) for name in ("text_encoder", "image_encoder")}
            with self.noting():
                AutoAdapter.from_pretrained(folder, **encoders)
        return facts

    def run(self, folder: Path) -> dict:
        """Progress, checkpoints, and the adapter: the finished one, else that of the newest checkpoint."""
        from csdiff.training.config import TrainConfig
        from csdiff.training.run_folder import RunFolder

        run = RunFolder(TrainConfig(output_dir=str(folder)))
        steps, newest, finished = run.checkpoints.steps(), run.checkpoints.latest(), (folder / "config.json").is_file()
        best, config = run.checkpoints.named("best"), self.read(run.saved_options)
        facts = {
            "finished": finished,
            "running": is_locked(folder),
            "steps": steps[-1] if steps else 0,
            "max_steps": config.get("max_steps"),
            "train": config.get("data.train"),
            "checkpoints": steps,
            "best": best and best.name,
        }
        if newest is None and not finished:
            if not facts["running"]:
                self.problems.append(f"{folder}: the run has left no checkpoint yet; the same command starts it anew")
            return facts
        if best is not None and not best.is_dir():
            self.problems.append(f"{best}, the best checkpoint, is missing")
        if finished and newest:
            with suppress(CSDiffError):
                places = (folder, newest)
                found, own = (read_json(p / "config.json") | {"_diffusers_version": None} for p in places)
                if found != own:
                    differing = [key for key in sorted(found.keys() | own.keys()) if found.get(key) != own.get(key)]
                    self.problems.append(
                        f"{folder}: expected the adapter of {newest.name}, found another in its place (told by "
                        f"{', '.join(differing[:3])}); the run's own: csdiff export {folder} --checkpoint latest"
                    )
        progress = {"progress": self.progress(newest)} if newest else {}
        return facts | progress | self.adapter(folder if finished else newest)

    def checkpoint(self, folder: Path) -> dict:
        self.weights(*(folder / "state").glob("*.safetensors"))
        return {"progress": self.progress(folder), **self.adapter(folder)}

    def progress(self, checkpoint: Path) -> dict:
        content = self.json(checkpoint / "state" / "state.json").get("progress") or {}
        return {key: value for key, value in content.items() if key != "baselines"}

    def store(self, folder: Path) -> dict:
        """What `csdiff.json` and `report.json` say, rows, columns and statistics."""
        from csdiff.embeddings import EmbeddingStore
        from csdiff.embeddings.store_files import FINGERPRINT_FILE, PARTIAL_FOLDER, REPORT_FILE

        metadata, report = self.json(folder / FINGERPRINT_FILE), self.json(folder / REPORT_FILE)
        facts = {
            "layout": "csdiff" if metadata else "clip-retrieval, without csdiff.json: encoders are unknown",
            **{key: metadata.get(key) for key in (*ENCODERS, "dtype", "versions")},
            **{key: report.get(key) for key in ("items", "truncated_captions")},
            "left_out": report.get("skipped") or {},
        }
        if not metadata and (partial := folder / PARTIAL_FOLDER).is_dir():
            running = is_locked(partial)
            facts["layout"] = f"csdiff, {'being written' if running else 'not finished'}"
            if running:
                return facts
        with self.noting(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = EmbeddingStore.open(folder, verify=self.options.check)
            first = store.read(range(min(1, len(store))))
            facts |= {
                "rows": len(store),
                "text_dim": store.text_dim,
                "image_dim": store.image_dim,
                "columns": {key: list(first[key].shape[1:]) for key in store.keys},
                "captions": store.metadata is not None and "caption" in store.metadata.names,
                "normalized": store.normalized,
            }
            for key in ("statistics", "text_statistics") if metadata or self.options.check else ():
                values = getattr(store, key).to_dict() if getattr(store, key) else {}
                facts[key] = {name: value for name, value in values.items() if not isinstance(value, list)}
            for _ in store.blocks() if self.options.check else ():  # reading refuses rows that are not finite
                pass
        return facts

    def pipeline(self, folder: Path) -> dict:
        """Class and components of a pipeline; of a decoder also how `csdiff generate` would use it."""
        from csdiff.pipelines.decoders import resolve_decoder

        index, components, decoder = self.json(folder / "model_index.json"), {}, None
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
        with suppress(CSDiffError):
            source = resolve_decoder(folder)
            decoder = {
                "hand_over": source.hand_over,
                "embedding_dim": source.embedding_dim,
                "preset": source.name or None,
                "image_encoder": (source.image_encoder or {}).get("id"),
                "sampling": {"steps": source.steps, "guidance": source.guidance},
            }
        metadata = self.json(folder / "csdiff.json")
        return {
            "class": index.get("_class_name"),
            "parameters": sum(part.get("parameters", 0) for part in components.values()),
            "components": components,
            "decoder": decoder,
            **{key: metadata.get(key) for key in ENCODERS},
            "versions": {"diffusers": index.get("_diffusers_version")},
        }

    def encoder(self, folder: Path) -> dict:
        from csdiff.embeddings.fingerprint import weights_sha256

        config = self.json(folder / "config.json")
        facts = {
            "class": ", ".join(config.get("architectures") or []) or config.get("model_type"),
            "projection_dim": config.get("projection_dim"),
            **self.model_weights(folder),
            "versions": {"transformers": config.get("transformers_version")},
        }
        if self.options.check and not self.problems:
            towers = ("text", "image") if config.get("model_type") == "clip" else (None,)
            facts["weights_sha256"] = {tower or "all": weights_sha256(folder, tower) for tower in towers}
        return facts


def decoders(adapter: dict) -> dict[str, str]:
    """Which decoder presets an adapter (its `embedding_dim`, `image_encoder`, `normalized`) fits, or why not."""
    from csdiff.embeddings.fingerprint import compare_encoders
    from csdiff.pipelines.decoders import PRESETS, resolve_decoder

    verdicts = {}
    for name, preset in PRESETS.items():
        decoder = resolve_decoder(name) if preset.embedding_dim is None else preset
        found = compare_encoders(decoder.image_encoder, adapter.get("image_encoder"), "image")
        words = {"same": "fits", "different": f"no: another image encoder: {found.reason}"}
        verdicts[name] = words.get(found.verdict, f"perhaps: {found.reason}")
        if adapter["embedding_dim"] != decoder.embedding_dim:
            verdicts[name] = f"no: it takes {decoder.embedding_dim} dimensions, found {adapter['embedding_dim']}"
        elif adapter.get("normalized"):
            verdicts[name] = "no: it takes raw embeddings, found an adapter of unit-norm ones"
    return verdicts


def as_text(facts: dict) -> str:
    """An aligned list under the dotted names of `--json`, and the problems."""
    known = {name: value for name, value in flatten(facts).items() if name != "problems" and value not in (None, {})}
    width = max(map(len, known))
    rows = [
        f"{name:<{width}}  {' '.join(map(str, value)) if isinstance(value, list) else number(value)}"
        for name, value in known.items()
    ]
    return "\n".join([*rows, "", *(facts["problems"] or ["no problems found"])])
