"""Saving adapters to folders, loading them back, and the Hub."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from csdiff.adapters import folder, hub
from csdiff.adapters.card import model_card
from csdiff.errors import CSDiffError


class Persistent:
    """Gives a `ModelMixin` the adapter folder: written whole, checked before it is loaded, without pickle."""

    metadata: dict[str, Any]

    def _write_folder(self, directory: os.PathLike, max_shard_size: int | str, variant: str | None) -> None:
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

        Everything is written aside first and moved into place when whole, so that an interrupted save leaves what was
        there before. Arguments are those of diffusers' `ModelMixin.save_pretrained`; only the main process writes.

        Raises:
            CSDiffError: The folder cannot be written, or `safe_serialization=False` (no pickle is ever written).
        """
        if not safe_serialization or kwargs.pop("use_flashpack", False):
            raise CSDiffError("Adapters are saved as safetensors only; leave `safe_serialization` at True.")
        if not is_main_process:
            return
        metadata = folder.complete_metadata(self.metadata)
        with folder.written_whole(save_directory) as aside:
            self._write_folder(aside, max_shard_size, variant)
            (aside / folder.METADATA).write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n", "utf-8")
            (aside / folder.CARD).write_text(model_card(self, metadata, kwargs.pop("card_location", ".")), "utf-8")
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", Path(save_directory).resolve().name)
            self.push_to_hub(repo_id, variant=variant, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
    ) -> str:
        """Creates the repository `repo_id` if need be and commits the adapter folder to it; returns the commit's URL.

        Raises:
            CSDiffError: The Hub cannot be reached or refuses.
        """
        return hub.push(
            self,
            repo_id,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            private=private,
            token=token,
            create_pr=create_pr,
            variant=variant,
            subfolder=subfolder,
            safe_serialization=safe_serialization,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "Persistent":
        """Loads an adapter folder, or a repository of the Hub by its id. Nothing in it is executed.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): A folder, or `"owner/name"`.
            **kwargs: `torch_dtype` of the weights (the statistics stay float32); `subfolder`, `variant`, `revision`,
                `token`, `cache_dir`, `local_files_only`, `force_download`, `device_map`, `output_loading_info` as in
                diffusers' `ModelMixin.from_pretrained`.

        Raises:
            CSDiffError: A missing or incomplete folder, a pickle, a truncated file, a config of another class,
                tensors missing, left over or of another shape, weights that are not finite.
        """
        hub_options = {name: kwargs.pop(name) for name in hub.OPTIONS if name in kwargs}
        path = hub.locate(pretrained_model_name_or_path, subfolder=kwargs.pop("subfolder", None), **hub_options)
        config = folder.read_config(path, cls)
        metadata = folder.read_metadata(path)
        adapter, info = cls._load_folder(path, config, kwargs)
        folder.check_finite(path, adapter)
        adapter.metadata = metadata
        adapter.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return (adapter, info) if kwargs.get("output_loading_info") else adapter

    @classmethod
    def _load_folder(cls, path, config: dict[str, Any], options: dict[str, Any]):
        """Builds the adapter from a folder whose config is checked; returns it with diffusers' loading info."""
        folder.check_weights(path, cls, config, options.get("variant"))
        dtype = options.get("torch_dtype")
        options = {k: v for k, v in options.items() if k not in ("torch_dtype", "use_safetensors", "use_flashpack")}
        options["output_loading_info"] = True
        # Loaded in float32 and cast here, where `_apply` keeps the statistics exact.
        adapter, info = super().from_pretrained(path, use_safetensors=True, **options)
        return (adapter if dtype is None else torch.nn.Module.to(adapter, dtype)), info
