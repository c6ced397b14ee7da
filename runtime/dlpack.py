"""Arrays of other libraries through DLPack: the few fields that are needed, read from the capsule in place."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np

CUDA = 2  # kDLCUDA

_KINDS = {0: "i", 1: "u", 2: "f"}
_NAME = b"dltensor"


class _Tensor(ctypes.Structure):
    """DLTensor of dlpack.h; versioned tensors are not asked for."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class DlpackArray:
    """Where an array lies.

    Attributes:
        address: of the first element.
        shape: as numpy's.
        strides: in bytes; None if contiguous.
        dtype: as numpy's; of kind `V` if numpy has no such type.
        capsule: keeps the array alive.
    """

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: np.dtype[Any]
    capsule: Any


def cuda_device_of(value: Any) -> int | None:
    """Index of the GPU on which an array with DLPack lies; None if it is elsewhere or has no DLPack."""
    if not hasattr(value, "__dlpack__"):
        return None
    kind, index = value.__dlpack_device__()
    return int(index) if kind == CUDA else None


def read_dlpack(value: Any, stream: int) -> DlpackArray:
    """Ask for the capsule and read it; the array's library makes `stream` wait for what is still written."""
    capsule = value.__dlpack__(stream=stream)
    get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
    get_pointer.restype, get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(get_pointer(capsule, _NAME))
    kind, itemsize = _KINDS.get(tensor.code, "V"), tensor.bits * tensor.lanes // 8
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = None
    if tensor.strides:
        strides = tuple(tensor.strides[i] * itemsize for i in range(tensor.ndim))
    return DlpackArray(
        int(tensor.data or 0) + tensor.byte_offset,
        shape,
        strides,
        np.dtype(f"{kind if tensor.lanes == 1 else 'V'}{itemsize}"),
        capsule,  # unused, it releases the array when it goes
    )
