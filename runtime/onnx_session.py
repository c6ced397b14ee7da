"""ONNX Runtime, on the CPU or on a GPU. The only module that imports onnxruntime."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from runtime.cores import CoreCache, stacked_cores
from runtime.errors import BackendError, BundleError

OnnxProvider = Literal["cpu", "cuda", "tensorrt"]

_EXECUTION_PROVIDERS: dict[OnnxProvider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_OPTIONS: dict[OnnxProvider, dict[str, str]] = {"cuda": {"use_tf32": "0"}}  # fp32 is fp32, as in engines
_ONLY_ERRORS = 3


def _import_onnxruntime() -> ModuleType:
    try:
        import onnxruntime  # noqa: PLC0415 (deferred: importing runtime stays light)
    except ImportError as error:
        raise BackendError(
            f"ONNX Runtime cannot be imported ({error}); pip install onnxruntime (or onnxruntime-gpu)."
        ) from error
    module: ModuleType = onnxruntime
    return module


def is_offered(provider: OnnxProvider) -> bool:
    """Whether the installed build of ONNX Runtime has the provider; it may still fail to start."""
    return _EXECUTION_PROVIDERS[provider] in _import_onnxruntime().get_available_providers()


@functools.cache
def has_vnni(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU's products of uint8 and int8 are exact, as far as Linux says.

    Without VNNI the kernels of ONNX Runtime for x86 saturate, unless it is told to widen the weights to uint8. On a
    CPU with VNNI that would double the time of a product; on other CPUs than x86 it does nothing.
    """
    try:
        return "vnni" in cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False


class StagedImages:
    """Images on a GPU for ONNX Runtime, with their host copy: rows that are picked out are sent again."""

    def __init__(self, host: NDArray[np.float32], device: str = "cuda") -> None:
        """Copy to the device."""
        self.host = np.ascontiguousarray(host)
        self.shape = self.host.shape
        self.ort_value = _import_onnxruntime().OrtValue.ortvalue_from_numpy(self.host, device, 0)
        self._device = device

    def __len__(self) -> int:
        return len(self.host)

    def __getitem__(self, rows: slice | Sequence[int] | NDArray[np.intp]) -> StagedImages:
        """All rows in order are the same images; others are copied anew."""
        picked = np.arange(len(self))[rows]
        if np.array_equal(picked, np.arange(len(self))):
            return self
        return StagedImages(self.host[picked], self._device)


