"""Arrays that lie on the GPU: the runtime's own, and those of other libraries, without a copy."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.dlpack import cuda_device_of, read_dlpack
from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.cuda_memory import CudaMemory

LEGACY_STREAM = 1  # of the protocol: CUDA's default stream


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """A contiguous array on the GPU.

    Attributes:
        address: of the first element.
        shape: as numpy's.
        dtype: as numpy's.
        owner: what must live as long as the array does.
        memory: where copies of it are made.
    """

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    owner: Any = field(repr=False)
    memory: CudaMemory = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | Sequence[int] | np.ndarray[Any, Any]) -> DeviceArray:
        """Rows along the first axis: a view where they are consecutive, else a copy on the device."""
        wanted = list(range(*rows.indices(len(self)))) if isinstance(rows, slice) else [int(i) for i in rows]
        runs = list(row_runs(wanted))
        if len(runs) > 1:
            return self.memory.gather_rows(self, wanted)
        start = runs[0][1] if runs else 0
        offset = start * (self.nbytes // max(len(self), 1))
        return DeviceArray(
            self.address + offset, (len(wanted), *self.shape[1:]), self.dtype, self.owner, self.memory
        )


def row_runs(rows: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Divide row numbers into consecutive runs: (place in the list, first row, count)."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield start, rows[start], place - start
            start = place


def is_foreign_device_array(value: object) -> bool:
    """Whether another library's array lies on a CUDA GPU."""
    if isinstance(value, np.ndarray):
        return False
    return hasattr(value, "__cuda_array_interface__") or cuda_device_of(value) is not None


def device_array_from(value: Any, memory: CudaMemory) -> DeviceArray:
    """Take over an array that has `__cuda_array_interface__` (torch, cupy, numba) or DLPack, without a copy.

    The stream of `memory` waits for the stream that the array is written on.

    Raises:
        InputError: the array is not contiguous, or on another GPU.
    """
    if not hasattr(value, "__cuda_array_interface__"):
        device = cuda_device_of(value)
        if device != memory.device:
            raise InputError(
                f"pixel_values: expected an array on GPU {memory.device}, got one on GPU {device}."
            )
        found = read_dlpack(value, int(memory.stream))
        _require_contiguous(found.shape, found.strides, found.dtype)
        return DeviceArray(
            found.address, found.shape, found.dtype, owner=(found.capsule, value), memory=memory
        )
    interface = value.__cuda_array_interface__
    dtype, shape = np.dtype(interface["typestr"]), tuple(int(n) for n in interface["shape"])
    _require_contiguous(shape, interface.get("strides"), dtype)
    # Version 2 names no stream; its producers work on the default one.
    stream = interface.get("stream", LEGACY_STREAM)
    if stream is not None:
        memory.wait_for(int(stream))
    return DeviceArray(int(interface["data"][0]), shape, dtype, owner=value, memory=memory)


def _require_contiguous(shape: tuple[int, ...], strides: Sequence[int] | None, dtype: np.dtype[Any]) -> None:
    wanted = tuple(dtype.itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))
    if strides is None:
        return
    # The stride of an axis of one element means nothing.
    if any(n != 1 and ours != theirs for n, ours, theirs in zip(shape, strides, wanted, strict=True)):
        raise InputError("pixel_values: expected a contiguous array on the GPU; make it so first.")
