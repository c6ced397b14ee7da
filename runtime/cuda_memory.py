"""Memory of one GPU for one stream: device buffers that are kept and reused, and pinned staging for the host.

All work of a classifier goes to one stream, so a buffer that was given back may be handed out again at once: the
stream orders the old use before the new one.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cuda_device import checked, import_cudart
from runtime.device_array import DeviceArray, row_runs
from runtime.errors import BackendError

SMALLEST_BYTES = 256


class Buffer:
    """Bytes on the device, or pinned on the host; goes back to its pool when nothing refers to it."""

    def __init__(self, memory: CudaMemory, address: int, nbytes: int, *, pinned: bool) -> None:
        self.address = address
        self.nbytes = nbytes
        self.pinned = pinned
        self._memory = memory

    def __del__(self) -> None:
        self._memory.give_back(self.address, self.nbytes, pinned=self.pinned)


class CudaMemory:
    """One stream of one GPU and everything that is allocated for it. Thread-safe.

    Attributes:
        lock: held by whoever enqueues a sequence that belongs together.
        device: index of the GPU.
    """

    def __init__(self, device: int = 0) -> None:
        """Create the stream.

        Args:
            device: index of the GPU.

        Raises:
            BackendError: there is no CUDA, no driver or no such GPU.
        """
        self.lock = threading.RLock()
        self._cuda = import_cudart()
        self.device = device
        self._free: dict[tuple[bool, int], list[int]] = {}
        self._owned: dict[int, bool] = {}  # address -> pinned
        self._staged: list[Buffer] = []
        self._closed = False
        self._stream: Any = None
        self.activate()
        flags = self._cuda.cudaStreamNonBlocking
        self._stream = self._check(self._cuda.cudaStreamCreateWithFlags(flags), "creating a stream")

    @property
    def stream(self) -> Any:
        """The stream, for other libraries as `int(stream)`."""
        if self._closed:
            raise BackendError("the GPU memory is released; the classifier is closed.")
        return self._stream

    def activate(self) -> None:
        """Make the GPU current in this thread."""
        self._check(self._cuda.cudaSetDevice(self.device), f"taking GPU {self.device}")

    def allocate(self, shape: Sequence[int], dtype: np.dtype[Any]) -> DeviceArray:
        """An array with undefined content."""
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        buffer = self._take(nbytes, pinned=False)
        return DeviceArray(buffer.address, tuple(shape), dtype, owner=buffer, memory=self)

    def upload(self, array: NDArray[Any]) -> DeviceArray:
        """Copy to the device through pinned memory; returns before the copy is done."""
        array = np.ascontiguousarray(array)
        with self.lock:
            staging = self._take(array.nbytes, pinned=True)
            _host_bytes(staging.address, array.nbytes)[:] = array.reshape(-1).view(np.uint8)
            target = self.allocate(array.shape, array.dtype)
            self._copy(target.address, staging.address, array.nbytes, "HostToDevice")
            self._staged.append(staging)
        return target

    def download(self, arrays: Sequence[DeviceArray]) -> list[NDArray[Any]]:
        """Copy to the host; waits for everything on the stream."""
        with self.lock:
            buffers = [self._take(array.nbytes, pinned=True) for array in arrays]
            for array, buffer in zip(arrays, buffers, strict=True):
                self._copy(buffer.address, array.address, array.nbytes, "DeviceToHost")
            self.synchronize()
            return [
                _host_bytes(buffer.address, array.nbytes).copy().view(array.dtype).reshape(array.shape)
                for array, buffer in zip(arrays, buffers, strict=True)
            ]

    def gather_rows(self, array: DeviceArray, rows: Sequence[int]) -> DeviceArray:
        """Rows of an array as a new one, copied on the device: one copy for each run of consecutive rows."""
        row_bytes = array.nbytes // max(len(array), 1)
        with self.lock:
            target = self.allocate((len(rows), *array.shape[1:]), array.dtype)
            for start, source, count in row_runs(rows):
                there, here = target.address + start * row_bytes, array.address + source * row_bytes
                self._copy(there, here, count * row_bytes, "DeviceToDevice")
        return target

    def copy_blocks(
        self, target: int, target_pitch: int, source: int, *, block_bytes: int, count: int
    ) -> None:
        """Copy `count` adjacent blocks on the device to places that lie `target_pitch` bytes apart."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        result = self._cuda.cudaMemcpy2DAsync(
            target, target_pitch, source, block_bytes, block_bytes, count, kind, self.stream
        )
        self._check(result, "copying on the GPU")

    def wait_for(self, other_stream: int) -> None:
        """Let the stream wait for what is now on another one; the host does not wait."""
        event = self._check(
            self._cuda.cudaEventCreateWithFlags(self._cuda.cudaEventDisableTiming), "creating an event"
        )
        self._check(self._cuda.cudaEventRecord(event, other_stream), "recording an event")
        self._check(self._cuda.cudaStreamWaitEvent(self.stream, event, 0), "waiting for an event")
        self._check(self._cuda.cudaEventDestroy(event), "releasing an event")

    def synchronize(self) -> None:
        """Wait for the stream; staging memory is free again then."""
        with self.lock:
            self._check(self._cuda.cudaStreamSynchronize(self.stream), "running on the GPU")
            self._staged.clear()

    def give_back(self, address: int, nbytes: int, *, pinned: bool) -> None:
        """Keep a buffer for the next user; free it if everything else was freed already."""
        with self.lock:
            if self._closed:
                self._release(address)
            else:
                heapq.heappush(self._free.setdefault((pinned, nbytes), []), address)

    def close(self) -> None:
        """Wait for the stream and free everything; buffers still in use are freed when they are given back."""
        with self.lock:
            if self._closed:
                return
            self.activate()
            self._cuda.cudaStreamSynchronize(self._stream)  # a failed run must not keep the memory
            self._staged.clear()
            self._closed = True
            self._trim()
            self._cuda.cudaStreamDestroy(self._stream)

    def _take(self, nbytes: int, *, pinned: bool) -> Buffer:
        size = max(SMALLEST_BYTES, 1 << max(nbytes - 1, 0).bit_length())
        with self.lock:
            kept = self._free.get((pinned, size))
            # The lowest address first: equal sequences get equal buffers, which lets CUDA graphs be used again.
            address = heapq.heappop(kept) if kept else self._allocate(size, pinned=pinned)
        return Buffer(self, address, size, pinned=pinned)

    def _allocate(self, size: int, *, pinned: bool) -> int:
        if self._closed:
            raise BackendError("the GPU memory is released; the classifier is closed.")
        allocate = self._cuda.cudaMallocHost if pinned else self._cuda.cudaMalloc
        result = allocate(size)
        if result[0] == self._cuda.cudaError_t.cudaErrorMemoryAllocation and any(self._free.values()):
            self._cuda.cudaStreamSynchronize(self._stream)
            self._trim()
            result = allocate(size)
        kind = "pinned host" if pinned else "GPU"
        address = int(self._check(result, f"allocating {size / 2**20:.1f} MiB of {kind} memory"))
        self._owned[address] = pinned
        return address

    def _trim(self) -> None:
        for addresses in self._free.values():
            for address in addresses:
                self._release(address)
        self._free.clear()

    def _release(self, address: int) -> None:
        pinned = self._owned.pop(address, None)
        if pinned is not None:
            (self._cuda.cudaFreeHost if pinned else self._cuda.cudaFree)(address)

    def _copy(self, target: int, source: int, nbytes: int, direction: str) -> None:
        kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{direction}")
        result = self._cuda.cudaMemcpyAsync(target, source, nbytes, kind, self.stream)
        self._check(result, f"copying {nbytes} bytes")

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        return checked(self._cuda, result, what)


def _host_bytes(address: int, nbytes: int) -> NDArray[np.uint8]:
    """A view of pinned memory."""
    import ctypes  # noqa: PLC0415 - only where there is a GPU

    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
