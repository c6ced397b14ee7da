"""The second pass for images of one task, shaped for CPUs: what the task changes comes as inputs of the graph.

The graph of `mass_export.second_pass` gathers slices out of the stacked bases for every set. On a CPU that copy, the
broadcasting over samples and the sums for every bias cost as much as a third of the low-rank products themselves.
With one task for the whole batch

- bases, biases, LayerNorm parameters and the patch convolution are fed as they lie in the mapped weights file;
- every linear layer is three Gemms in two dimensions, the last of which adds to the result of the first in place:
  `y = x W0^T + b`, `h = (x VH^T) * s`, `y += h U^T`; a single task needs no core (MASS.md section 4).

`runtime.second_pass` groups the images of a batch by task. Inputs are described at `runtime.bundle.OneTaskSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact
from mass_export.graph import Graph
from mass_export.second_pass import add_second_pass, vector_sizes
from mass_export.spec import VisionSpec
from mass_export.vit_graph import Layers, bias_name
from mass_export.weights_file import WeightsFile
from runtime.bundle import MatrixBases, OneTaskSpec, VectorTables

ONE_TASK = "one_task"
LEFT, RIGHT, SCALE = "left.", "right.", "scale."


class FlatLayers(Layers):
    """Dense layers as Gemms in two dimensions, which take their bias along."""

    def linear(self, name: str, x: ir.Value, rows: int, columns: slice | None = None) -> ir.Value:
        """`x W^T + b`: [B, rows, D_in] -> [B, rows, D_out]."""
        width = self.input_width(name)
        flat = self.graph.op("Reshape", x, self.graph.integers(-1, width))
        y = self.flat_linear(name, flat, columns)
        start, stop = (0, self.output_width(name)) if columns is None else (columns.start, columns.stop)
        return self.graph.op("Reshape", y, self.graph.integers(-1, rows, stop - start))

    def flat_linear(self, name: str, x: ir.Value, columns: slice | None) -> ir.Value:
        """The same without the axis of images: [B*rows, D_in] -> [B*rows, D_out]."""
        weight, bias = self.transposed(name), self.bias(bias_name(name))
        if columns is not None:
            weight, bias = self.take(weight, columns, axis=1), self.take(bias, columns, axis=0)
        return self.graph.op("Gemm", x, weight, bias)

    def bias(self, name: str) -> ir.Value:
        """A bias [D_out]."""
        return self.parameter(name)

    def input_width(self, name: str) -> int:
        """D_in of a weight."""
        return int(self._params[name].shape[1])

    def output_width(self, name: str) -> int:
        """D_out of a weight."""
        return int(self._params[name].shape[0])


class OneTaskLayers(FlatLayers):
    """Layers with the base's weights and the low-rank branches of one task."""

    def __init__(
        self,
        graph: Graph,
        spec: VisionSpec,
        base: Mapping[str, Tensor],
        bases: Mapping[str, MatrixBases],
        *,
        own_vectors: bool,
    ) -> None:
        super().__init__(graph, spec, base, "base.")
        self._own_vectors = own_vectors
        floats = ir.DataType.FLOAT
        self._left, self._right, self._scale = {}, {}, {}
        for name, stored in bases.items():
            rank = f"R.{name}"
            self._right[name] = graph.input(f"{RIGHT}{name}", floats, [rank, stored.vh.shape[2]])
            self._scale[name] = graph.input(f"{SCALE}{name}", floats, [rank])
            self._left[name] = graph.input(f"{LEFT}{name}", floats, [rank, stored.u_t.shape[2]])
        self._vectors: dict[str, ir.Value] = {}
        if own_vectors:
            sizes = vector_sizes(spec)
            vectors = graph.input("vectors", floats, [sum(sizes.values())])
            parts = graph.split(vectors, list(sizes.values()), axis=0)
            self._vectors = dict(zip(sizes, parts, strict=True))
            side = 3 * spec.patch_size[0] * spec.patch_size[1]
            self._conv1 = graph.input("conv1", floats, [side, spec.width])

    def flat_linear(self, name: str, x: ir.Value, columns: slice | None) -> ir.Value:
        """Base and low-rank branch, accumulated."""
        graph, left = self.graph, self._left[name]
        if columns is not None:
            left = self.take(left, columns, axis=1)
        y = super().flat_linear(name, x, columns)
        h = graph.op("Mul", graph.op("Gemm", x, self._right[name], transB=1), self._scale[name])
        return graph.op("Gemm", h, left, y)

    def bias(self, name: str) -> ir.Value:
        """The task's."""
        return self._vectors[name] if self._vectors else self.parameter(name)

    def layer_norm(self, name: str, x: ir.Value) -> ir.Value:
        """With the task's scale and bias."""
        if not self._vectors:
            return super().layer_norm(name, x)
        scale, bias = self._vectors[f"{name}.weight"], self._vectors[f"{name}.bias"]
        return self.graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=self.spec.layer_norm_eps)

    def patch_weight(self) -> ir.Value:
        """The task's conv1. [3*P*P, D]"""
        return self._conv1 if self._own_vectors else super().patch_weight()

    def positions(self) -> ir.Value:
        """Positions of the task, its class embedding in row 0. [N, D]"""
        graph, name = self.graph, "positional_embedding"
        scaled = graph.op(
            "Mul", self._left[name], graph.op("Unsqueeze", self._scale[name], graph.integers(1))
        )
        table = super().positions()
        if self._own_vectors:
            row = graph.op("Unsqueeze", self._vectors["class_embedding"], graph.integers(0))
            cls = graph.op("Pad", row, graph.integers(0, 0, self.spec.tokens - 1, 0))
            table = graph.op("Add", self.parameter(name), cls)
        return graph.op("Gemm", scaled, self._right[name], table, transA=1)

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj + ((x U) * scale) VH`: proj is applied from the right, so its factors swap sides."""
        graph, name = self.graph, "proj"
        x = graph.op("Reshape", pooled, graph.integers(-1, self.spec.width))
        h = graph.op("Mul", graph.op("Gemm", x, self._left[name], transB=1), self._scale[name])
        y = graph.op("Gemm", h, self._right[name], graph.op("MatMul", x, self.parameter(name)))
        return graph.op("Reshape", y, graph.integers(-1, 1, self.spec.embed_dim))


def write_one_task(
    artifact: Artifact,
    weights: WeightsFile,
    directory: Path,
    bases: Mapping[str, MatrixBases],
    tables: VectorTables | None,
) -> OneTaskSpec:
    """Write the graph beside the other two; it reads the same weights."""
    graph, vision = Graph(ONE_TASK, weights), artifact.info.vision
    pixel_values = graph.input("pixel_values", ir.DataType.FLOAT, ["B", 3, *vision.image_size])
    layers = OneTaskLayers(graph, vision, artifact.base, bases, own_vectors=tables is not None)
    logits = add_second_pass(layers, artifact.heads, pixel_values)
    classes = sum(len(task.classes) for task in artifact.info.tasks)
    path = directory / f"{ONE_TASK}.onnx"
    graph.save(path, {"logits": (logits, ["B", classes])}, mass_export.__version__)
    return OneTaskSpec(path.name, tables)
