"""The external data file of a bundle: arrays written once, shared by both graphs and the runtime."""

from __future__ import annotations

import hashlib
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
        view = memoryview(array.data).cast("B")
        key = (hashlib.sha256(view).hexdigest(), array.dtype.name, array.shape)
        if key not in self._stored:
            alignment = PAGE_ALIGNMENT if array.nbytes >= PAGE_ALIGN_FROM else SMALL_ALIGNMENT
            self._file.write(b"\0" * (-self._file.tell() % alignment))
            self._stored[key] = StoredArray(self.path.name, self._file.tell(), array.dtype.name, array.shape)
            self._file.write(view)
        return self._stored[key]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
