"""Adapters on the Hugging Face Hub: an adapter-only repository is an adapter folder."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from csdiff.errors import CSDiffError
from csdiff.hub import unreachable

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download")
_FILES = ["*.json", "*.safetensors", "README.md"]


def locate(
    name_or_path: str | os.PathLike,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike | None = None,
    local_files_only: bool | None = False,
    force_download: bool = False,
) -> Path:
    """The folder of an adapter: a local one as it is, a Hub repository's downloaded snapshot.

    Raises:
        CSDiffError: Neither a folder here nor a repository that can be reached.
    """
    path = Path(name_or_path)
    is_id = isinstance(name_or_path, str) and _HUB_ID.fullmatch(name_or_path) is not None
    # `runs/adapter` looks like an id too: where `runs` is a folder here, a missing `adapter` is meant.
    if path.exists() or not is_id or path.parent.is_dir():
        return path / subfolder if subfolder else path

    from huggingface_hub import snapshot_download

    silent = None if local_files_only else unreachable()
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        snapshot = snapshot_download(
            name_or_path,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=bool(local_files_only or silent),
            force_download=force_download,
            allow_patterns=[prefix + pattern for pattern in _FILES],
        )
    except Exception as error:
        raise CSDiffError(
            f"Adapter {name_or_path!r} is no folder here, and could not be fetched from the Hub "
            f"({silent or _reason(error)}); check the name, or fetch it once while online."
        ) from error
    return Path(snapshot) / subfolder if subfolder else Path(snapshot)


def push(adapter: Any, repo_id: str, *, commit_message, private, token, create_pr, variant, subfolder, **save) -> str:
    """Saves `adapter` to a temporary folder, creates `repo_id` where it does not exist, and commits the folder."""
    from huggingface_hub import create_repo, upload_folder

    with tempfile.TemporaryDirectory() as directory:
        aside = Path(directory) / "adapter"
        adapter.save_pretrained(aside, variant=variant, card_location=repo_id, **save)
        try:
            repo_id = create_repo(repo_id, private=private, token=token, exist_ok=True).repo_id
            commit = upload_folder(
                repo_id=repo_id,
                folder_path=aside,
                path_in_repo=subfolder,
                commit_message=commit_message,
                token=token,
                create_pr=create_pr,
            )
        except Exception as error:
            raise CSDiffError(
                f"The adapter could not be pushed to {repo_id!r} ({_reason(error)}); check the network, the name and "
                "the token (`hf auth login`)."
            ) from error
    return commit


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
