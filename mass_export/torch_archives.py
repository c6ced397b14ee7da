"""Files of torch whose pickles hold more than tensors: whole modules and TorchScript, read without running them."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from mass_export.inert_pickle import InertUnpickler, Storage, storage_from_pid, tensors_of

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name


def read_archive(path: Path) -> dict[str, Tensor]:
    """Named tensors of a zip archive of torch.save or torch.jit.save, mapped from the file.

    Raises:
        Exception: of nearly any kind, when the archive is damaged.
    """
    whole = _map(path)
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.rpartition("/")[2] == "data.pkl"]
        root = min(pickles, key=len).removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order is not None and archive.read(order) != b"little":
            raise pickle.UnpicklingError("tensors in big-endian order")

        def persistent(pid: Any) -> Storage:
            key, storage = storage_from_pid(pid)
            member = members[f"{root}data/{key}"]
            start = member.header_offset
            lengths = bytes(whole[start + 26 : start + _LOCAL_HEADER].tolist())  # of name and extra field
            start += _LOCAL_HEADER + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            data = whole[start : start + member.file_size]
            storage.data = data.clone() if start % storage.dtype.itemsize else data
            return storage

        with archive.open(members[f"{root}data.pkl"]) as file:
            return tensors_of(InertUnpickler(file, persistent).load())


def read_pickle(path: Path) -> dict[str, Tensor]:
    """Named tensors of torch.save's format before version 1.6, or of a plain pickle.

    Raises:
        Exception: of nearly any kind, when the file is damaged.
    """
    with path.open("rb") as file:
        first = InertUnpickler(file).load()
        if first != _LEGACY_MAGIC:
            return tensors_of(first)
        for _ in range(2):  # protocol version and sizes of C types
            InertUnpickler(file).load()
        return _read_legacy(file)


def _read_legacy(file: IO[bytes]) -> dict[str, Tensor]:
    storages: dict[str, Storage] = {}

    def persistent(pid: Any) -> object:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module":  # a class with its source text
            return pid[1]
        key, storage = storage_from_pid(pid)
        return storages.setdefault(key, storage)

    data = InertUnpickler(file, persistent).load()
    for key in InertUnpickler(file).load():
        numel = int.from_bytes(file.read(8), "little")
        storage = storages[str(key)]
        if numel != storage.numel:
            raise pickle.UnpicklingError("a storage of another size than its tensors say")
        content = bytearray(file.read(numel * storage.dtype.itemsize))
        if content:
            storage.data = torch.frombuffer(content, dtype=torch.uint8)
        else:
            storage.data = torch.empty(0, dtype=torch.uint8)
    return tensors_of(data)


def _map(path: Path) -> Tensor:
    """The file's bytes, read when they are touched; writing to them would not reach the file. [n] uint8"""
    return torch.from_numpy(np.memmap(path, np.uint8, mode="c"))