class OnnxSession:
    """A graph in ONNX Runtime; see `runtime.session.Session`.

    ONNX Runtime falls back to the CPU without an error when CUDA does not start. Here that is an error.

    Attributes:
        path: of the ONNX file.
    """

    def __init__(self, path: Path, provider: OnnxProvider = "cpu", num_threads: int | None = None) -> None:
        """Load a graph.

        Args:
            path: ONNX file; its external data lies beside it.
            provider: where to run it.
            num_threads: threads within an operator; None lets ONNX Runtime choose.

        Raises:
            BackendError: ONNX Runtime is missing, lacks or does not start the provider, or refuses the graph.
        """
        onnxruntime = _import_onnxruntime()
        wanted = _EXECUTION_PROVIDERS[provider]
        if not is_offered(provider):
            raise BackendError(
                f"provider {provider!r} is not in this build of ONNX Runtime (it has "
                f"{', '.join(onnxruntime.get_available_providers())}); pip install onnxruntime-gpu."
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_ERRORS
        # Both passes run in turn: a session whose threads went on spinning would take the next one's processors.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if not has_vnni():
            options.add_session_config_entry("session.x64quantprecision", "1")
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            chosen = [(wanted, _OPTIONS.get(provider, {}))]
            session = onnxruntime.InferenceSession(str(path), options, providers=chosen)
        except Exception as error:  # ONNX Runtime's exceptions share no base but Exception
            raise BackendError(f"{path}: ONNX Runtime cannot load the graph ({error}).") from error
        active = session.get_providers()
        if wanted not in active:
            raise BackendError(
                f"provider {provider!r} did not start; ONNX Runtime would run on {', '.join(active)}. "
                "Check the driver, CUDA and cuDNN, or ask for provider='cpu'."
            )
        self.path = path
        self._provider = provider
        self._session: Any = session
        _LIVE.add(self)

    @property
    def provider(self) -> str:
        """`cpu`, `cuda` or `tensorrt`."""
        return self._provider

    @property
    def max_batch(self) -> int | None:
        """Any batch fits."""
        return None

    def input_names(self) -> tuple[str, ...]:
        """Of the open graph."""
        return tuple(value.name for value in self._session.get_inputs())

    def stage(self, pixel_values: Any) -> Any:
        """On a GPU: copy the images there, for both passes. On the CPU they are where they should be."""
        if self._provider == "cpu" or not isinstance(pixel_values, np.ndarray):
            return pixel_values
        return StagedImages(pixel_values)

    def core_feeds(self, sets: Sequence[tuple[int, ...]], cores: CoreCache) -> Mapping[str, Any]:
        """Cores of the sets, stacked on the host."""
        return stacked_cores(sets, cores)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Run the graph on inputs by name; outputs by name.

        Raises:
            BackendError: ONNX Runtime failed, or the session is closed.
        """
        session = self._session
        if session is None:
            raise BackendError(f"{self.path.name}: the session is closed.")
        names = [output.name for output in session.get_outputs()]
        try:
            if any(isinstance(value, StagedImages) for value in feeds.values()):
                return dict(zip(names, _run_bound(session, names, feeds), strict=True))
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise BackendError(f"{self.path.name}: ONNX Runtime failed ({error}).") from error

    def close(self) -> None:
        """Release the graph; runs that are under way finish."""
        self._session = None

    def abandon(self) -> None:
        """Close without releasing: in a forked process, whose threads are missing, ONNX Runtime would wait for them."""
        if self._session is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._session))
        self._session = None


_LIVE: weakref.WeakSet[OnnxSession] = weakref.WeakSet()


def _abandon_all() -> None:
    for session in list(_LIVE):
        session.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_abandon_all)


class LazySession:
    """A graph that is loaded when it is first run: what is seldom needed costs neither time nor memory before."""

    def __init__(
        self, path: Path, num_threads: int | None = None, check: Callable[[], None] | None = None
    ) -> None:
        """Remember what to load; it runs on the CPU.

        Args:
            path: ONNX file; its external data lies beside it.
            num_threads: threads within an operator; None lets ONNX Runtime choose.
            check: called once it is loaded; a BundleError says that the file is not the one that was meant.
        """
        self.path = path
        self._check = check
        self._num_threads = num_threads
        self._session: OnnxSession | None = None
        self._closed = False
        self._lock = threading.Lock()

    @property
    def provider(self) -> str:
        """Always `cpu`."""
        return "cpu"

    @property
    def max_batch(self) -> int | None:
        """Any batch fits."""
        return None

    def stage(self, pixel_values: Any) -> Any:
        """Images on the CPU are where they should be."""
        return pixel_values

    def core_feeds(self, sets: Sequence[tuple[int, ...]], cores: CoreCache) -> Mapping[str, Any]:
        """Cores of the sets, stacked on the host."""
        return stacked_cores(sets, cores)

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """As `OnnxSession.run`.

        Raises:
            BackendError: ONNX Runtime cannot load the graph or failed, or the session is closed.
        """
        with self._lock:
            if self._closed:
                raise BackendError(f"{self.path.name}: the session is closed.")
            if self._session is None:
                self._session = self._load()
            session = self._session
        return session.run(feeds)

    def _load(self) -> OnnxSession:
        session = OnnxSession(self.path, "cpu", self._num_threads)
        try:
            if self._check is not None:
                self._check()
        except BundleError as error:
            raise BackendError(f"{self.path.name}: cannot be loaded any more: {error}") from error
        return session

    def close(self) -> None:
        """Release the graph, if it was loaded; runs that are under way finish."""
        with self._lock:
            self._closed = True
            self._session = None


def _run_bound(session: Any, names: list[str], feeds: Mapping[str, Any]) -> list[NDArray[Any]]:
    """Run with inputs where they are, and outputs to the host."""
    binding = session.io_binding()
    for name, value in feeds.items():
        if isinstance(value, StagedImages):
            binding.bind_ortvalue_input(name, value.ort_value)
        else:
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
    for name in names:
        binding.bind_output(name)
    session.run_with_iobinding(binding)
    outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
    return outputs
