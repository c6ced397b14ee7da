"""Tensors of the Open Inference Protocol: JSON, or a JSON header with raw little-endian data behind it."""

from __future__ import annotations

import base64
import binascii
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.serving.problems import RequestProblem

HEADER_LENGTH = "inference-header-content-length"
_DTYPES: dict[str, np.dtype[Any]] = {"FP32": np.dtype("<f4"), "UINT8": np.dtype("u1")}
_MAX_DIMENSIONS = 8


@dataclass(frozen=True, eq=False)
class Tensor:
    """BYTES are an array of objects of type bytes."""

    datatype: str
    array: NDArray[Any]


@dataclass(frozen=True)
class InferRequest:
    """A parsed request.

    Attributes:
        id: of the client's choice.
        parameters: of the request.
        inputs: by name.
        outputs: wanted, by name, and whether each comes as raw data; None for all.
        binary: whether outputs that say nothing else come as raw data.
    """

    id: str | None
    parameters: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, bool] | None
    binary: bool


def bytes_array(values: Sequence[str]) -> NDArray[np.object_]:
    """A BYTES tensor of texts. [N]"""
    array = np.empty(len(values), object)
    array[:] = [value.encode() for value in values]
    return array


def decode_request(body: bytes, header_length: str | None) -> InferRequest:
    """Parse a request.

    Args:
        body: of the HTTP request.
        header_length: value of its header `HEADER_LENGTH`, if it has one.

    Raises:
        RequestProblem: malformed; what and where is told.
    """
    if header_length is not None and (not header_length.isdigit() or int(header_length) > len(body)):
        raise RequestProblem(
            400, f"{HEADER_LENGTH}: expected a length within the body, got {header_length!r}."
        )
    split = len(body) if header_length is None else int(header_length)
    try:
        head = json.loads(body[:split])
    except (ValueError, RecursionError) as error:
        raise RequestProblem(400, f"body: not valid JSON ({error}).") from error
    listed = head.get("inputs") if isinstance(head, dict) else None
    if not isinstance(listed, list) or not listed or not all(isinstance(entry, dict) for entry in listed):
        raise RequestProblem(400, "body: expected an object with a list of inputs.")
    inputs: dict[str, Tensor] = {}
    offset = split
    for entry in listed:
        tensor, offset = _decoded(entry, body, offset)
        inputs[str(entry["name"])] = tensor
    if offset != len(body):
        raise RequestProblem(400, f"body: {len(body) - offset} bytes too many behind the inputs.")
    parameters = _parameters(head)
    binary = bool(parameters.get("binary_data_output", False))
    return InferRequest(_text_or_none(head.get("id")), parameters, inputs, _wanted(head, binary), binary)


def encode_response(
    model: str, version: str, request: InferRequest, outputs: dict[str, NDArray[Any]]
) -> tuple[bytes, int | None]:
    """Write a response: its body, and the length of its JSON part if raw data follows.

    Raises:
        RequestProblem: an output is wanted that there is not.
    """
    wanted = dict.fromkeys(outputs, request.binary) if request.outputs is None else request.outputs
    missing = sorted(set(wanted) - set(outputs))
    if missing:
        raise RequestProblem(400, f"outputs: no {', '.join(missing)} here; there are {', '.join(outputs)}.")
    entries, raw = [], []
    for name, binary in wanted.items():
        array = outputs[name]
        datatype = {"O": "BYTES", "b": "BOOL"}.get(array.dtype.kind, "FP32")
        entry: dict[str, Any] = {"name": name, "datatype": datatype, "shape": list(array.shape)}
        if binary:
            data = _raw(array)
            entry["parameters"] = {"binary_data_size": len(data)}
            raw.append(data)
        else:
            flat = array.reshape(-1).tolist()
            entry["data"] = [value.decode() for value in flat] if datatype == "BYTES" else flat
        entries.append(entry)
    answer: dict[str, Any] = {"model_name": model, "model_version": version, "outputs": entries}
    if request.id is not None:
        answer["id"] = request.id
    head = json.dumps(answer).encode()
    return b"".join([head, *raw]), len(head) if raw else None


