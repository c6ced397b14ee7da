"""Both passes for images of one task, shaped for CPUs: what the task changes comes as inputs of the graphs.

The graph of `mass_export.second_pass` gathers slices out of the stacked bases for every set. On a CPU that copy, the
broadcasting over samples and the sums for every bias cost as much as a third of the low-rank products themselves.
With one task for the whole batch

- bases, biases, LayerNorm parameters and the patch convolution are fed as they lie in the mapped weights file;
- every linear layer is three Gemms in two dimensions, the last of which adds to the result of the first in place:
  `y = x W0^T + b`, `h = (x VH^T) * s`, `y += h U^T`; a single task needs no core (MASS.md section 4).

Where the first pass runs on the base it is the same computation with bases of rank zero. The tower is then cut where
the router has read enough: the blocks before run for both passes, then either the router or the blocks behind. So a CPU
holds the base's weights, which ONNX Runtime rearranges for itself, once.

`runtime.second_pass` groups the images of a batch by task. Inputs are described at `runtime.bundle.OneTaskSpec`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact
from mass_export.first_pass import add_blocks, add_router, blocks_before_router
from mass_export.graph import Graph
from mass_export.router_spec import Tap
from mass_export.second_pass import add_heads, add_second_pass, vector_sizes
from mass_export.spec import VisionSpec
from mass_export.vit_graph import Layers, bias_name, encode_rest
from mass_export.weights_file import WeightsFile
from runtime.bundle import MatrixBases, OneTaskSpec, VectorTables

ONE_TASK, ONE_TASK_REST, ONE_TASK_ROUTER = "one_task", "one_task_rest", "one_task_router"
STREAM = "stream"
LEFT, RIGHT, SCALE = "left.", "right.", "scale."

Outputs = dict[str, tuple[ir.Value, Sequence[int | str]]]


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
        self._bases = bases
        self._own_vectors = own_vectors
        self._inputs: dict[str, ir.Value] = {}
        self._vectors: dict[str, ir.Value] = {}
        if own_vectors:
            sizes = vector_sizes(spec)
            parts = graph.split(self._input("vectors", sum(sizes.values())), list(sizes.values()), axis=0)
            self._vectors = dict(zip(sizes, parts, strict=True))

    def _input(self, name: str, *shape: int | str) -> ir.Value:
        """A graph input, declared when it is first needed."""
        if name not in self._inputs:
            self._inputs[name] = self.graph.input(name, ir.DataType.FLOAT, shape)
        return self._inputs[name]

    def _left(self, name: str) -> ir.Value:
        return self._input(f"{LEFT}{name}", f"R.{name}", self._bases[name].u_t.shape[2])

    def _right(self, name: str) -> ir.Value:
        return self._input(f"{RIGHT}{name}", f"R.{name}", self._bases[name].vh.shape[2])

    def _scale(self, name: str) -> ir.Value:
        return self._input(f"{SCALE}{name}", f"R.{name}")

    def flat_linear(self, name: str, x: ir.Value, columns: slice | None) -> ir.Value:
        """Base and low-rank branch, accumulated."""
        graph, left = self.graph, self._left(name)
        if columns is not None:
            left = self.take(left, columns, axis=1)
        y = super().flat_linear(name, x, columns)
        h = graph.op("Mul", graph.op("Gemm", x, self._right(name), transB=1), self._scale(name))
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
        if not self._own_vectors:
            return super().patch_weight()
        return self._input("conv1", 3 * self.spec.patch_size[0] * self.spec.patch_size[1], self.spec.width)

    def positions(self) -> ir.Value:
        """Positions of the task, its class embedding in row 0. [N, D]"""
        graph, name = self.graph, "positional_embedding"
        scaled = graph.op(
            "Mul", self._left(name), graph.op("Unsqueeze", self._scale(name), graph.integers(1))
        )
        table = super().positions()
        if self._own_vectors:
            row = graph.op("Unsqueeze", self._vectors["class_embedding"], graph.integers(0))
            cls = graph.op("Pad", row, graph.integers(0, 0, self.spec.tokens - 1, 0))
            table = graph.op("Add", self.parameter(name), cls)
        return graph.op("Gemm", scaled, self._right(name), table, transA=1)

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj + ((x U) * scale) VH`: proj is applied from the right, so its factors swap sides."""
        graph, name = self.graph, "proj"
        x = graph.op("Reshape", pooled, graph.integers(-1, self.spec.width))
        h = graph.op("Mul", graph.op("Gemm", x, self._left(name), transB=1), self._scale(name))
        y = graph.op("Gemm", h, self._right(name), graph.op("MatMul", x, self.parameter(name)))
        return graph.op("Reshape", y, graph.integers(-1, 1, self.spec.embed_dim))


