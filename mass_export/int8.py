"""Eight bits on a CPU, spelled out in the graph: products with the tower's dense weights in integers.

- Weights: symmetric int8, one scale for each output. They are rounded once, at export.
- Activations: symmetric around a zero point of 128 in uint8, one scale for each token, found as the graph runs. No
  images are needed for it, and a sample's result does not depend on its batch, as it does with the one scale for a
  whole tensor of DynamicQuantizeLinear.
- fp32: LayerNorm, softmax and attention's own products, the residual stream, the router, `proj` and the heads.
- Low-rank bases and the tasks' patch convolutions are stored in int8, one scale for each row (of the convolutions:
  output). Bases are widened as they are read: they are T times smaller than the weights, and widening costs less than
  rounding what they are multiplied with. So are the convolutions in `second_pass.onnx`; in the graphs for sets of one
  task (`mass_export.one_task`) they are products in integers, of patches with 63 steps on either side of zero.

`y = ((q_x - 128) q_w) * scale_x * scale_w`; MatMulInteger is exact. On x86 without VNNI ONNX Runtime's product of
uint8 and int8 saturates sums of two terms at 16 bits; `runtime.onnx_session` asks it for the exact kernels there, which
it has for weights in the graph. With 63 steps nothing saturates: `2 * 127 * 127 < 2^15`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.errors import ExportError
from mass_export.precision import stored_tensor
from mass_export.weights_file import WeightsFile

LARGEST = 127
FEWER = 63
CONTRIB = "com.microsoft"
TINIEST = 1e-12
DENSE = ("base.", "merged.")
KEPT = ("proj",)


def int8_rows(array: NDArray[np.floating[Any]]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Round to int8 with a scale for each row: `array ~ steps * scale[..., None]`.

    Args:
        array: [.., D]

    Returns:
        steps [.., D] int8 in -127..127, scale [..] float32, 0 for a row of zeros

    Raises:
        ExportError: a value is not finite.
    """
    if not np.isfinite(array).all():
        raise ExportError("int8: a weight is NaN or infinite; look at the checkpoints.")
    scale = (np.abs(array).max(axis=-1) / LARGEST).astype(np.float32)
    steps = np.rint(array / np.maximum(scale, np.finfo(np.float32).tiny)[..., None])
    return steps.astype(np.int8), scale


@dataclass(frozen=True)
class _Dense:
    """A rounded weight: initializers of the steps [D_in, D_out] and the scales [D_out]."""

    steps: ir.Value
    scale: ir.Value


