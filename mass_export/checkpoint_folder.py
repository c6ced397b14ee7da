"""Checkpoints that are folders, or an index of shards: found, opened and hashed as if they were one file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from mass_export.errors import CheckpointFormatError, shortened
from mass_export.tensor_files import open_tensors
from runtime.checksums import sha256_of_file

# What Hugging Face and open_clip call the weights of a folder, safetensors first.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "open_clip_pytorch_model.bin",
)
_MAX_INDEX_BYTES = 64 << 20


class _Shards(Mapping[str, Tensor]):
    """Tensors of several files."""

    def __init__(self, owner: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._owner = owner

    def __getitem__(self, name: str) -> Tensor:
        return self._owner[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)


def open_checkpoint(path: Path, *, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """Open a file of tensors, an index of shards, or a folder that holds one of them under its usual name.

    Raises:
        CheckpointFormatError: there are no weights, a shard or tensor is missing, or as `open_tensors`.
    """
    weights = weights_file(path)
    index = _read_index(weights)
    if index is None:
        return open_tensors(weights, allow_pickle=allow_pickle)
    shards = {
        shard: open_tensors(weights.parent / shard, allow_pickle=allow_pickle)
        for shard in sorted(set(index.values()))
    }
    missing = sorted(name for name, shard in index.items() if name not in shards[shard])
    if missing:
        raise CheckpointFormatError(
            f"{weights}: {len(missing)} tensor(s) are not in the shards that it names ({shortened(missing)}); "
            "fetch the shards again."
        )
    return _Shards({name: shards[shard] for name, shard in index.items()})


def weights_file(path: Path) -> Path:
    """The file itself, or the weights (or their index) in a folder.

    Raises:
        CheckpointFormatError: the folder holds no weights under a known name, and not one safetensors file.
    """
    if not path.is_dir():
        return path
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    raise CheckpointFormatError(
        f"{path}: a folder without {', '.join(_WEIGHTS[:-1])} or {_WEIGHTS[-1]}; name the weights file itself."
    )


def sha256_of_checkpoint(path: Path) -> str:
    """Hash of the file; of shards that of their names and hashes together."""
    weights = weights_file(path)
    index = _read_index(weights)
    if index is None:
        return sha256_of_file(weights)
    digest = hashlib.sha256()
    for shard in sorted(set(index.values())):
        digest.update(f"{shard} {sha256_of_file(weights.parent / shard)}\n".encode())
    return digest.hexdigest()


def _read_index(path: Path) -> dict[str, str] | None:
    """Tensor names and their shards, if the file is an index, which is JSON."""
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            return None
        with path.open("rb") as file:
            if file.read(1) != b"{":
                return None
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return None  # open_tensors says what is wrong with it
    except (ValueError, RecursionError) as error:
        raise CheckpointFormatError(
            f"{path}: begins like JSON but is not an index of shards ({error})."
        ) from error
    index = data.get("weight_map") if isinstance(data, dict) else None
    plain = isinstance(index, dict) and all(
        isinstance(shard, str) and shard not in ("", "..") and not set(shard) & set("/\\\0")
        for shard in index.values()
    )
    if not index or not plain:
        raise CheckpointFormatError(
            f"{path}: JSON, but no index of shards (a `weight_map` of tensors to files beside it)."
        )
    return {str(name): str(shard) for name, shard in index.items()}