@dataclass(frozen=True)
class _Writer:
    """Writes the graphs of an artifact beside those of a bundle; they read the same weights."""

    artifact: Artifact
    weights: WeightsFile
    directory: Path
    bases: Mapping[str, MatrixBases]
    tables: VectorTables | None

    def layers(self, graph: Graph) -> OneTaskLayers:
        """The layers of any task."""
        vision, own = self.artifact.info.vision, self.tables is not None
        return OneTaskLayers(graph, vision, self.artifact.base, self.bases, own_vectors=own)

    def whole(self) -> OneTaskSpec:
        """One graph for the second pass."""
        graph = Graph(ONE_TASK, self.weights)
        images = self.images(graph)
        return OneTaskSpec(
            self.save(graph, self.logits(add_second_pass(self.layers(graph), self.artifact.heads, images))),
            self.tables,
        )

    def in_parts(self) -> OneTaskSpec:
        """The blocks before the router, the router, and the blocks behind."""
        graph = Graph(ONE_TASK, self.weights)
        features, stream = add_blocks(self.layers(graph), self.artifact, self.images(graph))
        vision, rows = self.artifact.info.vision, self.rows()
        parts: Outputs = {STREAM: (stream, ["B", rows, vision.width])}
        parts |= {feature_name(tap): (z, ["B", vision.width]) for tap, z in features.items()}
        first = self.save(graph, parts)
        return OneTaskSpec(first, self.tables, self.router(features.keys()), self.rest())

    def rows(self) -> int:
        """Tokens of the residual stream between the parts."""
        info = self.artifact.info
        ended = blocks_before_router(self.artifact) == info.vision.layers and info.router.token == "cls"
        return 1 if ended else info.vision.tokens

    def router(self, taps: Iterable[Tap]) -> str:
        """The stream and the features on the way -> residuals."""
        graph, info = Graph(ONE_TASK_ROUTER, self.weights), self.artifact.info
        stream = self.stream(graph)
        given = {
            tap: graph.input(feature_name(tap), ir.DataType.FLOAT, ["B", info.vision.width]) for tap in taps
        }
        layers = FlatLayers(graph, info.vision, self.artifact.base, "base.")
        residuals, unknown = add_router(layers, self.artifact, given, stream)
        outputs: Outputs = {"residuals": (residuals, ["B", len(info.tasks)])}
        if unknown is not None:
            outputs["unknown"] = (unknown, ["B"])
        return self.save(graph, outputs)

    def rest(self) -> str:
        """The stream -> logits."""
        graph = Graph(ONE_TASK_REST, self.weights)
        stream, start = self.stream(graph), blocks_before_router(self.artifact)
        feature = encode_rest(self.layers(graph), start, stream)
        return self.save(graph, self.logits(add_heads(graph, feature, self.artifact.heads)))

    def images(self, graph: Graph) -> ir.Value:
        return graph.input("pixel_values", ir.DataType.FLOAT, ["B", 3, *self.artifact.info.vision.image_size])

    def stream(self, graph: Graph) -> ir.Value:
        return graph.input(STREAM, ir.DataType.FLOAT, ["B", self.rows(), self.artifact.info.vision.width])

    def logits(self, value: ir.Value) -> Outputs:
        return {"logits": (value, ["B", sum(len(task.classes) for task in self.artifact.info.tasks)])}

    def save(self, graph: Graph, outputs: Outputs) -> str:
        path = self.directory / f"{graph.name}.onnx"
        graph.save(path, outputs, mass_export.__version__)
        return path.name


def feature_name(tap: Tap) -> str:
    """Name of a routing feature between the parts."""
    return f"z.{tap.layer}.{tap.site}"


def write_one_task(
    artifact: Artifact,
    weights: WeightsFile,
    directory: Path,
    bases: Mapping[str, MatrixBases],
    tables: VectorTables | None,
) -> OneTaskSpec:
    """Write the graphs beside the other two; they read the same weights.

    Args:
        artifact: of the bundle.
        weights: its weights file.
        directory: of the bundle.
        bases: stored in the weights file.
        tables: stored there, too; with a first pass on the base its own row comes last.
    """
    writer = _Writer(artifact, weights, directory, bases, tables)
    return writer.whole() if artifact.merged else writer.in_parts()
