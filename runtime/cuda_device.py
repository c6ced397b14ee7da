"""CUDA calls that raise, and what the first GPU is. Only this module and its users touch `cuda.bindings`."""

from __future__ import annotations

from typing import Any

from runtime.errors import BackendError


def import_cudart() -> Any:
    """The CUDA runtime API.

    Raises:
        BackendError: cuda.bindings is not installed, or finds no CUDA.
    """
    try:
        from cuda.bindings import runtime  # noqa: PLC0415 (deferred: importing this package stays light)
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendError(
            f"cuda.bindings cannot be imported ({error}); pip install cuda-bindings."
        ) from error
    return runtime


def checked(cudart: Any, result: tuple[Any, ...], what: str) -> Any:
    """Unpack `(status, value...)` of a call.

    Args:
        cudart: the module that was called.
        result: what the call returned.
        what: is being done, for the message.

    Raises:
        BackendError: the status is not success; the message carries CUDA's own.
    """
    status, values = result[0], result[1:]
    if status != cudart.cudaError_t.cudaSuccess:
        text = cudart.cudaGetErrorString(status)[1]
        text = text.decode() if isinstance(text, bytes) else str(text)
        raise BackendError(f"{what}: CUDA error {int(status)}, {text}.")
    if len(values) == 1:
        return values[0]
    return values or None


def compute_capability(device: int = 0) -> str:
    """Of a GPU, such as `8.6`.

    Raises:
        BackendError: there is no such GPU, or no driver.
    """
    cudart = import_cudart()
    attribute = cudart.cudaDeviceAttr
    parts = []
    for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor"):
        found = cudart.cudaDeviceGetAttribute(getattr(attribute, name), device)
        parts.append(checked(cudart, found, f"asking for GPU {device}"))
    return ".".join(map(str, parts))
