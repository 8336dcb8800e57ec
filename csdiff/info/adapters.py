"""What is in an adapter folder."""

from __future__ import annotations

from pathlib import Path

from csdiff.errors import CSDiffError
from csdiff.info.files import PICKLES, read_json, weights

ADAPTER_CLASSES = ("MLPAdapter", "TransformerAdapter", "LinearAdapter", "LoRAAdapter", "DiffusionAdapter")
# Buffers, not parameters.
STATISTICS = {"clip_mean", "clip_std", "text_mean", "text_std", "norm_scale", "norm_shift"}


def is_adapter(folder: Path) -> bool:
    """Whether a folder has an adapter's config, or at least its `csdiff.json`."""
    if read_json(folder / "csdiff.json", []).get("kind") == "adapter":
        return True
    return read_json(folder / "config.json", []).get("_class_name") in ADAPTER_CLASSES


def describe_adapter(folder: Path, problems: list[str], check: bool) -> dict:
    """Class, dimensions, parameters, encoders, statistics, training and metrics of an adapter."""
    config = read_json(folder / "config.json", problems)
    metadata = read_json(folder / "csdiff.json", problems)
    lora = ["adapter_model.safetensors"] if config.get("_class_name") == "LoRAAdapter" else []
    found = weights(folder, problems, lora, lambda name: name not in STATISTICS)
    if not lora:
        for pickle in sorted(file.name for file in folder.iterdir() if file.suffix in PICKLES):
            problems.append(f"{folder / pickle} is a pickle; it is never read, and nobody should")
    options = {name: value for name, value in config.items() if not name.startswith("_")}
    facts = {
        "class": config.get("_class_name"),
        "text_dim": options.pop("text_dim", None) or options.get("embedding_dim"),
        "embedding_dim": options.pop("embedding_dim", None),
        **found,
        "options": options,
        **encoders(metadata),
        "normalized": metadata.get("normalized"),
        "statistics": metadata.get("statistics"),
        "objective": metadata.get("objective"),
        "training": metadata.get("training"),
        "data": {key: value for key, value in (metadata.get("data") or {}).items() if key != "source"},
        "metrics": metadata.get("metrics"),
        "export": metadata.get("export"),
        "versions": metadata.get("versions"),
    }
    if check and not problems:
        from csdiff.adapters import AutoAdapter

        try:
            AutoAdapter.from_pretrained(folder)
        except (CSDiffError, OSError) as error:
            problems.append(str(error))
    return facts


def encoders(metadata: dict) -> dict:
    """The encoders and the tokenizer of a `csdiff.json`."""
    return {key: metadata.get(key) for key in ("text_encoder", "image_encoder", "tokenizer")}
