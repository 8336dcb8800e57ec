"""The model hub: whether it can be asked, what it has, and giving it a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csdiff.errors import CSDiffError

_PATIENCE = 5.0


def unreachable() -> str | None:
    """Why the hub cannot be asked, or None. One short try: the hub's own client repeats it for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE)
    except Exception as error:
        return f"{constants.ENDPOINT} does not answer: {type(error).__name__}"
    return None


def download(repo: str, what: str, file: str | None = None, **options: Any) -> Path:
    """The snapshot of a hub repository ("owner/name"), or one file; what is here where the hub cannot be asked.

    `options` are those of `huggingface_hub.snapshot_download` and `hf_hub_download`; `what` is for the message.

    Raises:
        CSDiffError: It is neither here nor to be had from the hub, and why.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    silent = None if options.get("local_files_only") else unreachable()
    options["local_files_only"] = bool(options.get("local_files_only") or silent)
    try:
        return Path(hf_hub_download(repo, file, **options) if file else snapshot_download(repo, **options))
    # The client raises some twenty kinds, and every one (no network, no such repository, no permission) has one cure.
    except Exception as error:
        raise CSDiffError(
            f"{repo}: expected {what}, found no such folder here, and neither a local copy nor the hub "
            f"({silent or _reason(error)}); check the name, fetch it once where there is a network, or give a folder; "
            "with HF_HUB_OFFLINE=1 the hub is not asked."
        ) from error


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
        CSDiffError: The hub cannot be reached or refuses.
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