def _decoded(entry: dict[str, Any], body: bytes, offset: int) -> tuple[Tensor, int]:
    """One input and where the next one's raw data begins."""
    name, datatype, shape = entry.get("name"), entry.get("datatype"), entry.get("shape")
    where = f"input {name!r}"
    if not isinstance(name, str) or not isinstance(datatype, str) or shape is None or not _is_shape(shape):
        raise RequestProblem(400, f"{where}: expected name, datatype and shape.")
    if datatype != "BYTES" and datatype not in _DTYPES:
        raise RequestProblem(400, f"{where}: datatype {datatype!r}; BYTES, FP32 and UINT8 are read.")
    size = _parameters(entry).get("binary_data_size")
    count = math.prod(shape)
    if size is None:
        return Tensor(datatype, _from_json(entry.get("data"), datatype, shape, where)), offset
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(body) - offset:
        raise RequestProblem(400, f"{where}: binary_data_size {size!r} does not fit the body.")
    raw, end = body[offset : offset + size], offset + size
    if datatype == "BYTES":
        values = _split(raw, count, where)
        array = np.empty(count, object)
        array[:] = values
        return Tensor(datatype, array.reshape(shape)), end
    dtype = _DTYPES[datatype]
    if size != count * dtype.itemsize:
        raise RequestProblem(400, f"{where}: {size} bytes, shape {shape} needs {count * dtype.itemsize}.")
    return Tensor(datatype, np.frombuffer(raw, dtype).astype(dtype.newbyteorder("=")).reshape(shape)), end


def _from_json(data: Any, datatype: str, shape: list[int], where: str) -> NDArray[Any]:
    count = math.prod(shape)
    try:
        flat = _flattened(data)
        if len(flat) != count:
            raise RequestProblem(400, f"{where}: {len(flat)} values, shape {shape} needs {count}.")
        if datatype == "BYTES":
            array = np.empty(count, object)
            array[:] = [base64.b64decode(value, validate=True) for value in flat]
        elif datatype == "UINT8":
            array = np.frombuffer(bytes(flat), np.uint8)  # takes nothing but integers in 0..255
        else:
            array = np.array(flat, np.float32)
    except (binascii.Error, ValueError, TypeError, OverflowError, RecursionError) as error:
        wanted = "base64 strings" if datatype == "BYTES" else "numbers"
        raise RequestProblem(400, f"{where}: data must be a list of {wanted} ({error}).") from error
    return array.reshape(shape)


def _flattened(data: Any) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError("no list")
    if data and isinstance(data[0], list):
        return [value for part in data for value in _flattened(part)]
    return data


def _split(raw: bytes, count: int, where: str) -> list[bytes]:
    """Elements, each behind its length (4 bytes, little-endian)."""
    values: list[bytes] = []
    offset = 0
    while offset + 4 <= len(raw) and len(values) < count:
        (length,) = struct.unpack_from("<I", raw, offset)
        values.append(raw[offset + 4 : offset + 4 + length])
        offset += 4 + length
    if len(values) != count or offset != len(raw):
        raise RequestProblem(400, f"{where}: the raw data does not hold {count} elements with their lengths.")
    return values


def _raw(array: NDArray[Any]) -> bytes:
    if array.dtype == object:
        return b"".join(struct.pack("<I", len(value)) + value for value in array.reshape(-1).tolist())
    return array.tobytes() if array.dtype.kind == "b" else array.astype("<f4").tobytes()


def _wanted(head: dict[str, Any], binary: bool) -> dict[str, bool] | None:  # noqa: FBT001
    listed = head.get("outputs")
    if not listed:
        return None
    if not isinstance(listed, list) or not all(
        isinstance(e, dict) and isinstance(e.get("name"), str) for e in listed
    ):
        raise RequestProblem(400, "outputs: expected a list of objects with a name.")
    return {entry["name"]: bool(_parameters(entry).get("binary_data", binary)) for entry in listed}


def _parameters(entry: dict[str, Any]) -> dict[str, Any]:
    found = entry.get("parameters", {})
    if not isinstance(found, dict):
        raise RequestProblem(400, "parameters: expected an object.")
    return found


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and 1 <= len(shape) <= _MAX_DIMENSIONS
        and all(isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape)
    )


def _text_or_none(value: Any) -> str | None:
    return None if value is None else str(value)
