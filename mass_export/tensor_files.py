"""Files of named tensors, opened safely: formats are told from content, and no code in a file ever runs."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mass_export.errors import CheckpointFormatError

MAX_SAFETENSORS_HEADER = 100 << 20  # the format's own limit
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts nest the weights


class _SafetensorsFile(Mapping[str, Tensor]):
    """A safetensors file as a mapping that reads a tensor when it is asked for."""

    def __init__(self, path: Path) -> None:
        self._file = cast("Any", safe_open(path, framework="pt"))
        self._names = tuple(self._file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_tensors(path: Path) -> Mapping[str, Tensor]:
    """Open a safetensors file or a torch state dict, plain or nested under `state_dict` or `model`.

    Tensors are read, or mapped from the file, when they are asked for.

    Raises:
        CheckpointFormatError: no such file, another format, damaged, or a pickle of anything but tensors.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CheckpointFormatError(f"{path}: no such file.") from error
    except OSError as error:
        raise CheckpointFormatError(f"{path}: cannot be read ({error.strerror}).") from error
    if start.startswith(b"version h") and size < 1024:
        raise CheckpointFormatError(f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull`.")
    header = int.from_bytes(start[:8], "little")
    if start[8:] == b"{" and header <= MAX_SAFETENSORS_HEADER:
        return _open_safetensors(path)
    if start.startswith(b"PK\x03\x04"):
        _check_zip(path)
        return _named_tensors(_load_torch(path, mmap=True), path)
    if start[:1] == b"\x80":
        return _named_tensors(_load_torch(path, mmap=False), path)
    raise CheckpointFormatError(
        f"{path}: neither safetensors nor a torch state dict (it begins with {start!r}, {size} bytes). "
        "Check that the download is complete and is the weights file itself."
    )


def _open_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return _SafetensorsFile(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path}: damaged safetensors file ({error}); fetch it again.") from error


def _check_zip(path: Path) -> None:
    """Refuse what torch.save does not write: TorchScript, and compressed members, which could be bombs."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointFormatError(f"{path}: damaged torch file ({error}); fetch it again.") from error
    names = {member.filename.rpartition("/")[2] for member in members}
    if "constants.pkl" in names:
        raise CheckpointFormatError(
            f"{path}: a TorchScript archive (a program); load it with open_clip and save its state dict."
        )
    if "data.pkl" not in names or any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointFormatError(
            f"{path}: a zip archive that torch.save did not write; give a state dict."
        )


def _load_torch(path: Path, *, mmap: bool) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises nearly anything on hostile or damaged files
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointFormatError(
                f"{path}: a pickle of more than tensors, such as a whole module. It was not executed, "
                "because a pickle can run any code. Save the module's state_dict() instead, as safetensors."
            ) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointFormatError(f"{path}: damaged torch file ({reason}); fetch it again.") from error


def _named_tensors(data: object, path: Path) -> dict[str, Tensor]:
    while isinstance(data, Mapping) and not _tensors_of(data):
        nested = [data[key] for key in _WRAPPERS if isinstance(data.get(key), Mapping)]
        if not nested:
            break
        data = nested[0]
    tensors = _tensors_of(data) if isinstance(data, Mapping) else {}
    if not tensors:
        kind = (
            f"a mapping with the keys {sorted(map(str, data))[:8]}"
            if isinstance(data, Mapping)
            else type(data)
        )
        raise CheckpointFormatError(f"{path}: holds no named tensors but {kind}; give a state dict.")
    return tensors


def _tensors_of(data: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): value.detach() for name, value in data.items() if isinstance(value, Tensor)}
