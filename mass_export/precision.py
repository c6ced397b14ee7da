"""Half precision, spelled out in the graph: an fp32 pass -> the same pass with fp16 or bf16 products.

What is computed in which type is decided here and written as Cast nodes, so that a strongly typed engine, ONNX
Runtime and a reader of the graph agree:

- half: matrix products, and what stands between two of them (biases, activation, scaling, attention's layout);
- fp32: LayerNorm, softmax, the residual stream, every reduction, the router, the heads and the mean deltas of 1-D
  parameters; inputs and outputs of the pass.

The router subtracts two nearly equal squares and the heads multiply by exp(logit_scale): both would lose in half
what they cost little to keep. Weights are stored in half where every reader of them is half.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.errors import ExportError
from mass_export.weights_file import WeightsFile
from runtime.engine_spec import Precision

HALVES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}

MOVES = frozenset({"Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Gather", "Pad"})
BETWEEN_PRODUCTS = frozenset({"Add", "Mul", "Gelu", "Sigmoid"})
FULL_WEIGHTS = ("router.", "heads.")
FULL_WEIGHT_NAMES = ("vectors",)

Kind = Literal["half", "full", "weight", "index"]


def write_converted(onnx_file: Path, directory: Path, precision: Precision) -> Path:
    """Write a converted copy of one pass, with a weights file of its own.

    Args:
        onnx_file: fp32 graph.
        directory: created; takes the graph under its own name.
        precision: `fp16` or `bf16`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with WeightsFile(directory / "weights.bin") as weights:
        return convert_file(onnx_file, directory, weights, precision)


def convert_file(onnx_file: Path, directory: Path, weights: WeightsFile, precision: Precision) -> Path:
    """Write a converted copy of one pass beside a weights file that passes may share."""
    model = ir.load(onnx_file)
    initializers = model.graph.initializers.values()
    external = [value for value in initializers if isinstance(value.const_value, ir.ExternalTensor)]
    _Conversion(model.graph, HALVES[precision]).run()
    for value in external:
        assert value.const_value is not None
        value.const_value = stored_tensor(value.const_value, weights)
    path = directory / onnx_file.name
    ir.save(model, path)
    return path


def half_array(array: NDArray[Any], half: ir.DataType, name: str) -> NDArray[Any]:
    """Round to nearest.

    Raises:
        ExportError: a value is beyond the type's range.
    """
    with np.errstate(over="ignore"):
        rounded = array.astype(np.float16 if half == ir.DataType.FLOAT16 else ml_dtypes.bfloat16)
    if not np.isfinite(rounded.astype(np.float32)).all():
        raise ExportError(
            f"{name}: a weight of {np.abs(array).max():.3g} is beyond the range of {half.name.lower()}; use bf16 or "
            "fp32."
        )
    return rounded


