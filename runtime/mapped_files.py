"""The raw arrays in a bundle's files, mapped into memory: what is not read costs none."""

from __future__ import annotations

import math
import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from runtime.bundle import StoredArray
from runtime.errors import BundleError


class MappedFiles:
    """Arrays of one bundle; each file is mapped once, until nobody holds an array of it."""

    def __init__(self, directory: Path) -> None:
        """Remember where the files are."""
        self._directory = directory
        self._maps: dict[str, mmap.mmap] = {}

    def array(self, stored: StoredArray) -> NDArray[Any]:
        """A read-only view.

        Raises:
            BundleError: the file cannot be read, or ends before the array does.
        """
        dtype = np.dtype(stored.dtype).newbyteorder("<")
        if not stored.nbytes:  # nothing can be mapped
            return np.zeros(stored.shape, dtype)
        count = (stored.end - stored.offset) // dtype.itemsize
        try:
            flat = np.frombuffer(self._map(stored.file), dtype, count, stored.offset)
        except (OSError, ValueError) as error:
            raise BundleError(
                f"{self._directory / stored.file}: cannot map an array ({error}). Copy or export the bundle again."
            ) from error
        if stored.stride is None:
            return flat.reshape(stored.shape)
        entries = (stored.shape[0], math.prod(stored.shape[1:]))
        spread = as_strided(flat, entries, (stored.stride, dtype.itemsize), writeable=False)
        return spread.reshape(stored.shape)  # entries are whole, so that it remains a view

    def _map(self, name: str) -> mmap.mmap:
        if name not in self._maps:
            with (self._directory / name).open("rb") as file:
                self._maps[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[name]


def map_array(directory: Path, array: StoredArray) -> NDArray[Any]:
    """A read-only view of one array, see `MappedFiles`.

    Raises:
        BundleError: as there.
    """
    return MappedFiles(directory).array(array)
