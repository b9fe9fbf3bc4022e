"""Checkpoints on the Hugging Face hub: the local cache first, then the network, with the hub's progress bars."""

from __future__ import annotations

import errno
import re
import sys
from pathlib import Path

from tvm_sparse.checkpoint.base import WeightsUnavailable
from tvm_sparse.checkpoint.folder import INDEX, SIDE_FILES, shard_names
from tvm_sparse.errors import Refusal, Stopped

HUB_IDS = {
    "qwen3.5-0.8b": "Qwen/Qwen3.5-0.8B",
    "qwen3.5-2b": "Qwen/Qwen3.5-2B",
    "qwen3.5-4b": "Qwen/Qwen3.5-4B",
    "qwen3.5-9b": "Qwen/Qwen3.5-9B",
    "qwen3.5-27b": "Qwen/Qwen3.5-27B",
    "qwen3.6-27b": "Qwen/Qwen3.6-27B",
    "qwen3.8-27b": "Qwen/Qwen3.8-27B",
}
_FILES = ["config.json", INDEX, "*.safetensors", *SIDE_FILES]
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def is_hub_id(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None


def cached(hub_id: str) -> Path | None:
    """The local copy of a repository where it is complete: configuration, index and every shard."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _complete(folder) else None


def download(hub_id: str) -> Path:
    """A repository's folder in the local cache, fetched where it is not there yet; resumes what was begun.

    Raises Refusal for a repository that does not exist, WeightsUnavailable where the hub cannot be reached or does
    not give the files, Stopped for a full disk.
    """
    from huggingface_hub import snapshot_download

    _quiet_off_terminal()
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=_FILES))
    except Exception as error:
        raise _explained(hub_id, error) from error
    if not _complete(folder):  # the hub's client gives what is in the cache where it cannot reach the hub
        raise _no_weights(hub_id, "it has no safetensors, or could not be reached for the rest of them")
    return folder


def fetch_configuration(hub_id: str) -> Path:
    """A folder with config.json and generation_config.json of a repository, without its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted = ["config.json", "generation_config.json"]
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=wanted, local_files_only=True))
        if (folder / "config.json").is_file():
            return folder
    except LocalEntryNotFoundError:
        pass
    _quiet_off_terminal()
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:
        known = ", ".join(HUB_IDS)
        raise Refusal(
            f"the configuration of {hub_id} cannot be had ({_short(error)}): give its folder, or one of {known}"
        ) from error


def _explained(hub_id: str, error: Exception) -> Exception:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return Stopped(
            f"the disk is full while fetching {hub_id}: make room (or set HF_HOME) and run it again to go on"
        )
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        return Refusal(f"the hub has no repository {hub_id}: check the name, or give a folder")
    return _no_weights(hub_id, _short(error))


def _no_weights(hub_id: str, why: str) -> WeightsUnavailable:
    return WeightsUnavailable(
        f"no weights: {hub_id} is not whole in the local hub cache and the hub does not give it ({why}); fetch it "
        f"on a machine with network (hf download {hub_id}) and pass --weights FOLDER, or pass --weights synthetic"
    )


def _complete(folder: Path) -> bool:
    shards = shard_names(folder)
    return bool(shards) and all((folder / name).is_file() for name in ("config.json", *(shards or ())))


def _short(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:120]}" if first else type(error).__name__


def _quiet_off_terminal() -> None:
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
