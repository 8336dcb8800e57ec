"""The model card (`README.md`) of an adapter folder."""

import json
from typing import Any

import yaml

from csdiff.files import flatten

_CARD = """\
---
{header}---

# Text to image embeddings of {image}

A csdiff `{kind}` that maps {config.text_dim}-dimensional text embeddings of {text} to
{config.embedding_dim}-dimensional image embeddings of {image}, raw (not normalised), as unCLIP-style
decoders want them.

- Trainable parameters: {parameters:,}
- Licence: {license}
- Objective: {objective}

## Metrics

{metrics}

## Usage

{where}

```python
import torch

from csdiff import AutoAdapter

adapter = AutoAdapter.from_pretrained({location})
{inputs}
print(image_embeds.shape)
```
"""
_CAPTIONS = """
With captions:

```python
from csdiff import AutoAdapter
from csdiff.embeddings import load_text_encoder

adapter = AutoAdapter.from_pretrained({location})
text = load_text_encoder({text}).encode(["a red apple"])
image_embeds = adapter.embed(text.embeds, text.states, text.mask)
```
"""
_TINY = """
A picture, with the shipped decoder:

```python
from csdiff.pipelines import GenerateConfig, generate

generate(GenerateConfig(["a red apple"], adapter={location}, output="."))  # writes a-red-apple-0.png
```
"""
_DRAWING = """
What a decoder of the same image encoder takes:

```python
from csdiff import CSDiffPriorPipeline
{imports}
prior = CSDiffPriorPipeline.from_pretrained({folder})
image_embeds, negative_image_embeds = prior("a red apple").to_tuple()
```
"""


def model_card(adapter: Any, metadata: dict[str, Any], location: str = ".") -> str:
    """Markdown with licence, what the adapter maps, metrics (of `metadata`, the content of `csdiff.json`) and usage
    code that runs; `location` is what that loads: `"."` (run it inside the folder) or a Hub id.
    """
    kind, license = type(adapter).__name__, metadata.get("license")
    header = {"license": license} if license else {}
    header |= {"library_name": "csdiff", "tags": ["csdiff", "diffusers", "unclip", "prior", kind]}
    ids = {tower: (metadata.get(f"{tower}_encoder") or {}).get("id") for tower in ("text", "image")}
    names = {tower: f"`{id}`" if id else "an encoder that is not recorded" for tower, id in ids.items()}
    metrics = flatten(metadata.get("metrics") or {}).items()
    metrics = [("pairs measured on" if name == "count" else name, value) for name, value in metrics]
    rows = [f"| {name} | {f'{value:.4g}' if isinstance(value, float) else value} |" for name, value in metrics]
    card = _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        kind=kind,
        config=adapter.config,
        **names,
        parameters=sum(p.numel() for p in adapter.parameters() if p.requires_grad),
        license=license or "not stated",
        objective=f"`{metadata['objective']}`" if metadata.get("objective") else "not recorded",
        metrics="\n".join(["| metric | value |", "| --- | --- |", *rows]) if rows else "Not measured.",
        where="Inside this folder:" if location == "." else "Anywhere:",
        location=json.dumps(location),
        inputs="\n".join(_inputs(adapter)),
    )
    if ids["text"] and not adapter.uses_input_ids:
        card += _CAPTIONS.format(location=json.dumps(location), text=json.dumps(ids["text"]))
    pooling = (metadata.get("text_encoder") or {}).get("pooling") or "projection"
    if ids["text"] and ids["image"] and pooling == "projection" and not metadata.get("normalized"):
        folder, imports = json.dumps(location), ""
        if ids["image"] == "tiny-clip":
            card += _TINY.format(location=folder)
        if location != ".":
            # Of the hub the pipeline reads pipelines, and adapters from folders.
            folder, imports = f"snapshot_download({folder})", "from huggingface_hub import snapshot_download\n"
        card += _DRAWING.format(folder=folder, imports=imports)
    return card


def _inputs(adapter: Any) -> list[str]:
    config = adapter.config
    if adapter.uses_input_ids:
        length = adapter.text_encoder.config.max_position_embeddings
        ids = f"input_ids = torch.zeros(1, {length}, dtype=torch.long)  # of the text encoder's tokenizer"
        return [ids, "image_embeds = adapter.embed_input_ids(input_ids)"]
    text = f"text_embeds = torch.randn(1, {config.text_dim})  # raw projected text embeddings"
    if not adapter.uses_text_states:
        return [text, "image_embeds = adapter.embed(text_embeds)"]
    states = f"text_states = torch.randn(1, {config.num_embeddings}, {config.states_dim})  # last hidden states"
    return [text, states, "image_embeds = adapter.embed(text_embeds, text_states)"]
