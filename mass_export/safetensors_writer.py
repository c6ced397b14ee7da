"""Write safetensors files one tensor at a time, with the same bytes for the same content, all or nothing.

The safetensors package orders its metadata at random and holds a second copy of every tensor while it writes.

The metadata's `sha256` is that of the whole file in which its own 64 digits are zeros.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int8: "I8",
}
_ALIGNMENT = 8
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')  # the quotes of JSON within the metadata are escaped
_BLOCK_BYTES = 1 << 20


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write to a temporary file beside `path`, bring it to the disk, and only then give it its name.

    Args:
        path: the file to write or replace; its directory must exist.
        tensors: floating point or int8, on the CPU.
        metadata: goes into the header.

    Raises:
        OSError: the file cannot be written; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            _write(file, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def has_its_checksum(path: Path) -> bool | None:
    """Whether a safetensors file is what was written; None if it does not say.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        header = file.read(8)
        header += file.read(int.from_bytes(header, "little"))
        found = _DIGEST.search(header)
        if found is None:
            return None
        digest = hashlib.sha256(header[: found.start(1)] + _NO_DIGEST.encode() + header[found.end(1) :])
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest().encode() == found[1]


def _write(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    # Widest first, so that every tensor starts at a multiple of its item size; then by name.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": dict(sorted({**metadata, "sha256": _NO_DIGEST}.items()))}
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    start = len(text).to_bytes(8, "little") + text
    file.write(start)
    digest = hashlib.sha256(start)
    for name in names:
        data = tensors[name].detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
        file.write(data)
        digest.update(data)
    found = _DIGEST.search(start)
    assert found is not None
    file.seek(found.start(1))
    file.write(digest.hexdigest().encode())


def _sync_directory(directory: Path) -> None:
    """Make the new name itself durable, where the system can."""
    if os.name == "posix":
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
