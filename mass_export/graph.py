"""A thin layer over onnx_ir for building the passes: weights go to the weights file, constants stay inline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir import tape

from mass_export.weights_file import WeightsFile
from runtime.bundle import PassSpec, StoredArray, TensorSpec

OPSET = 20  # Gelu; LayerNormalization needs 17
IR_VERSION = 10
Section = Literal["indices", "gathers", "rest"]
SECTIONS: tuple[Section, ...] = get_args(Section)


class Graph:
    """Collects nodes and initializers of one pass.

    `weight` registers a large array under a name (stored once per file), `constant` an inline small one,
    `op` adds a node and returns its output.
    """

    def __init__(self, name: str, weights: WeightsFile) -> None:
        self.name = name
        self._weights = weights
        self._sections = {section: tape.Tape() for section in SECTIONS}
        self._tape = self._sections["rest"]
        self._inputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare a graph input."""
        value = ir.val(name, dtype, list(shape))
        self._inputs.append(value)
        return value

    def weight(self, name: str, array: NDArray[Any]) -> ir.Value:
        """An initializer in the weights file."""
        if name not in self._initializers:
            self.stored_weight(name, self._weights.add(array))
        return self._initializers[name]

    def stored_weight(self, name: str, stored: StoredArray) -> ir.Value:
        """An initializer that already lies in the weights file."""
        if name not in self._initializers:
            assert stored.stride is None, f"{name}: other arrays lie in it"
            tensor = ir.ExternalTensor(
                stored.file,
                stored.offset,
                stored.nbytes,
                ir.DataType.from_numpy(np.dtype(stored.dtype)),
                shape=ir.Shape(stored.shape),
                name=name,
                base_dir=self._weights.path.parent,
            )
            self._initializers[name] = ir.val(name, tensor.dtype, list(stored.shape), const_value=tensor)
        return self._initializers[name]

    def constant(self, array: NDArray[Any], name: str = "") -> ir.Value:
        """A small inline initializer; equal values share one, if they have no name of their own."""
        name = (
            name or f"constant_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{array.tobytes().hex()}"
        )
        if name not in self._initializers:
            tensor = ir.tensor(array, name=name)
            self._initializers[name] = ir.val(name, tensor.dtype, list(array.shape), const_value=tensor)
        return self._initializers[name]

    def integers(self, *values: int) -> ir.Value:
        """A 1-D int64 constant: shapes, axes, indices."""
        return self.constant(np.array(values, dtype=np.int64))

    def scalar(self, value: float) -> ir.Value:
        """A float32 scalar constant."""
        return self.constant(np.array(value, dtype=np.float32))

    def op(self, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        """Add a node with one output."""
        return self._tape.op(op_type, list(inputs), attributes or None)

    @contextmanager
    def section(self, name: Section) -> Iterator[None]:
        """Nodes that are added meanwhile go into another part of the file.

        ONNX Runtime runs a node as late as it can if it is older, by its place in the file, than what else its reader
        waits for. So what is gathered in "gathers" is gathered where it is used, and not held before.
        """
        current, self._tape = self._tape, self._sections[name]
        try:
            yield
        finally:
            self._tape = current

    def split_into(self, value: ir.Value, sizes: ir.Value, parts: Sequence[ir.Value], axis: int) -> None:
        """Split along an axis into values that are at hand; sizes [len(parts)] int64."""
        self._tape.op_multi_out("Split", [value, sizes], {"axis": axis}, outputs=parts)

    def split(self, value: ir.Value, sizes: Sequence[int], axis: int) -> list[ir.Value]:
        """Split along an axis."""
        parts = self._tape.op_multi_out(
            "Split", [value, self.integers(*sizes)], {"axis": axis}, num_outputs=len(sizes)
        )
        return list(parts)

    def top_two(self, value: ir.Value) -> ir.Value:
        """The two smallest values along the last axis, smallest first: [B, T] -> [B, 2]."""
        values, _ = self._tape.op_multi_out(
            "TopK", [value, self.integers(2)], {"axis": -1, "largest": 0, "sorted": 1}, num_outputs=2
        )
        return values

    def save(
        self, path: Path, outputs: Mapping[str, tuple[ir.Value, Sequence[int | str]]], version: str
    ) -> PassSpec:
        """Name the outputs, write the `.onnx` file and describe it.

        Args:
            path: file to write; external weights lie beside it.
            outputs: name -> (value, shape); all are float32.
            version: producer version for the file.
        """
        for name, (value, shape) in outputs.items():
            value.name = name
            value.shape = ir.Shape(list(shape))
            value.type = ir.TensorType(ir.DataType.FLOAT)
        graph = ir.Graph(
            self._inputs,
            [value for value, _ in outputs.values()],
            nodes=[node for part in self._sections.values() for node in part.nodes],
            initializers=list(self._initializers.values()),
            opset_imports={"": OPSET},
            name=self.name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="mass-export", producer_version=version)
        ir.save(model, path)
        return PassSpec(
            file=path.name,
            inputs=tuple(tensor_spec(value) for value in self._inputs),
            outputs=tuple(tensor_spec(value) for value, _ in outputs.values()),
        )


def tensor_spec(value: ir.Value) -> TensorSpec:
    """Describe a typed graph value for the manifest."""
    assert value.name is not None
    assert value.dtype is not None
    assert value.shape is not None
    shape = tuple(d if isinstance(d, int) else str(d.value) for d in value.shape.dims)
    return TensorSpec(value.name, str(value.dtype.numpy().name), shape)