class Int8Conversion:
    """One graph under conversion: its products with dense weights, and its stored bases."""

    smallest_scale = 0.0

    def __init__(self, graph: ir.Graph, kept: tuple[str, ...] = (), *, fused: bool = False) -> None:
        """Prepare.

        Args:
            graph: fp32.
            kept: products whose weights' names contain one of these stay fp32.
            fused: let ONNX Runtime scale a product's sums by output as it writes them; the graph is for it alone.
        """
        self._graph = graph
        self._kept = kept
        self._fused = fused
        self._dense: dict[ir.Value, _Dense] = {}
        self._rounded: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value]] = {}  # x -> uint8 steps, scale
        self._constants: dict[str, ir.Value] = {}

    def run(self) -> None:
        """Convert in place."""
        for node in list(self._graph):
            if node.op_type in ("MatMul", "Gemm"):
                self._convert_product(node)
        self._drop_unread()

    def _convert_product(self, node: ir.Node) -> None:
        x, weight = node.inputs[0], node.inputs[1]
        if x is not None and weight is not None and self._is_dense(weight):
            self._convert_dense(node, x, weight)

    def _convert_dense(self, node: ir.Node, x: ir.Value, weight: ir.Value) -> None:
        dense = self._rounded_weight(weight)
        y = self._product(node, x, dense, LARGEST)
        if len(node.inputs) == 3 and node.inputs[2] is not None:
            y = self._add(node, "Add", y, node.inputs[2])
        self._replace(node, y)

    def _product(self, before: ir.Node, x: ir.Value, dense: _Dense, largest: int) -> ir.Value:
        """`x` rounded to `largest` steps on either side of the zero point, times a rounded weight."""
        steps, scale = self._rounded_activation(x, before, largest)
        zero_point = self._zero_point(largest)
        if self._fused:
            self._graph.opset_imports[CONTRIB] = 1
            one = self._inline("one", np.float32(1))
            inputs = [steps, dense.steps, one, dense.scale, zero_point]
            node = ir.node("MatMulIntegerToFloat", inputs, domain=CONTRIB)
            self._graph.insert_before(before, node)
            return self._add(before, "Mul", node.outputs[0], scale)
        y = self._add(before, "MatMulInteger", steps, dense.steps, zero_point)
        y = self._add(before, "Mul", self._add(before, "Cast", y, to=int(ir.DataType.FLOAT)), scale)
        return self._add(before, "Mul", y, dense.scale)

    def _is_dense(self, weight: ir.Value) -> bool:
        root = _root(weight)
        if not root.is_initializer() or root.const_value is None:
            return False
        name = str(root.name)
        bare = name.removesuffix(".T").split(".", 1)[-1]
        if any(part in name for part in self._kept):
            return False
        return name.startswith(DENSE) and bare not in KEPT and len(root.const_value.shape) == 2

    def _rounded_weight(self, weight: ir.Value) -> _Dense:
        """Steps and scale of a weight, or of the columns of it that a Slice takes.

        ONNX Runtime makes products exact on CPUs without VNNI only where it finds the steps themselves, not a Slice.
        """
        if weight not in self._dense:
            root = _root(weight)
            assert root.const_value is not None
            name, rows = str(root.name), root.const_value.numpy().T  # [D_out, D_in]
            if weight is not root:
                cut = weight.producer()
                assert cut is not None
                start, stop = (int(_constant(cut.inputs[i]).item()) for i in (1, 2))
                name, rows = f"{name}.{start}.{stop}", rows[start:stop]
            steps, scale = int8_rows(rows)
            scale = np.maximum(scale, np.float32(self.smallest_scale))
            self._dense[weight] = _Dense(
                self._initializer(f"{name}.int8", steps.T), self._initializer(f"{name}.scale", scale)
            )
        return self._dense[weight]

    def _rounded_activation(self, x: ir.Value, node: ir.Node, steps: int) -> tuple[ir.Value, ir.Value]:
        """A token's values as uint8, `steps` on either side of zero, and their scale; once for all readers."""
        if (x, steps) not in self._rounded:
            last = self._inline("last_axis", np.array([-1], np.int64))
            most = self._add(node, "ReduceMax", x, last, keepdims=1)
            least = self._add(node, "Neg", self._add(node, "ReduceMin", x, last, keepdims=1))
            largest = self._add(node, "Max", most, least, self._inline("tiniest", np.float32(TINIEST)))
            scale = self._add(node, "Mul", largest, self._inline(f"step.{steps}", np.float32(1 / steps)))
            rounded = self._add(
                node,
                "QuantizeLinear",
                self._add(node, "Div", x, scale),
                self._inline("one", np.float32(1)),
                self._zero_point(steps),
            )
            self._rounded[x, steps] = rounded, scale
        return self._rounded[x, steps]

    def _zero_point(self, steps: int) -> ir.Value:
        return self._inline(f"zero_point.{steps}", np.uint8(steps + 1))

    def _inline(self, name: str, value: Any) -> ir.Value:
        if name not in self._constants:
            self._constants[name] = self._initializer(f"int8.{name}", np.asarray(value))
        return self._constants[name]

    def _initializer(self, name: str, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        value = ir.val(name, tensor.dtype, list(array.shape), const_value=tensor)
        self._graph.register_initializer(value)
        return value

    def _add(self, before: ir.Node, op_type: str, *inputs: ir.Value, **attributes: Any) -> ir.Value:
        node = ir.node(op_type, list(inputs), attributes or None)
        self._graph.insert_before(before, node)
        return node.outputs[0]

    def _replace(self, node: ir.Node, by: ir.Value) -> None:
        ir.convenience.replace_all_uses_with(node.outputs[0], by)
        self._graph.remove(node, safe=True)

    def replace_table(self, name: str, array: NDArray[Any]) -> None:
        """Other numbers for an initializer, such as scaled singular values; int8 is widened as it is read."""
        table = self._graph.initializers.get(name)
        if table is None:
            return
        stored = self._initializer(f"{name}.{array.dtype.name}", array)
        for node, index in list(table.uses()):
            node.replace_input_with(index, stored)
            if array.dtype == np.int8:
                self._widen(node.outputs[0])
        self._drop_unread()

    def replace_convolutions(self, name: str, steps: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
        """The tasks' patch convolutions, which are gathered as one row each: steps [T, 3*P*P, D], scale [T, D]."""
        table = self._graph.initializers.get(name)
        if table is None:
            return
        stored, factors = self._initializer(f"{name}.int8", steps), self._initializer(f"{name}.scale", scale)
        for reshape, index in list(table.uses()):
            reshape.replace_input_with(index, stored)
            (gather,) = (reader for reader, _ in reshape.outputs[0].uses())
            slots, wide = gather.inputs[1], self._widen(gather.outputs[0])  # [S, K, 3*P*P*D]
            assert slots is not None
            after = next(reader for reader, _ in wide.uses())
            readers = list(wide.uses())
            by_output = self._inline("by_output", np.array([0, 0, -1, scale.shape[1]], np.int64))
            spread = self._add(after, "Gather", factors, slots, axis=0)  # [S, K, D]
            spread = self._add(after, "Unsqueeze", spread, self._inline("axis_2", np.array([2], np.int64)))
            scaled = self._add(after, "Mul", self._add(after, "Reshape", wide, by_output), spread)
            flat = self._add(after, "Reshape", scaled, self._inline("flat", np.array([0, 0, -1], np.int64)))
            for reader, at in readers:
                reader.replace_input_with(at, flat)
        self._drop_unread()

    def widen_inputs(self, prefixes: tuple[str, ...]) -> None:
        """Take the graph inputs whose names begin so in int8; widened are only the rows that are gathered."""
        for value in self._graph.inputs:
            if str(value.name).startswith(prefixes):
                value.type = ir.TensorType(ir.DataType.INT8)
                gathers = [node for node, _ in value.uses() if node.op_type == "Gather"]
                for wide in [node.outputs[0] for node in gathers] or [value]:
                    self._widen(wide)

    def round_product_of(self, name: str, scale: str, width: int) -> None:
        """Take the graph input `name` [D_in, width] in int8, and its scale by output as a further input [width].

        ONNX Runtime does not know it as a weight, so that without VNNI its sums of two products might saturate: what it
        is multiplied with has as few steps as that takes.
        """
        value = next((value for value in self._graph.inputs if value.name == name), None)
        if value is None:
            return
        value.type = ir.TensorType(ir.DataType.INT8)
        factors = ir.val(scale, ir.DataType.FLOAT, [width])
        self._graph.inputs.append(factors)
        for node, _ in list(value.uses()):
            assert node.inputs[0] is not None
            self._replace(node, self._product(node, node.inputs[0], _Dense(value, factors), FEWER))

    def _widen(self, value: ir.Value) -> ir.Value:
        """Cast to float32 for all readers of a value, where it is made: ONNX Runtime runs older nodes later."""
        readers = list(value.uses())
        value.type = ir.TensorType(ir.DataType.INT8)
        cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
        for reader, at in readers:
            reader.replace_input_with(at, cast.outputs[0])
        maker = value.producer()
        if maker is None:
            self._graph.insert_before(self._graph[0], cast)
        else:
            self._graph.insert_after(maker, cast)
        return cast.outputs[0]

    def _drop_unread(self) -> None:
        for node in reversed(list(self._graph)):
            if all(not output.uses() and not output.is_graph_output() for output in node.outputs):
                self._graph.remove(node, safe=True)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses():
                del self._graph.initializers[name]


def save_int8(model: ir.Model, path: Path, weights: WeightsFile) -> None:
    """Write a converted graph, its weights in the weights file; shapes and single numbers stay inline."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype != ir.DataType.INT64 and len(tensor.shape):
            value.const_value = stored_tensor(tensor, weights)
    ir.save(model, path)


def _root(value: ir.Value) -> ir.Value:
    node = value.producer()
    if node is not None and node.op_type == "Slice" and node.inputs[0] is not None:
        return node.inputs[0]
    return value


def _constant(value: ir.Value | None) -> NDArray[Any]:
    assert value is not None
    assert value.const_value is not None
    array: NDArray[Any] = value.const_value.numpy()
    return array
