"""A GPU in host memory: doubles of CUDA and TensorRT, specified by the real modules, that really copy and compute.

Device and pinned memory are host memory, copies move bytes, and an "engine" runs the pass' ONNX file on the CPU.
Every name that is called must exist in the real module. `GpuDouble.events` keeps the order of what was enqueued.
"""

from __future__ import annotations

import ctypes
import dataclasses
import importlib.machinery
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest

from runtime.bundle import FIRST_PASS, MANIFEST_FILE, SECOND_PASS
from runtime.checksums import file_spec
from runtime.engine_spec import EngineKey, EngineSpec
from runtime.manifest import json_from_manifest, read_manifest

STREAM = 7001
VERSION = "1.7.1"
BATCH = (1, 4, 16)


class GpuDouble:
    """One GPU.

    Attributes:
        events: (what, details...) in the order of the calls.
        device, pinned: allocations that are alive, by address.
        capacity: bytes of device memory; allocating more fails as CUDA does.
    """

    def __init__(self, real_cuda: types.ModuleType, real_trt: types.ModuleType) -> None:
        self.real_cuda, self.real_trt = real_cuda, real_trt
        self.events: list[tuple[Any, ...]] = []
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.capacity = 1 << 30
        self.recording: list[Callable[[], None]] | None = None
        self.plans: dict[bytes, tuple[Path, Any]] = {}
        self.fail: dict[str, str] = {}  # operation -> TensorRT's words
        self.capability = (8, 6)
        self.contexts: list[Any] = []

    # CUDA

    def cuda(self) -> Any:
        real = self.real_cuda
        ok = real.cudaError_t.cudaSuccess
        double = mock.create_autospec(real, spec_set=True)
        for name in ("cudaError_t", "cudaMemcpyKind", "cudaStreamCaptureMode", "cudaDeviceAttr"):
            setattr(double, name, getattr(real, name))
        double.cudaStreamNonBlocking = real.cudaStreamNonBlocking
        double.cudaEventDisableTiming = real.cudaEventDisableTiming
        double.cudaGetErrorString.side_effect = lambda status: (ok, str(status.name).encode())
        double.cudaSetDevice.side_effect = lambda _device: (ok,)
        double.cudaStreamCreateWithFlags.side_effect = lambda _flags: (ok, STREAM)
        double.cudaStreamSynchronize.side_effect = lambda stream: self._event("synchronize", stream)
        double.cudaStreamDestroy.side_effect = lambda stream: self._event("destroy stream", stream)
        double.cudaMalloc.side_effect = lambda size: self._allocate(self.device, size)
        double.cudaMallocHost.side_effect = lambda size: self._allocate(self.pinned, size)
        double.cudaFree.side_effect = lambda address: self._free(self.device, address)
        double.cudaFreeHost.side_effect = lambda address: self._free(self.pinned, address)
        double.cudaMemcpyAsync.side_effect = self._copy
        double.cudaMemcpy2DAsync.side_effect = self._copy_blocks
        double.cudaStreamBeginCapture.side_effect = self._begin
        double.cudaStreamEndCapture.side_effect = self._end
        double.cudaGraphInstantiate.side_effect = lambda graph, _flags: (ok, graph)
        double.cudaGraphDestroy.side_effect = lambda _graph: (ok,)
        double.cudaGraphExecDestroy.side_effect = lambda _graph: self._event("destroy graph")
        double.cudaGraphLaunch.side_effect = self._launch
        double.cudaEventCreateWithFlags.side_effect = lambda _flags: (ok, "event")
        double.cudaEventRecord.side_effect = lambda _event, stream: self._event("record", stream)
        double.cudaStreamWaitEvent.side_effect = lambda stream, _event, _flags: self._event("wait", stream)
        double.cudaEventDestroy.side_effect = lambda _event: (ok,)
        major = real.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor
        double.cudaDeviceGetAttribute.side_effect = lambda attribute, _device: (
            ok,
            self.capability[0 if attribute == major else 1],
        )
        return double

    def _event(self, *event: Any) -> tuple[Any, ...]:
        self.events.append(event)
        return (self.real_cuda.cudaError_t.cudaSuccess,)

    def _allocate(self, pool: dict[int, Any], size: int) -> tuple[Any, ...]:
        status = self.real_cuda.cudaError_t
        used = sum(len(block) for block in self.device.values())
        if pool is self.device and used + size > self.capacity:
            return status.cudaErrorMemoryAllocation, None
        block = (ctypes.c_uint8 * size)()
        pool[ctypes.addressof(block)] = block
        return status.cudaSuccess, ctypes.addressof(block)

    def _free(self, pool: dict[int, Any], address: int) -> tuple[Any, ...]:
        del pool[address]  # a wrong or second free is a KeyError
        return (self.real_cuda.cudaError_t.cudaSuccess,)

    def _where(self, address: int) -> str:
        for name, pool in (("device", self.device), ("pinned", self.pinned)):
            if any(start <= address < start + len(block) for start, block in pool.items()):
                return name
        return "elsewhere"

    def _copy(self, target: int, source: int, nbytes: int, kind: Any, stream: Any) -> tuple[Any, ...]:
        there = {"HostToDevice": "device", "DeviceToDevice": "device", "DeviceToHost": "pinned"}
        direction = kind.name.removeprefix("cudaMemcpy")
        assert self._where(target) == there[direction]
        assert direction != "HostToDevice" or self._where(source) == "pinned"
        ctypes.memmove(target, source, nbytes)
        return self._event("copy", direction, nbytes, stream)

    def _copy_blocks(
        self,
        target: int,
        pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        kind: Any,
        stream: Any,
    ) -> tuple[Any, ...]:
        assert kind.name == "cudaMemcpyDeviceToDevice"
        for row in range(rows):
            assert self._where(target + row * pitch) == "device"
            ctypes.memmove(target + row * pitch, source + row * source_pitch, width)
        return self._event("copy", "blocks", width * rows, stream)

    def _begin(self, stream: Any, _mode: Any) -> tuple[Any, ...]:
        self.recording = []
        return self._event("begin capture", stream)

    def _end(self, stream: Any) -> tuple[Any, ...]:
        recorded, self.recording = self.recording, None
        self._event("end capture", stream)
        return self.real_cuda.cudaError_t.cudaSuccess, recorded

    def _launch(self, recorded: list[Callable[[], None]], stream: Any) -> tuple[Any, ...]:
        for kernel in recorded:
            kernel()
        return self._event("launch graph", stream)

    # TensorRT

    def tensorrt(self, flavour: str, version: str) -> types.ModuleType:
        real, module = self.real_trt, types.ModuleType(flavour)
        module.__spec__ = importlib.machinery.ModuleSpec(flavour, None)
        module.__version__ = version
        module.ILogger = real.ILogger
        if flavour == "tensorrt_rtx":
            module.CudaGraphStrategy = real.CudaGraphStrategy
            module.ComputeCapability = real.ComputeCapability
        module.Runtime = mock.create_autospec(real.Runtime, side_effect=self._runtime)
        module.Refitter = mock.create_autospec(real.Refitter)
        module.OnnxParserRefitter = mock.create_autospec(real.OnnxParserRefitter)
        return module

    def _runtime(self, log: Any) -> Any:
        runtime = mock.create_autospec(self.real_trt.Runtime, instance=True, spec_set=True)

        def deserialize(plan: Any) -> Any:
            if "deserialize" in self.fail:
                log.log(self.real_trt.ILogger.ERROR, self.fail["deserialize"])
                return None
            onnx_file, spec = self.plans[bytes(plan[:])]
            return self._engine(log, onnx_file, spec)

        runtime.deserialize_cuda_engine.side_effect = deserialize
        return runtime

    def _engine(self, log: Any, onnx_file: Path, spec: Any) -> Any:
        engine = mock.create_autospec(self.real_trt.ICudaEngine, instance=True)
        tensors = [*spec.inputs, *spec.outputs]
        engine.num_io_tensors = len(tensors)
        engine.get_tensor_name.side_effect = lambda index: tensors[index].name
        engine.create_runtime_config.side_effect = lambda: mock.create_autospec(
            self.real_trt.IRuntimeConfig, instance=True
        )
        engine.create_execution_context.side_effect = lambda *_config: self._context(log, onnx_file, spec)
        return engine

    def _context(self, log: Any, onnx_file: Path, spec: Any) -> Any:
        if "context" in self.fail:
            log.log(self.real_trt.ILogger.ERROR, self.fail["context"])
            return None
        context = mock.create_autospec(self.real_trt.IExecutionContext, instance=True, spec_set=True)
        session = onnxruntime.InferenceSession(str(onnx_file), providers=["CPUExecutionProvider"])
        shapes: dict[str, tuple[int, ...]] = {}
        addresses: dict[str, int] = {}
        dtypes = {tensor.name: tensor.dtype for tensor in (*spec.inputs, *spec.outputs)}

        def view(name: str, address: int, shape: tuple[int, ...]) -> Any:
            assert self._where(address) == "device", name
            nbytes = int(np.prod(shape)) * np.dtype(dtypes[name]).itemsize
            data = (ctypes.c_uint8 * nbytes).from_address(address)
            return np.ctypeslib.as_array(data).view(dtypes[name]).reshape(shape)

        def kernel(shapes: dict[str, tuple[int, ...]], at: dict[str, int]) -> None:
            feeds = {name: view(name, at[name], shape) for name, shape in shapes.items()}
            outputs = session.run([tensor.name for tensor in spec.outputs], feeds)
            for tensor, output in zip(spec.outputs, outputs, strict=True):
                view(tensor.name, at[tensor.name], output.shape)[:] = output

        def execute(stream: int) -> bool:
            assert stream == STREAM
            if "execute" in self.fail:
                log.log(self.real_trt.ILogger.ERROR, self.fail["execute"])
                return False
            taken, at = dict(shapes), dict(addresses)
            if self.recording is None:
                kernel(taken, at)
            else:
                self.recording.append(lambda: kernel(taken, at))
            self._event("execute", onnx_file.stem, taken["pixel_values"][0], stream)
            return True

        def use_profile(index: int, stream: int) -> bool:
            self._event("profile", index, stream)
            return True

        context.set_input_shape.side_effect = lambda name, shape: shapes.update({name: tuple(shape)}) or True
        context.set_tensor_address.side_effect = lambda name, at: addresses.update({name: at}) or True
        context.set_optimization_profile_async.side_effect = use_profile
        context.execute_async_v3.side_effect = execute
        self.contexts.append(context)
        return context


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> GpuDouble:
    """The machine has one GPU, TensorRT and TensorRT-RTX."""
    real_trt = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-bindings is not installed")
    import cuda.bindings.runtime as real_cuda

    gpu = GpuDouble(real_cuda, real_trt)
    monkeypatch.setattr("cuda.bindings.runtime", gpu.cuda())
    for flavour in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, flavour, gpu.tensorrt(flavour, VERSION))
    monkeypatch.setenv("MASS_CACHE", str(tmp_path / "cache"))
    return gpu


