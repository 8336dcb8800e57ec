"""Saving adapters to folders, loading them back, and the Hub."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path
from typing import Any

import torch

from csdiff.adapters import folder
from csdiff.adapters.card import model_card
from csdiff.embeddings.encoders import find_encoder
from csdiff.errors import CSDiffError
from csdiff.files import writing_folder
from csdiff.hub import push
from csdiff.kinds import KINDS, kind_of


class Persistent:
    """Gives a `ModelMixin` the adapter folder: written whole, checked before it is loaded, without pickle."""

    metadata: dict[str, Any]

    def _write_weights(self, directory: Path, max_shard_size: int | str, variant: str | None) -> None:
        super().save_pretrained(directory, max_shard_size=max_shard_size, variant=variant)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        save_function=None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the adapter folder: `config.json`, `*.safetensors`, `csdiff.json` and `README.md` (the model card).

        It appears when whole: an interrupted save leaves what was there before. Arguments are those of diffusers'
        `ModelMixin.save_pretrained`; only the main process writes. Weights of other variants in the folder stay.

        Raises:
            CSDiffError: The folder cannot be written, is a training run or a checkpoint of one, or
                `safe_serialization=False` (no pickle is ever written).
        """
        if not safe_serialization or kwargs.pop("use_flashpack", False):
            raise CSDiffError("Adapters are saved as safetensors only; leave `safe_serialization` at True.")
        if not is_main_process:
            return
        target, location = Path(save_directory), kwargs.pop("card_location", ".")
        if not kwargs.pop("of_this_run", False) and (kind := kind_of(target)) in ("run", "checkpoint"):
            raise CSDiffError(
                f"Cannot save the adapter to {target}: expected a folder of its own, found {KINDS[kind]}, whose "
                "adapter it would replace; choose another folder."
            )
        metadata = folder.complete_metadata(self.metadata)
        try:
            if target.is_file():
                raise FileExistsError(0, "it is a file")
            with writing_folder(target, lambda name: folder.variant_of(name) == variant) as aside:
                self._write_weights(aside, max_shard_size, variant)
                (aside / folder.METADATA).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", "utf-8")
                (aside / folder.CARD).write_text(model_card(self, metadata, location), "utf-8")
        except OSError as error:
            raise CSDiffError(
                f"Cannot save the adapter to {target}: {error.strerror or error}; choose a folder that can be written "
                "and has room."
            ) from error
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.resolve().name), variant=variant, **kwargs)

    def push_to_hub(self, repo_id: str, variant: str | None = None, **options: Any) -> str:
        """Commits the adapter folder to the repository `repo_id` ("owner/name"), made where there is none.

        `options` are `commit_message`, `private`, `token`, `create_pr` and `subfolder`, as in diffusers. Returns the
        commit's URL.

        Raises:
            CSDiffError: The Hub cannot be reached or refuses, or `safe_serialization=False`.
        """
        save = {"safe_serialization": options.pop("safe_serialization", True), "variant": variant}
        write = functools.partial(self.save_pretrained, card_location=repo_id, **save)
        return push(repo_id, write, **{"commit_message": f"Upload {type(self).__name__}", **options})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Persistent:
        """Loads an adapter folder, or a repository of the Hub by its id. Nothing in it is executed.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or `"owner/name"`.
            **kwargs: `text_encoder` and `image_encoder`, where the encoders that `csdiff.json` names went: a folder, a
                Hub id, or a preset's name; `dtype` (or `torch_dtype`) of the weights, float32 by default (the
                statistics stay float32); `subfolder`, `variant`, `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`, `device_map`, `output_loading_info` as in diffusers'
                `ModelMixin.from_pretrained`. A folder that holds one variant alone needs no `variant`.

        Raises:
            CSDiffError: A missing or incomplete folder, a pickle, a truncated file, a config of another class, entries
                of `csdiff.json` of another type, tensors missing, left over or of another shape, weights that are not
                finite, deviations that are not positive, an encoder with other weights than the adapter's.
        """
        path = folder.locate(pretrained_model_name_or_path, kwargs)
        config = folder.read_config(path, cls)
        metadata = folder.read_metadata(path)
        for tower in ("text", "image"):
            name = f"{tower}_encoder"
            if (given := kwargs.pop(name, None)) is not None:
                metadata[name] = find_encoder(metadata.get(name), tower, given, f"the adapter {path}")
                if name in config:
                    config[name] = metadata[name]["id"]
        kwargs["variant"] = folder.find_variant(path, kwargs.get("variant"))
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        adapter, info = cls._load_folder(path, config, kwargs)
        for dtype in filter(None, dtypes):
            # Cast here, where `_apply` keeps the statistics exact.
            torch.nn.Module.to(adapter, dtype)
        adapter.metadata = metadata
        adapter.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return (adapter, info) if kwargs.get("output_loading_info") else adapter

    @classmethod
    def _load_folder(cls, path: Path, config: dict[str, Any], options: dict[str, Any]) -> tuple[Persistent, dict]:
        """Builds the adapter from a folder whose config is checked; returns it with diffusers' loading info."""
        found = folder.read_header(folder.weight_files(path, options["variant"]))
        folder.check_sizes(path, config, found)
        with folder.described_by(path, cls), torch.device("meta"):
            expected = cls.from_config(dict(config)).state_dict()
        folder.check_tensors(path, expected, found)
        options = {**options, "use_safetensors": True, "use_flashpack": False, "output_loading_info": True}
        adapter, info = super().from_pretrained(path, **options)
        folder.check_values(adapter.state_dict(), found)
        return adapter, info