class _Conversion:
    """One graph under conversion: the kind of each value, then types, casts and weights."""

    def __init__(self, graph: ir.Graph, half: ir.DataType) -> None:
        self._graph = graph
        self._half = half
        self._kinds: dict[ir.Value, Kind] = {}
        self._roots: dict[ir.Value, ir.Value] = {}  # weight, or a view of it -> the initializer
        self._computes: dict[ir.Node, Literal["half", "full"]] = {}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Convert in place."""
        for value in (*self._graph.inputs, *self._graph.initializers.values()):
            self._kinds[value] = _kind_of_source(value)
            if self._kinds[value] == "weight":
                self._roots[value] = value
        nodes = list(self._graph)
        for node in nodes:
            self._classify(node)
        stored_half = self._store_weights(nodes)
        for node in nodes:
            self._cast_inputs(node, stored_half)
        for output in self._graph.outputs:
            assert self._kinds[output] == "full", f"{output.name} must be fp32"

    def _classify(self, node: ir.Node) -> None:
        inputs = [value for value in node.inputs if value is not None and self._kinds[value] != "index"]
        kind: Kind
        if not inputs:
            kind = "index"
        elif node.op_type in MOVES:
            data = inputs[0]
            kind = self._kinds[data]
            if kind == "weight":
                self._roots |= dict.fromkeys(node.outputs, self._roots[data])
        else:
            kind = self._computes[node] = "half" if self._is_half(node, inputs) else "full"
        for output in node.outputs:
            self._kinds[output] = kind
            if output not in self._graph.outputs:
                output.type = None

    def _is_half(self, node: ir.Node, inputs: list[ir.Value]) -> bool:
        if node.op_type == "MatMul":
            return not any(_kept_full(self._roots[value]) for value in inputs if value in self._roots)
        in_branch = node.op_type in BETWEEN_PRODUCTS and not is_residual_stream(node)
        return in_branch and any(self._kinds[value] == "half" for value in inputs)

    def _store_weights(self, nodes: list[ir.Node]) -> set[ir.Value]:
        """Turn the initializers that are only read in half into half."""
        wanted: dict[ir.Value, set[str]] = {}
        for node in nodes:
            if node in self._computes:
                for value in node.inputs:
                    if value in self._roots:
                        wanted.setdefault(self._roots[value], set()).add(self._computes[node])
        stored = {root for root, kinds in wanted.items() if kinds == {"half"}}
        for root in stored:
            assert root.const_value is not None
            rounded = half_array(root.const_value.numpy(), self._half, str(root.name))
            root.const_value = ir.Tensor(rounded, dtype=self._half, name=root.name)
            root.type = ir.TensorType(self._half)
        return stored

    def _cast_inputs(self, node: ir.Node, stored_half: set[ir.Value]) -> None:
        if node not in self._computes:
            return
        wanted = self._half if self._computes[node] == "half" else ir.DataType.FLOAT
        for index, value in enumerate(node.inputs):
            if value is None or self._kinds[value] == "index":
                continue
            is_half = self._kinds[value] == "half" or self._roots.get(value) in stored_half
            actual = self._half if is_half else ir.DataType.FLOAT
            if actual != wanted:
                node.replace_input_with(index, self._cast(node, value, wanted))

    def _cast(self, before: ir.Node, value: ir.Value, to: ir.DataType) -> ir.Value:
        if (value, to) not in self._casts:
            cast = ir.node("Cast", [value], {"to": int(to)})
            self._graph.insert_before(before, cast)
            self._casts[value, to] = cast.outputs[0]
        return self._casts[value, to]


def _kind_of_source(value: ir.Value) -> Kind:
    if value.dtype != ir.DataType.FLOAT:
        return "index"
    return "weight" if value.is_initializer() else "full"


def _kept_full(initializer: ir.Value) -> bool:
    name = str(initializer.name)
    return name.startswith(FULL_WEIGHTS) or name in FULL_WEIGHT_NAMES


def is_residual_stream(node: ir.Node) -> bool:
    """A sum that a LayerNorm reads is the residual stream; no other sum of a ViT is normalised."""
    return node.op_type == "Add" and any(
        reader.op_type == "LayerNormalization" for reader in _readers(node.outputs[0])
    )


def _readers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read a value, or a slice of it, as their data."""
    for node, index in value.uses():
        if node.op_type == "Slice" and index == 0:
            yield from _readers(node.outputs[0])
        elif index == 0 or node.op_type == "Add":
            yield node


def stored_tensor(tensor: ir.TensorProtocol, weights: WeightsFile) -> ir.ExternalTensor:
    """Put a tensor into the weights file."""
    array = tensor.numpy()
    bits = array.view(np.uint16) if tensor.dtype == ir.DataType.BFLOAT16 else array
    stored = weights.add(bits)
    return ir.ExternalTensor(
        stored.file,
        stored.offset,
        stored.nbytes,
        tensor.dtype,
        shape=ir.Shape(stored.shape),
        name=str(tensor.name),
        base_dir=weights.path.parent,
    )
