"""Files of named tensors, opened safely: formats are told from content, and no code in a file ever runs."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mass_export.errors import CheckpointFormatError
from mass_export.torch_archives import read_archive, read_pickle

MAX_SAFETENSORS_HEADER = 100 << 20  # the format's own limit
_WRAPPERS = ("state_dict", "model")  # keys under which training scripts nest the weights


class PickledModuleWarning(UserWarning):
    """A file holds pickled objects instead of a state dict."""


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


def open_tensors(path: Path, *, allow_pickle: bool = False) -> Mapping[str, Tensor]:
    """Open one file: safetensors, a torch state dict, plain or nested under `state_dict` or `model`, or TorchScript.

    Tensors are read, or mapped from the file, when they are asked for. Programs and pickled objects are never run:
    the tensors are picked out of them by name (`mass_export.inert_pickle`).

    Args:
        path: the file.
        allow_pickle: also take the tensors of a pickled module, with a warning.

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
        if _is_torchscript(path):
            return _read_inertly(path, archive=True)
        return _open_torch(path, archive=True, allow_pickle=allow_pickle)
    if start[:1] == b"\x80":
        return _open_torch(path, archive=False, allow_pickle=allow_pickle)
    raise CheckpointFormatError(
        f"{path}: neither safetensors nor a torch state dict (it begins with {start!r}, {size} bytes). "
        "Check that the download is complete and is the weights file itself."
    )


def _open_safetensors(path: Path) -> Mapping[str, Tensor]:
    try:
        return _SafetensorsFile(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointFormatError(f"{path}: damaged safetensors file ({error}); fetch it again.") from error


def _is_torchscript(path: Path) -> bool:
    """Whether an archive is a program. Compressed members, which torch does not write, could be bombs: refused."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise CheckpointFormatError(f"{path}: damaged torch file ({error}); fetch it again.") from error
    names = {member.filename.rpartition("/")[2] for member in members}
    script = "constants.pkl" in names
    compressed = [m for m in members if m.compress_type != zipfile.ZIP_STORED and "/code/" not in m.filename]
    if "data.pkl" not in names or compressed:
        raise CheckpointFormatError(
            f"{path}: a zip archive that torch.save did not write; give a state dict."
        )
    return script


def _open_torch(path: Path, *, archive: bool, allow_pickle: bool) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickle protocols
            if path.suffix == ".safetensors":  # torch would go by the name
                with path.open("rb") as file:
                    data = torch.load(file, map_location="cpu", weights_only=True)
            else:
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
    except MemoryError:
        raise
    except Exception as error:  # the unpickler raises nearly anything on hostile or damaged files
        if "weights_only" in str(error) or "Unsupported" in str(error):
            if allow_pickle:
                return _read_pickled_module(path, archive=archive)
            raise CheckpointFormatError(
                f"{path}: a pickle of more than tensors, such as a whole module. It was not executed, "
                "because a pickle can run any code. Save the module's state_dict() instead, as safetensors; or give "
                "--allow-pickle to take the parameters out of it by name."
            ) from error
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointFormatError(f"{path}: damaged torch file ({reason}); fetch it again.") from error
    return _named_tensors(data, path)


def _read_pickled_module(path: Path, *, archive: bool) -> dict[str, Tensor]:
    tensors = _read_inertly(path, archive=archive)
    warnings.warn(
        f"{path}: pickled objects instead of a state dict. Their classes were not imported and no code of them ran; "
        f"{len(tensors)} tensors were taken out by name, and whatever those classes do besides is ignored. Save "
        "state_dict() as safetensors to be rid of this warning.",
        PickledModuleWarning,
        stacklevel=2,
    )
    return tensors


def _read_inertly(path: Path, *, archive: bool) -> dict[str, Tensor]:
    try:
        tensors = read_archive(path) if archive else read_pickle(path)
    except MemoryError:
        raise
    except Exception as error:  # as above
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointFormatError(
            f"{path}: damaged torch file, or a pickle that cannot be read without running it ({reason}); fetch it "
            "again, or save the module's state_dict() as safetensors where its code is at hand."
        ) from error
    for wrapper in _WRAPPERS:  # {"state_dict": module, ..}
        if tensors and all(name.startswith(f"{wrapper}.") for name in tensors):
            tensors = {name.removeprefix(f"{wrapper}."): tensor for name, tensor in tensors.items()}
    if not tensors:
        raise CheckpointFormatError(f"{path}: holds no named tensors; give a state dict.")
    return tensors


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
