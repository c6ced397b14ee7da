"""Engines of TensorRT and TensorRT-RTX, chained on the GPU.

Images go to the device once (`stage`) and both passes read them there. Between the passes the host sees the
residuals alone, [B, T] floats: it decides the sets exactly as every other backend does, and sends back [S, K]
indices and weights. The bases are constants of the engine, and the cores of a set stay on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import PassSpec
from runtime.cores import CoreCache
from runtime.cuda_graphs import CudaGraphs
from runtime.cuda_memory import CudaMemory
from runtime.device_array import DeviceArray, device_array_from, is_foreign_device_array
from runtime.device_cores import DeviceCores
from runtime.engine_spec import EngineSpec, profile_for, shape_with
from runtime.errors import BackendError
from runtime.tensorrt_engine import LoadedEngine, load_engine, make_context


class TensorRtSession:
    """One pass as an engine; see `runtime.session.Session`. The sessions of a classifier share their memory."""

    provider = "tensorrt"

    def __init__(
        self,
        directory: Path,
        engine: EngineSpec,
        spec: PassSpec,
        memory: CudaMemory,
        *,
        max_sets: int = 64,
        cuda_graphs: bool = False,
        cache_directory: Path | None = None,
    ) -> None:
        """Load an engine.

        Args:
            directory: of the bundle.
            engine: which of its engines.
            spec: of the pass that it computes.
            memory: stream and buffers to use.
            max_sets: sets of tasks whose cores stay on the device.
            cuda_graphs: record the kernels of a batch size when it is first seen, and replay them later.
            cache_directory: where TensorRT-RTX keeps the kernels that it compiled for this GPU.

        Raises:
            BackendError: TensorRT is missing, of another version, or refuses the engine.
        """
        self._engine_spec, self._spec, self._memory = engine, spec, memory
        self._cores = DeviceCores(memory, max_sets)
        self._loaded: LoadedEngine | None = load_engine(directory, engine, spec)
        self._log = self._loaded.log
        self._context, self._kernels = make_context(
            self._loaded, cuda_graphs=cuda_graphs, cache_directory=cache_directory
        )
        self._profile = 0
        recorded = cuda_graphs and engine.key.flavour == "tensorrt"
        self._graphs = CudaGraphs(memory) if recorded else None

    @property
    def max_batch(self) -> int:
        """Largest B of all profiles."""
        return max(profile["B"][2] for profile in self._engine_spec.key.profiles)

    def stage(self, pixel_values: Any) -> DeviceArray:
        """Bring images to the device once; arrays that are there already are taken as they are."""
        if isinstance(pixel_values, DeviceArray):
            return pixel_values
        with self._memory.lock:
            self._require_open()
            self._memory.activate()
            if is_foreign_device_array(pixel_values):
                return device_array_from(pixel_values, self._memory)
            return self._memory.upload(pixel_values)

    def core_feeds(self, sets: Sequence[tuple[int, ...]], cores: CoreCache) -> Mapping[str, DeviceArray]:
        """Cores of the sets, from the device where they are there already."""
        self._memory.activate()
        return self._cores.feeds(sets, cores)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run the engine on arrays of the host or the device; outputs come to the host.

        Raises:
            BackendError: TensorRT or CUDA failed, the dimensions are in no profile, or the session is closed.
        """
        with self._memory.lock:
            self._require_open()
            self._memory.activate()
            self._log.errors.clear()
            dims = self._dims(feeds)
            self._use_profile(dims)
            inputs = {spec.name: self._on_device(feeds[spec.name], spec.dtype) for spec in self._spec.inputs}
            for name, array in inputs.items():
                self._require(self._context.set_input_shape(name, array.shape), f"shape of {name}")
            outputs = {
                spec.name: self._memory.allocate(shape_with(spec.shape, dims), np.dtype(spec.dtype))
                for spec in self._spec.outputs
            }
            for name, array in (inputs | outputs).items():
                self._require(self._context.set_tensor_address(name, array.address), f"address of {name}")
            self._enqueue([array.address for array in (inputs | outputs).values()], dims)
            return dict(zip(outputs, self._memory.download(list(outputs.values())), strict=True))

    def close(self) -> None:
        """Release the engine, its context and the memory, for all sessions that share it; twice is harmless."""
        with self._memory.lock:
            if self._graphs is not None:
                self._graphs.close()
            self._cores.clear()
            if self._context is not None and self._kernels is not None:
                self._kernels.save()
            self._kernels = self._context = None  # TensorRT frees what nothing refers to, and an engine last
            self._loaded = None
            self._memory.close()

    def _dims(self, feeds: Mapping[str, Any]) -> dict[str, int]:
        """B, S and K from the shapes of the inputs, which must agree."""
        dims: dict[str, int] = {}
        for spec in self._spec.inputs:
            if spec.name not in feeds:
                raise BackendError(f"{self._engine_spec.file}: input {spec.name!r} is missing.")
            shape = feeds[spec.name].shape
            if len(shape) == len(spec.shape):
                letters = zip(spec.shape, shape, strict=True)
                dims |= {d: n for d, n in letters if isinstance(d, str) and d.isalpha() and d not in dims}
            if len(shape) != len(spec.shape) or shape_with(spec.shape, dims) != tuple(shape):
                wanted = ", ".join(map(str, spec.shape))
                raise BackendError(
                    f"{self._engine_spec.file}: input {spec.name!r}: expected [{wanted}], got {list(shape)}."
                )
        return dims

    def _use_profile(self, dims: Mapping[str, int]) -> None:
        profiles = self._engine_spec.key.profiles
        index = profile_for(profiles, dims)
        if index is None:
            raise BackendError(
                f"{self._engine_spec.file}: {dims} lies in none of the engine's profiles {list(profiles)}; build it "
                "again with a wider --batch or --slots, or run smaller batches."
            )
        if index != self._profile:
            stream = int(self._memory.stream)
            self._require(self._context.set_optimization_profile_async(index, stream), f"profile {index}")
            self._profile = index

    def _on_device(self, value: Any, dtype: str) -> DeviceArray:
        if not isinstance(value, DeviceArray):
            return self._memory.upload(np.asarray(value, dtype))
        if value.dtype != np.dtype(dtype):
            raise BackendError(f"{self._engine_spec.file}: expected {dtype} on the GPU, got {value.dtype}.")
        return value

    def _enqueue(self, addresses: Sequence[int], dims: Mapping[str, int]) -> None:
        context, stream = self._context, int(self._memory.stream)

        def execute() -> None:
            self._require(context.execute_async_v3(stream), "execution")

        if self._graphs is None:
            execute()
        else:
            self._graphs.run((self._profile, *dims.items(), *addresses), execute)

    def _require_open(self) -> None:
        if self._context is None:
            raise BackendError(f"{self._engine_spec.file}: the session is closed.")

    def _require(self, accepted: object, what: str) -> None:
        if not accepted:
            raise BackendError(f"{self._engine_spec.file}: TensorRT refuses ({what}): {self._log.text()}")
