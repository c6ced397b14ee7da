"""Which files does an ONNX graph read? Its protobuf is walked without the onnx package, before anything is loaded.

ONNX keeps large tensors in other files, named by a path in the graph. A path that leads out of the bundle, or to a
file that the manifest does not list, is refused here, whatever the backend would do with it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from runtime.bundle import FileSpec
from runtime.errors import BundleError

MAX_GRAPH_BYTES = 256 << 20  # weights lie outside; what remains is far smaller
_MAX_DEPTH = 64

# Field numbers of onnx.proto that lead to a tensor: message -> field -> message below it.
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_TAG = (1 << 32) - 1
_KEY, _VALUE = 1, 2


def check_graph_files(path: Path, files: Mapping[str, FileSpec]) -> None:
    """Refuse a graph whose tensors lie anywhere but within files of the bundle.

    Args:
        path: the ONNX file.
        files: of the bundle's manifest.

    Raises:
        BundleError: too large, no protobuf, or a tensor in a file that is not listed, or beyond its end.
    """
    size = path.stat().st_size
    if not 0 < size <= MAX_GRAPH_BYTES:
        raise BundleError(
            f"{path}: {size} bytes, expected a graph of 1 to {MAX_GRAPH_BYTES}. Export the bundle again."
        )
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for entries in _external_data(data, 0, size, "model", 0):
                _check_entries(entries, files, path)
        except (IndexError, UnicodeDecodeError) as error:
            raise BundleError(f"{path}: not an ONNX graph ({error}). Export the bundle again.") from error


def _check_entries(entries: Mapping[str, str], files: Mapping[str, FileSpec], path: Path) -> None:
    name = entries.get("location", "")
    if name not in files:
        raise BundleError(
            f"{path}: reads weights from {name!r}, which is no file of this bundle ({', '.join(files)}). Do not use "
            "it unless you trust its maker; export the bundle again."
        )
    numbers = [entries.get("offset", "0"), entries.get("length", "0")]
    fits = all(n.isascii() and n.isdecimal() and len(n) < 20 for n in numbers)
    if not fits or sum(map(int, numbers)) > files[name].bytes:
        raise BundleError(
            f"{path}: a tensor of {numbers[1][:24]} bytes at {numbers[0][:24]} of {name!r}, which has "
            f"{files[name].bytes}. Export the bundle again."
        )


def _external_data(data: mmap.mmap, start: int, end: int, kind: str, depth: int) -> Iterator[dict[str, str]]:
    """The `external_data` of every tensor that has any; an IndexError says that this is no protobuf."""
    if depth > _MAX_DEPTH:
        raise IndexError(f"nested deeper than {_MAX_DEPTH}")
    children = _CHILDREN[kind]
    entries: dict[str, str] = {}
    for field, begin, stop in _fields(data, start, end):
        child = children.get(field)
        if child == "entry":
            pair = {number: data[a:b].decode() for number, a, b in _fields(data, begin, stop)}
            key = pair.get(_KEY, "")
            if key in entries:
                raise IndexError(f"{key!r} is given twice")
            entries[key] = pair.get(_VALUE, "")
        elif child is not None:
            yield from _external_data(data, begin, stop, child, depth + 1)
    if entries:
        yield entries


def _fields(data: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field that holds bytes; others are passed over."""
    while at < end:
        tag, at = _varint(data, at, end)
        if tag > _MAX_TAG:
            raise IndexError("a field of too large a number")
        kind = tag & 7
        if kind == _BYTES:
            length, at = _varint(data, at, end)
            if at + length > end:
                raise IndexError("a field is cut off")
            yield tag >> 3, at, at + length
            at += length
        elif kind == _VARINT:
            _, at = _varint(data, at, end)
        elif kind in (_FIXED32, _FIXED64):
            at += 4 if kind == _FIXED32 else 8
        else:
            raise IndexError("a field of no known type")
    if at > end:
        raise IndexError("a field is cut off")


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise IndexError("a number is cut off")
