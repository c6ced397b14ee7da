"""Repositories of the Hugging Face hub, `hf:org/name` or `hf:org/name@revision`, through huggingface_hub."""

from __future__ import annotations

import re
from pathlib import Path

from mass_export.errors import HubError

PREFIX = "hf:"
_NAME = re.compile(r"hf:(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?")
# Weights in either format and what describes them; not the same weights for other frameworks.
_WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "open_clip_config.json",
    "adapter_config.json",
]
_PICKLED = ["*.bin", "*.bin.index.json", "*.pt"]


def is_hub_name(name: str) -> bool:
    """Whether a recipe's text names a repository."""
    return name.startswith(PREFIX)


def fetch(name: str, key: str) -> Path:
    """The folder of a repository in the hub's cache, downloaded with a progress bar if it is not there.

    Safetensors are preferred; a repository without them is fetched with its torch files. `HF_HUB_OFFLINE=1` uses
    the cache alone, `HF_HOME` and `HF_TOKEN` work as everywhere.

    Args:
        name: `hf:org/name` or `hf:org/name@revision`.
        key: where the recipe says so, for messages.

    Raises:
        HubError: not a name, no such repository or revision, no permission, or no network and not in the cache.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise HubError(
            f"{key}: {name!r} does not name a repository: expected hf:org/name or hf:org/name@revision."
        )
    from huggingface_hub import snapshot_download  # noqa: PLC0415 - only recipes with such names need it
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repo, revision = match["repo"], match["revision"]
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED + _PICKLED))
    except GatedRepoError as error:
        raise HubError(f"{key}: {name}: access is restricted; accept its terms and set HF_TOKEN.") from error
    except RevisionNotFoundError as error:
        raise HubError(f"{key}: {name}: the repository has no revision {revision!r}.") from error
    except RepositoryNotFoundError as error:
        raise HubError(f"{key}: {name}: no such repository, or a private one (set HF_TOKEN).") from error
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise HubError(
            f"{key}: {name}: not in the hub's cache, and it cannot be fetched ({reason}). Fetch it where there is a "
            "network (`hf download`) and copy the cache, or give a local path."
        ) from error
    return folder


def source_name(path: Path) -> str:
    """What to call a file or folder in records: `hf:org/name@revision` if it lies in the hub's cache, else its name."""
    match = re.search(r"/models--([^/]+)/snapshots/([^/]+)$", path.as_posix())
    return f"{PREFIX}{match[1].replace('--', '/', 1)}@{match[2]}" if match else path.name
