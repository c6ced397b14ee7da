"""The external data file of a bundle: arrays written once, shared by both graphs and the runtime."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import StoredArray

SMALL_ALIGNMENT = 64
PAGE_ALIGNMENT = 4096
PAGE_ALIGN_FROM = 1 << 20


class WeightsFile:
    """Appends arrays to one file; equal bytes of equal type and shape are stored once.

    Large arrays start on a page, so that ONNX Runtime can map them instead of copying.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")
        self._stored: dict[tuple[str, str, tuple[int, ...]], StoredArray] = {}

    def add(self, array: NDArray[Any]) -> StoredArray:
        """Store an array (little-endian, C order) and return where it lies."""
        array = np.ascontiguousarray(array)
        array = array.astype(array.dtype.newbyteorder("<"), copy=False)
        key = (hashlib.sha256(_bytes_of(array)).hexdigest(), array.dtype.name, array.shape)
        if key not in self._stored:
            self._stored[key] = self.add_parts([array], array.dtype, array.shape)
        return self._stored[key]

    def add_parts(
        self, parts: Iterable[NDArray[Any]], dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> StoredArray:
        """Store an array that comes in consecutive parts, and is not held whole or compared with others.

        Args:
            parts: of its values in C order.
            dtype: of all of them.
            shape: of the array.
        """
        stored = StoredArray(self.path.name, 0, dtype.name, shape)
        alignment = PAGE_ALIGNMENT if stored.nbytes >= PAGE_ALIGN_FROM else SMALL_ALIGNMENT
        self._file.write(b"\0" * (-self._file.tell() % alignment))
        stored = dataclasses.replace(stored, offset=self._file.tell())
        for part in parts:
            self._file.write(_bytes_of(np.ascontiguousarray(part, dtype.newbyteorder("<"))))
        assert self._file.tell() == stored.end, f"{self.path}: parts of another size than {shape}"
        return stored

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data
