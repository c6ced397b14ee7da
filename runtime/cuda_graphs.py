"""CUDA graphs: record what an execution enqueues, then launch it again as one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

from runtime.cuda_device import checked, import_cudart
from runtime.cuda_memory import CudaMemory

MAX_GRAPHS = 16


class CudaGraphs:
    """Recorded executions by key: equal keys mean equal shapes at equal addresses.

    The first run of a key executes plainly, which lets TensorRT set itself up; the second is recorded; later ones
    are launched.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        self._cuda = import_cudart()
        self._seen: OrderedDict[Hashable, Any] = OrderedDict()

    def run(self, key: Hashable, execute: Callable[[], None]) -> None:
        """Do once what `execute` enqueues on the stream."""
        if key not in self._seen:
            execute()
            self._seen[key] = None
            if len(self._seen) > MAX_GRAPHS:
                self._destroy(self._seen.popitem(last=False)[1])
            return
        self._seen.move_to_end(key)
        if self._seen[key] is None:
            self._seen[key] = self._record(execute)
        self._check(
            self._cuda.cudaGraphLaunch(self._seen[key], self._memory.stream), "launching a CUDA graph"
        )

    def close(self) -> None:
        """Release all graphs."""
        while self._seen:
            self._destroy(self._seen.popitem()[1])

    def _record(self, execute: Callable[[], None]) -> Any:
        cuda, stream = self._cuda, self._memory.stream
        mode = cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._check(cuda.cudaStreamBeginCapture(stream, mode), "recording a CUDA graph")
        try:
            execute()
        finally:
            result = cuda.cudaStreamEndCapture(stream)
        graph = self._check(result, "recording a CUDA graph")
        try:
            return self._check(cuda.cudaGraphInstantiate(graph, 0), "preparing a CUDA graph")
        finally:
            self._check(cuda.cudaGraphDestroy(graph), "releasing a CUDA graph")

    def _destroy(self, executable: Any) -> None:
        if executable is not None:
            self._check(self._cuda.cudaGraphExecDestroy(executable), "releasing a CUDA graph")

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        return checked(self._cuda, result, what)
