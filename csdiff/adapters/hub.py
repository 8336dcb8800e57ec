"""Adapters on the Hugging Face Hub: an adapter-only repository is an adapter folder."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csdiff.errors import CSDiffError
from csdiff.hub import unreachable

OPTIONS = ("subfolder", "revision", "token", "cache_dir", "local_files_only", "force_download")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.json", "*.safetensors", "README.md")


def locate(name_or_path: str | os.PathLike, *, subfolder: str | None = None, **options: Any) -> Path:
    """The folder of an adapter: a local one as it is, of a Hub repository ("owner/name") the downloaded snapshot.

    The other `options` are those of `huggingface_hub.snapshot_download`.

    Raises:
        CSDiffError: Neither a folder here nor a repository that can be reached.
    """
    path = Path(name_or_path)
    is_id = isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path) is not None
    # `runs/adapter` looks like an id too: where `runs` is a folder here, a missing `adapter` is meant.
    if not path.exists() and is_id and not path.parent.is_dir():
        from huggingface_hub import snapshot_download

        silent = None if options.get("local_files_only") else unreachable()
        options["local_files_only"] = bool(options.get("local_files_only") or silent)
        patterns = [f"{subfolder}/{pattern}" if subfolder else pattern for pattern in _FILES]
        try:
            path = Path(snapshot_download(name_or_path, allow_patterns=patterns, **options))
        # every reason (no network, no such repository, no permission) has one cure
        except Exception as error:
            raise CSDiffError(
                f"Adapter {name_or_path!r} is no folder here, and could not be fetched from the Hub "
                f"({silent or _reason(error)}); check the name, or fetch it once while online."
            ) from error
    return path / subfolder if subfolder else path


def push(
    repo_id: str,
    save: Callable[[Path], object],
    *,
    private: bool | None = None,
    subfolder: str | None = None,
    **commit,
) -> str:
    """Has `save` fill a temporary folder, creates `repo_id` where it does not exist, and commits the folder.

    `commit` are `commit_message`, `token` and `create_pr`, as `huggingface_hub.upload_folder` takes them.

    Raises:
        CSDiffError: The Hub cannot be reached or refuses.
    """
    from huggingface_hub import create_repo, upload_folder

    with tempfile.TemporaryDirectory() as directory:
        aside = Path(directory) / "folder"
        save(aside)
        try:
            repo_id = create_repo(repo_id, private=private, token=commit.get("token"), exist_ok=True).repo_id
            return upload_folder(repo_id=repo_id, folder_path=aside, path_in_repo=subfolder, **commit)
        except Exception as error:
            raise CSDiffError(
                f"The folder could not be pushed to {repo_id!r} ({_reason(error)}); check the network, the name and "
                "the token (`hf auth login`)."
            ) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
