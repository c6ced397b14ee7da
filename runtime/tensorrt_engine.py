"""An engine from its file: the right TensorRT, the weights, a context."""

from __future__ import annotations

import importlib
import logging
import mmap
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.bundle import PassSpec
from runtime.engine_spec import EngineSpec, is_compatible
from runtime.errors import BackendError
from runtime.tensorrt_log import make_logger

_LOG = logging.getLogger(__name__)


@dataclass
class LoadedEngine:
    """An engine and what must live with it.

    Attributes:
        trt: the module.
        log: collects errors in `errors`; `text()` is for messages.
        runtime: that deserialised the engine.
        engine: the engine.
        name: its file's, for messages.
    """

    trt: Any
    log: Any
    runtime: Any
    engine: Any
    name: str


def load_engine(directory: Path, engine: EngineSpec, spec: PassSpec) -> LoadedEngine:
    """Deserialise an engine of a bundle, and give it its weights if it was built without them.

    Raises:
        BackendError: TensorRT is missing, of another version, or refuses the engine.
    """
    trt = _import_tensorrt(engine)
    log = make_logger(trt)
    runtime = _make_runtime(trt, log, engine)
    file = directory / engine.file  # absolute, if it is of the cache
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as plan:
        deserialised = runtime.deserialize_cuda_engine(plan)
    if deserialised is None:
        raise BackendError(
            f"{file}: {engine.key.flavour} {trt.__version__} refuses the engine: {log.text()}. Build it again with "
            "`mass build-engines`."
        )
    loaded = LoadedEngine(trt, log, runtime, deserialised, engine.file)
    if "weight_stripped" in engine.key.options:
        _refit(loaded, directory / spec.file)
    names = {deserialised.get_tensor_name(i) for i in range(deserialised.num_io_tensors)}
    expected = {tensor.name for tensor in (*spec.inputs, *spec.outputs)}
    if names != expected:
        raise BackendError(
            f"{engine.file}: the engine and the manifest differ in {', '.join(sorted(names ^ expected))}; build it "
            "again with `mass build-engines`."
        )
    return loaded


def make_context(
    loaded: LoadedEngine, *, cuda_graphs: bool, cache_directory: Path | None
) -> tuple[Any, KernelCache | None]:
    """An execution context, and with TensorRT-RTX the cache of its compiled kernels.

    Args:
        loaded: the engine.
        cuda_graphs: TensorRT-RTX records CUDA graphs by itself, for every shape; for TensorRT this does nothing.
        cache_directory: of the kernels; None keeps none.

    Raises:
        BackendError: TensorRT refuses, as when memory is short.
    """
    engine, trt, cache = loaded.engine, loaded.trt, None
    if hasattr(trt, "CudaGraphStrategy"):
        config = engine.create_runtime_config()
        strategy = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategy.DISABLED
        if cache_directory is not None:
            cache = KernelCache(cache_directory / f"{Path(loaded.name).name}.kernels", config)
        context = engine.create_execution_context(config)
    else:
        context = engine.create_execution_context()
    if context is None:
        raise BackendError(f"{loaded.name}: no execution context: {loaded.log.text()}")
    return context, cache


class KernelCache:
    """Kernels that TensorRT-RTX compiled for this GPU, on disk between processes."""

    def __init__(self, path: Path, config: Any) -> None:
        """Read the file, if there is one, and attach the cache to a runtime config."""
        self._path = path
        self._cache = config.create_runtime_cache()
        if path.is_file() and not self._cache.deserialize(path.read_bytes()):
            _LOG.info("%s: not used; it is of another GPU or version", path)
        config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Write the file; that it cannot be written costs time later, not correctness."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._path.parent, delete=False) as file:
                file.write(bytes(self._cache.serialize()))
            Path(file.name).replace(self._path)
        except OSError as error:
            _LOG.info("%s: not written (%s)", self._path, error)


def _make_runtime(trt: Any, log: Any, engine: EngineSpec) -> Any:
    try:
        runtime = trt.Runtime(log)
    except (RuntimeError, TypeError) as error:  # pybind's words for a null pointer
        raise BackendError(f"{engine.key.flavour} does not start ({error}): {log.text()}") from error
    if "version_compatible" in engine.key.options and hasattr(runtime, "engine_host_code_allowed"):
        runtime.engine_host_code_allowed = True
    return runtime


def _refit(loaded: LoadedEngine, onnx_file: Path) -> None:
    refitter = loaded.trt.Refitter(loaded.engine, loaded.log)
    parser = loaded.trt.OnnxParserRefitter(refitter, loaded.log)
    if not (parser.refit_from_file(str(onnx_file)) and refitter.refit_cuda_engine()):
        raise BackendError(f"{onnx_file}: the weights do not fit the engine: {loaded.log.text()}")


def _import_tensorrt(engine: EngineSpec) -> Any:
    """The module that built the engine, in its version.

    Raises:
        BackendError: it is not installed, or of another version.
    """
    key = engine.key
    try:
        module = importlib.import_module(key.flavour)
    except (ImportError, OSError) as error:
        package = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx-cu12"}[key.flavour]
        raise BackendError(f"{key.flavour} cannot be imported ({error}); pip install {package}.") from error
    installed = str(module.__version__)
    if not is_compatible(key, installed):
        raise BackendError(
            f"{engine.file}: built by {key.flavour} {key.version}, installed is {installed}; build it again with "
            "`mass build-engines`, or install that version."
        )
    return module
