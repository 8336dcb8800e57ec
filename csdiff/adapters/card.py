"""The model card (`README.md`) of an adapter folder."""

import json
from typing import Any

import yaml


def model_card(adapter: Any, metadata: dict[str, Any], location: str = ".") -> str:
    """Markdown with licence, what the adapter maps, metrics and usage code that runs.

    Args:
        adapter: The adapter the card describes.
        metadata: Content of `csdiff.json`; `license` (default Apache-2.0), `metrics`, `objective` and the encoders
            are shown when present.
        location: What the usage code loads: `"."` (run it inside the folder) or a Hub id.
    """
    text, image = metadata.get("text_encoder") or {}, metadata.get("image_encoder") or {}
    config = adapter.config
    header = {
        "license": metadata.get("license") or "apache-2.0",
        "library_name": "csdiff",
        "tags": ["csdiff", "diffusers", "unclip", "prior", type(adapter).__name__],
    }
    lines = ["---", yaml.safe_dump(header, sort_keys=False).strip(), "---", "", f"# {type(adapter).__name__}", ""]
    lines += [
        f"Maps {config.text_dim}-dimensional text embeddings of {_name(text)} to {config.embedding_dim}-dimensional "
        f"image embeddings of {_name(image)}, raw (not normalised), as unCLIP-style decoders want them.",
        "",
        f"- Trainable parameters: {sum(p.numel() for p in adapter.parameters() if p.requires_grad):,}",
        f"- Licence: {header['license']}",
    ]
    if objective := metadata.get("objective"):
        lines.append(f"- Objective: `{objective}`")
    lines += ["", "## Metrics", ""]
    rows = list(_flat(metadata.get("metrics") or {}))
    if rows:
        lines += ["| metric | value |", "| --- | --- |", *(f"| {name} | {_value(value)} |" for name, value in rows)]
    else:
        lines.append("Not measured.")
    lines += ["", "## Usage", "", *_usage(adapter, text, location), ""]
    return "\n".join(lines)


def _usage(adapter: Any, text: dict[str, Any], location: str) -> list[str]:
    where = "inside this folder" if location == "." else "anywhere"
    lines = [
        f"Run {where}:",
        "",
        "```python",
        "import torch",
        "",
        "from csdiff import AutoAdapter",
        "",
        f"adapter = AutoAdapter.from_pretrained({json.dumps(location)})",
        *adapter.usage_inputs(),
        "print(image_embeds.shape)",
        "```",
    ]
    if text.get("id") and not adapter.uses_input_ids:
        lines += [
            "",
            "With captions:",
            "",
            "```python",
            "from csdiff import AutoAdapter",
            "from csdiff.embeddings import load_text_encoder",
            "",
            f"adapter = AutoAdapter.from_pretrained({json.dumps(location)})",
            f'text = load_text_encoder({json.dumps(text["id"])}).encode(["a red apple"])',
            "image_embeds = adapter.embed(text.embeds, text.states, text.mask)",
            "```",
        ]
    return lines


def _name(encoder: dict[str, Any]) -> str:
    return f"`{encoder['id']}`" if encoder.get("id") else "an encoder that is not recorded"


def _flat(metrics: dict[str, Any], prefix: str = ""):
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + str(name), value


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
