"""What is in a pipeline folder saved by diffusers, decoders among them, and in an encoder folder."""

from __future__ import annotations

from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.info.adapters import encoders
from csdiff.info.files import read_json, weights


def is_pipeline(folder: Path) -> bool:
    """Whether diffusers has saved a pipeline there."""
    return (folder / "model_index.json").is_file()


def is_encoder(folder: Path) -> bool:
    """Whether transformers has saved a model there."""
    return "model_type" in read_json(folder / "config.json", [])


def describe_pipeline(folder: Path, problems: list[str], check: bool) -> dict:
    """Class and components of a pipeline; of a decoder also what it takes, and which adapters fit."""
    index = read_json(folder / "model_index.json", problems)
    components = {}
    for name, value in index.items():
        if not (isinstance(value, list) and len(value) == 2 and value[1]):
            continue
        components[name] = {"class": value[1]}
        part = folder / name
        if not part.is_dir():
            problems.append(f"{part} is missing: model_index.json lists {name}")
        elif (part / "config.json").is_file():
            components[name] |= weights(part, problems)
        elif any(part.glob("*.safetensors")):
            problems.append(f"{part / 'config.json'} is missing")
    metadata = read_json(folder / "csdiff.json", problems) if (folder / "csdiff.json").is_file() else {}
    facts = {
        "class": index.get("_class_name"),
        "parameters": sum(part.get("parameters", 0) for part in components.values()),
        "components": components,
        "decoder": _decoder(folder),
        **encoders(metadata),
        "versions": {"diffusers": index.get("_diffusers_version")},
    }
    if check and not problems:
        for name, part in components.items():
            if "parameters" in part:
                problems.extend(_not_finite(folder / name))
    return facts


def describe_encoder(folder: Path, problems: list[str], check: bool) -> dict:
    """Class, dimensions and hash of the weights of a transformers model."""
    config = read_json(folder / "config.json", problems)
    facts = {
        "class": ", ".join(config.get("architectures") or []) or config.get("model_type"),
        "projection_dim": config.get("projection_dim"),
        **weights(folder, problems),
        "versions": {"transformers": config.get("transformers_version")},
    }
    if check and not problems:
        from csdiff.embeddings.fingerprint import TOWER_PREFIXES, weights_sha256

        # the two towers of one model have a hash each, as in csdiff.json
        towers = tuple(TOWER_PREFIXES) if config.get("model_type") == "clip" else (None,)
        facts["weights_sha256"] = {tower or "all": weights_sha256(folder, tower) for tower in towers}
        problems.extend(_not_finite(folder))
    return facts


def _decoder(folder: Path) -> dict | None:
    """How `csdiff generate` would use the folder; None when it is no decoder."""
    from csdiff.pipelines.decoders import resolve_decoder

    try:
        source = resolve_decoder(folder)
    except CSDiffError:
        return None
    preset = source.preset
    return {
        "hand_over": source.hand_over,
        "embedding_dim": source.embedding_dim,
        "preset": None if preset is None else preset.name,
        "image_encoder": (source.encoder("image") or {}).get("id"),
        "sampling": (source.fingerprint or {}).get("sampling"),
    }


def _not_finite(folder: Path) -> list[str]:
    from safetensors.torch import load_file

    problems = []
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                problems.append(f"{file}: tensor {name} holds NaN or infinity")
    return problems
