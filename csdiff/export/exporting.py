"""What `csdiff export` does."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from csdiff.adapters.base import Adapter
from csdiff.adapters.folder import check_values
from csdiff.errors import CSDiffError
from csdiff.export import sources
from csdiff.export.config import ExportConfig
from csdiff.files import writing_folder
from csdiff.pipelines.decoders import resolve_decoder
from csdiff.pipelines.pairing import AdapterCard
from csdiff.training.run_folder import CONFIG_NAME

DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
TEXT_ENCODER = "text_encoder"


@dataclass(frozen=True)
class ExportResult:
    """What was exported.

    Attributes:
        output: Folder that was written; None when everything went to the hub.
        source: Adapter folder the weights come from.
        format: adapter, prior or pipeline.
        adapter: Class of the adapter.
        weights: average or online; None when the adapter does not say.
        step: Updates of the training run; None when the adapter does not say.
        dtype: Of the weights.
        url: Of the commit on the hub, if any.
    """

    output: Path | None
    source: str
    format: str
    adapter: str
    weights: str | None
    step: int | None
    dtype: str
    url: str | None = None


def export(config: ExportConfig) -> ExportResult:
    """Writes an adapter as a folder of its own, or as a pipeline with its encoders.

    Everything is looked at before anything is written, and the folder appears when it is whole.

    Raises:
        CSDiffError: No adapter there, a folder in the way, weights that do not fit the number format, encoders or a
            decoder that are not there or do not fit, or a hub that refuses.
        OSError: The place cannot be written.
    """
    source = sources.locate(config)
    output = _check_output(config, source)
    adapter = sources.load(source, config.weights)
    uses_lora = getattr(adapter, "uses_input_ids", False)
    if config.merge_lora and not uses_lora:
        raise CSDiffError(f"merge_lora: expected a LoRA adapter, found a {type(adapter).__name__}; leave it out.")
    training = adapter.metadata.get("training") or {}
    dtype = DTYPES[config.dtype] if config.dtype else adapter.dtype
    name = type(adapter).__name__
    _cast(adapter, dtype, source)

    if config.format == "adapter":
        write, push = _adapter_writer(adapter, output, config.merge_lora, config.push_to_hub)
    else:
        write, push = _pipeline_writer(config, adapter, dtype, Path(output or config.push_to_hub))
    if output is not None:
        with writing_folder(output, whole=True) as aside:
            write(aside)
    url = None
    if config.push_to_hub:
        url = push(config.push_to_hub, config.private)
    return ExportResult(
        output,
        str(source),
        config.format,
        name,
        training.get("weights"),
        training.get("steps"),
        str(dtype).removeprefix("torch."),
        url and str(url),
    )


def as_text(result: ExportResult) -> str:
    """Where it went: the folder, then the commit on the hub."""
    return "\n".join(str(place) for place in (result.output, result.url) if place)


def _check_output(config: ExportConfig, source: str | Path) -> Path | None:
    if not config.output:
        if config.push_to_hub:
            return None
        raise CSDiffError("output: expected a folder to write, found none; give --output DIR or --push_to_hub ID.")
    output = Path(config.output)
    if output.exists() and not output.is_dir():
        raise CSDiffError(f"output: expected a folder, found the file {output}; give another --output.")
    if output.is_dir() and any(output.iterdir()):
        if not config.overwrite:
            raise CSDiffError(f"output: {output} is not empty; give another --output, or --overwrite to replace it.")
        ours = any((output / name).is_file() for name in ("csdiff.json", "model_index.json"))
        if not ours or (output / CONFIG_NAME).exists() or (output / "state").exists():
            raise CSDiffError(
                f"output: {output} is not an exported adapter or pipeline, and is not replaced; give another --output."
            )
        if Path(source).exists() and Path(source).resolve().is_relative_to(output.resolve()):
            raise CSDiffError(f"output: {output} holds the adapter that is exported; give another --output.")
    return output


def _cast(adapter: Adapter, dtype: torch.dtype, source: str | Path) -> None:
    torch.nn.Module.to(adapter, dtype)
    try:
        check_values(Path(source), adapter.state_dict())
    except CSDiffError as error:
        # they were finite when they were loaded
        raise CSDiffError(
            f"dtype: weights of {source} are beyond the range of {str(dtype).removeprefix('torch.')}; use bfloat16 or "
            "float32."
        ) from error


def _adapter_writer(adapter: Adapter, output: Path | None, merge: bool, repo: str | None) -> tuple[Callable, Callable]:
    if not merge:
        return adapter.save_pretrained, lambda repo, private: adapter.push_to_hub(repo, private=private)
    if output is None or repo:
        raise CSDiffError(
            "merge_lora: an adapter folder names its merged text encoder by place, which a hub repository cannot; "
            "push it with --format prior."
        )

    def write(folder: Path) -> None:
        from csdiff.embeddings import load_text_encoder
        from csdiff.embeddings.fingerprint import weights_sha256

        merged, prior = adapter.merged_text_encoder(), adapter.as_prior()
        named = adapter.metadata.get("text_encoder") or {}
        merged.save_pretrained(folder / TEXT_ENCODER)
        load_text_encoder(named.get("id") or adapter.config.text_encoder).tokenizer.save_pretrained(
            folder / TEXT_ENCODER
        )
        prior.metadata["text_encoder"] = {
            **named,
            "id": str((output / TEXT_ENCODER).absolute()),
            "revision": None,
            "weights_sha256": weights_sha256(folder / TEXT_ENCODER, "text"),
        }
        prior.save_pretrained(folder)

    return write, _upload


def _pipeline_writer(
    config: ExportConfig, adapter: Adapter, dtype: torch.dtype, name: Path
) -> tuple[Callable, Callable]:
    from csdiff.export.pipelines import check_decoder, combined_pipeline, prior_pipeline, readme

    card = AdapterCard(Path(config.source), dict(adapter.config), adapter.metadata)
    decoder = resolve_decoder(config.decoder) if config.format == "pipeline" else None
    if decoder is not None:
        check_decoder(card, decoder)
    pipe = prior_pipeline(adapter, dtype)
    prior = pipe.prior
    if decoder is not None:
        pipe = combined_pipeline(pipe, card, decoder, dtype)

    def write(folder: Path) -> None:
        pipe.save_pretrained(folder, safe_serialization=True)
        (folder / "README.md").write_text(readme(name, type(pipe).__name__, prior), encoding="utf-8")

    def push(repo: str, private: bool) -> str:
        with tempfile.TemporaryDirectory() as directory:
            folder = Path(directory) / "pipeline"
            folder.mkdir()
            write(folder)
            return _upload(repo, private, folder)

    return write, push


def _upload(repo: str, private: bool, folder: Path) -> str:
    from huggingface_hub import create_repo, upload_folder

    try:
        repo = create_repo(repo, private=private, exist_ok=True).repo_id
        return upload_folder(repo_id=repo, folder_path=folder, commit_message="Upload pipeline")
    # every reason (no network, no token, no such owner) is told the same way
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise CSDiffError(
            f"push_to_hub: {repo!r} could not be written ({type(error).__name__}: {lines[0][:160]}); check the "
            "network, the name and the token (`hf auth login`)."
        ) from error