@pytest.fixture
def engine_bundle(toy_bundle, tmp_path, gpu) -> Callable[..., Path]:
    """`engine_bundle(flavour, compose, **key)`: a toy bundle with "engines" that the double can run."""

    def make(flavour: str = "tensorrt_rtx", compose: str = "tsvm", slots: int = 3, **key: Any) -> Path:
        directory = Path(
            shutil.copytree(toy_bundle(compose), tmp_path / f"{flavour}-{compose}-{len(gpu.plans)}")
        )
        manifest = read_manifest(directory)
        shared = {"B": BATCH, "S": (1, 1, 1), "K": (1, 1, slots)}
        profiles = {FIRST_PASS: ({"B": BATCH},), SECOND_PASS: (shared, shared | {"S": BATCH})}
        fields = {"compute_capability": (), "precision": "fp32", "options": (), "version": VERSION} | key
        engines, files = [], dict(manifest.files)
        for name, spec in manifest.passes.items():
            file = f"{name}.engine"
            plan = f"plan of {directory.name} {name}".encode()
            (directory / file).write_bytes(plan)
            gpu.plans[plan] = (directory / spec.file, spec)
            engines.append(EngineSpec(name, file, EngineKey("0", flavour, profiles=profiles[name], **fields)))
            files[file] = file_spec(directory / file)
        manifest = dataclasses.replace(manifest, engines=tuple(engines), files=files)
        (directory / MANIFEST_FILE).write_text(json_from_manifest(manifest), encoding="utf-8")
        return directory

    return make
