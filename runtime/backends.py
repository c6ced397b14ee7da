"""From the name of a provider to the sessions of both passes."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Literal

from runtime.bundle import FIRST_PASS, SECOND_PASS, Manifest
from runtime.errors import BackendError
from runtime.onnx_session import OnnxProvider, OnnxSession, is_offered
from runtime.session import Session

Provider = Literal["auto", "cpu", "cuda", "tensorrt"]

_LOG = logging.getLogger(__name__)


def open_sessions(
    directory: Path, manifest: Manifest, provider: Provider, num_threads: int | None
) -> tuple[Session, Session]:
    """Load both graphs.

    Args:
        directory: of the bundle.
        manifest: of the bundle.
        provider: `auto` takes CUDA where it starts, else the CPU; any other is taken or is an error.
        num_threads: threads within an operator on the CPU; None lets the backend choose.

    Returns:
        Sessions of the first and the second pass.

    Raises:
        BackendError: the provider is not available or refuses a graph.
    """
    if provider == "tensorrt":
        if importlib.util.find_spec("runtime.tensorrt_session") is None:
            raise BackendError("TensorRT engines are not supported by this version; use provider='cuda'.")
        raise BackendError("this bundle has no TensorRT engines; use provider='cuda'.")
    if provider != "auto":
        return _open_both(directory, manifest, provider, num_threads)
    if is_offered("cuda"):
        try:
            return _open_both(directory, manifest, "cuda", num_threads)
        except BackendError as error:
            _LOG.info("CUDA did not start, taking the CPU: %s", error)
    return _open_both(directory, manifest, "cpu", num_threads)


def _open_both(
    directory: Path, manifest: Manifest, provider: OnnxProvider, num_threads: int | None
) -> tuple[Session, Session]:
    first, second = (directory / manifest.passes[name].file for name in (FIRST_PASS, SECOND_PASS))
    return OnnxSession(first, provider, num_threads), OnnxSession(second, provider, num_threads)
