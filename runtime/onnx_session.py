"""ONNX Runtime, on the CPU or with CUDA. The only module that imports onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from numpy.typing import NDArray

from runtime.errors import BackendError

OnnxProvider = Literal["cpu", "cuda"]

_EXECUTION_PROVIDERS: dict[OnnxProvider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
}
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


class OnnxSession:
    """A graph in ONNX Runtime; see `runtime.session.Session`.

    ONNX Runtime falls back to the CPU without an error when CUDA does not start. Here that is an error.
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
        if num_threads is not None:
            options.intra_op_num_threads = num_threads
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=[wanted])
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

    @property
    def provider(self) -> str:
        """`cpu` or `cuda`."""
        return self._provider

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph on inputs by name; outputs by name.

        Raises:
            BackendError: ONNX Runtime failed, or the session is closed.
        """
        session = self._session
        if session is None:
            raise BackendError(f"{self.path.name}: the session is closed.")
        names = [output.name for output in session.get_outputs()]
        try:
            return dict(zip(names, session.run(names, dict(feeds)), strict=True))
        except Exception as error:  # as above
            raise BackendError(f"{self.path.name}: ONNX Runtime failed ({error}).") from error

    def close(self) -> None:
        """Release the graph; runs that are under way finish."""
        self._session = None
