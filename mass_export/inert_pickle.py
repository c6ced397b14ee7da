"""Read the tensors of pickled modules and TorchScript archives without running any code that they hold.

A pickle names callables and asks the reader to call them; that is how it can run code. Here no name is ever
imported: the few that rebuild tensors and containers are replaced by this module's own, and every other becomes
a `Recorded`, an object that remembers its state and does nothing. The parameters are then found by walking the
recorded tree of modules, by their names.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, cast

import torch
from torch import Tensor

_STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_MAX_DEPTH = 64


class Recorded:
    """Stands in for an object of a class that is not imported; keeps its state, ignores everything else."""

    def __init__(self, *_args: object, **_kwargs: object) -> None:
        self.state: object = None

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __setitem__(self, key: object, value: object) -> None:
        """Items of unknown containers are dropped, as are those of the next three."""

    def append(self, item: object) -> None:
        """Drop it."""

    def extend(self, items: object) -> None:
        """Drop them."""

    def add(self, item: object) -> None:
        """Drop it."""


@dataclass
class Storage:
    """The memory of tensors. `data` may be filled in after the pickle was read.

    Attributes:
        numel: elements of `dtype`, as the pickle says.
        data: bytes. [n] uint8
    """

    dtype: torch.dtype
    numel: int
    data: Tensor | None = None

    def elements(self) -> Tensor:
        """The bytes as elements. [numel]"""
        needed = self.numel * self.dtype.itemsize
        if self.data is None or self.data.numel() < needed:
            raise pickle.UnpicklingError(f"a storage of {needed} bytes is not in the file")
        return self.data[:needed].view(self.dtype)


@dataclass(frozen=True)
class _Sliced:
    """A tensor as the pickle describes it."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def tensor(self) -> Tensor:
        numbers = (self.offset, *self.size, *self.stride)
        if len(self.size) != len(self.stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"a tensor of size {self.size} and stride {self.stride}")
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        elements = self.storage.elements()
        if 0 not in self.size and last >= elements.numel():
            raise pickle.UnpicklingError("a tensor reaches beyond its storage")
        return elements.as_strided(self.size, self.stride, self.offset + int(elements.storage_offset()))


class _StorageType:
    """What a storage class of torch becomes: its dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Function:
    """A replacement that a pickle may call; made anew for every use, so that nothing it is given lasts."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., object]) -> None:
        self._call = call

    def __call__(self, *args: object) -> object:
        return self._call(*args)


def _slice(storage: Storage, offset: int, size: Any, stride: Any, *_rest: object) -> _Sliced:
    return _Sliced(storage, offset, tuple(size), tuple(stride))


def _slice_typed(storage: Storage, offset: int, size: Any, stride: Any, *rest: object) -> _Sliced:
    dtype = rest[2]
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("a tensor without a dtype")
    typed = Storage(dtype, storage.numel // dtype.itemsize, storage.data)
    return _Sliced(typed, offset, tuple(size), tuple(stride))


def _storage_from_bytes(data: bytes) -> Storage:
    loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    untyped = getattr(loaded, "_untyped_storage", loaded)
    tensor = torch.empty(0, dtype=torch.uint8).set_(untyped)
    dtype = vars(loaded).get("dtype", torch.uint8)
    return Storage(dtype, tensor.numel() // dtype.itemsize, tensor)


def _bytes_from_text(text: str, *_encoding: object) -> bytes:
    return text.encode("latin1")


def _instance(kind: object, *_rest: object) -> object:
    return kind() if isinstance(kind, type) and issubclass(kind, Recorded | dict) else Recorded()


_REBUILD: dict[tuple[str, str], Callable[..., object]] = {
    ("torch._utils", "_rebuild_tensor"): _slice,
    ("torch._utils", "_rebuild_tensor_v2"): _slice,
    ("torch._utils", "_rebuild_tensor_v3"): _slice_typed,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_rest: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_rest: tensor,
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
    ("_codecs", "encode"): _bytes_from_text,  # how protocol 2 writes bytes
    ("torch", "Size"): lambda size=(): tuple(size),
    ("copyreg", "_reconstructor"): _instance,
    ("copy_reg", "_reconstructor"): _instance,
}


# The unpickler written in Python keeps its memo in a dict; that of C can be made to reserve any memory.
class InertUnpickler(cast("Any", pickle)._Unpickler):  # type: ignore[misc]  # noqa: SLF001
    """An unpickler that imports nothing and calls nothing but this module's own functions.

    Args:
        file: where the pickle lies.
        persistent: turns a persistent id, such as that of a storage, into an object.
    """

    def __init__(self, file: IO[bytes], persistent: Callable[[Any], object] | None = None) -> None:
        super().__init__(file, encoding="utf-8")
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> object:
        """A harmless object of the given name."""
        if (module, name) in _REBUILD:
            return _Function(_REBUILD[module, name])
        if module in ("torch", "torch.storage") and name in _STORAGE_DTYPES:
            return _StorageType(_STORAGE_DTYPES[name])
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if (module, name) in (("collections", "OrderedDict"), ("collections", "defaultdict")):
            return type("Items", (dict,), {"__init__": lambda _self, *_args: None})
        return type("Recorded", (Recorded,), {"origin": f"{module}.{name}"})

    def persistent_load(self, pid: Any) -> object:
        """A storage, or what else the format keeps outside the pickle."""
        if self._persistent is None:
            raise pickle.UnpicklingError("an unexpected persistent id")
        return self._persistent(pid)


def storage_from_pid(pid: Any) -> tuple[str, Storage]:
    """Key and (empty) storage of torch's persistent id `("storage", type, key, location, numel, ..)`."""
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
        raise pickle.UnpicklingError("an unknown persistent id")
    kind, key, numel = pid[1], pid[2], pid[4]
    if not (isinstance(kind, _StorageType) and isinstance(numel, int) and numel >= 0):
        raise pickle.UnpicklingError("a storage of unknown type")
    return str(key), Storage(kind.dtype, numel)


def tensors_of(data: object) -> dict[str, Tensor]:
    """Named tensors of a recorded module, of a TorchScript program, or of mappings of them."""
    return {name: sliced.tensor() for name, sliced in _walk(data, "", 0)}


def _walk(data: object, prefix: str, depth: int) -> Iterator[tuple[str, _Sliced]]:
    if depth > _MAX_DEPTH:
        raise pickle.UnpicklingError("modules nested too deeply")
    if isinstance(data, Recorded):
        state = data.state
        if isinstance(state, Mapping) and "_modules" in state:  # a torch.nn.Module's own registers
            for register in ("_parameters", "_buffers", "_modules"):
                yield from _walk(state.get(register), prefix, depth + 1)
        else:
            yield from _walk(state, prefix, depth + 1)
    elif isinstance(data, Mapping):
        for name, value in data.items():
            if isinstance(value, _Sliced):
                yield f"{prefix}{name}", value
            elif isinstance(value, Recorded | Mapping):
                yield from _walk(value, f"{prefix}{name}.", depth + 1)
