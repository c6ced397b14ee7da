"""Both passes for images that need one task each, shaped for CPUs: what the tasks change comes as inputs of the graphs.

A batch is S sets of m images, all images of a set with the same task (S = 1: the whole batch). The base's products run
over the whole batch, since small products cost a CPU much more for each image; the low-rank branches run set by set. A
single task needs no core (MASS.md section 4): `y = x W0^T + ((x VH^T) * s) U^T + b`.

- Bases, biases and LayerNorm parameters of all tasks are fed as they lie in the mapped weights file, those of a task
  together; the graph gathers the rows of the sets' tasks where it needs them, while they are in the cache.
- The patch convolution, where each task has it in full, is a graph of its own that runs set by set: it is not copied.
  Where the tasks' deltas are kept as bases it is a product like all others.
- Where the first pass runs on the base it is the same computation with bases of rank zero. The tower is then cut where
  the router has read enough, or may have: the blocks before run for both passes, then the router, the blocks behind, or
  both for those images of which the router is not sure. So a CPU holds the base's weights, which ONNX Runtime
  rearranges for itself, once.

`runtime.second_pass` divides a batch into sets. Inputs are described at `runtime.bundle.OneTaskSpec`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact
from mass_export.first_pass import add_blocks, add_router, stops_of
from mass_export.graph import Graph
from mass_export.image_input import add_image_input
from mass_export.router_spec import Tap
from mass_export.second_pass import BASES, CONV1, add_heads, vector_sizes
from mass_export.spec import VisionSpec
from mass_export.stacked_bases import RowGather, StackedBases
from mass_export.vit_graph import Layers, bias_name, cut_patches, encode_rest, tokens
from mass_export.weights_file import WeightsFile
from runtime.bundle import OneTaskSpec, PreprocessSpec, StoredArray, VectorTables

ONE_TASK = "one_task"
PATCHES, TASKS = "patches", "tasks"
LEFT, RIGHT, SCALE = "left.", "right.", "scale."

Outputs = dict[str, tuple[ir.Value, Sequence[int | str]]]


class OneTaskLayers(Layers):
    """Layers with the base's weights and the low-rank branches of one task for each set of m images, B = S*m."""

    def __init__(
        self,
        graph: Graph,
        spec: VisionSpec,
        base: Mapping[str, Tensor],
        bases: StackedBases,
        *,
        own_vectors: bool,
    ) -> None:
        super().__init__(graph, spec, base, "base.")
        self._bases = bases
        self._inputs: dict[str, ir.Value] = {}
        self._shapes: dict[int, ir.Value] = {}
        self._tasks = graph.input(TASKS, ir.DataType.INT64, ["S"])
        self._sets = graph.op("Shape", self._tasks)
        self._tables: dict[int, ir.Value] = {}
        self._rows = RowGather(graph, bases, self._tasks, self._table, axes=1)
        self._vectors: dict[str, ir.Value] = {}
        if own_vectors:
            sizes = vector_sizes(spec)
            rows = self._gathered("vectors", "T", sum(sizes.values()))
            rows = graph.op("Unsqueeze", rows, graph.integers(1))
            self._vectors = dict(zip(sizes, graph.split(rows, list(sizes.values()), axis=2), strict=True))

    def linear(self, name: str, x: ir.Value, rows: int, columns: slice | None = None) -> ir.Value:
        """`x W0^T + ((x VH^T) * s) U^T + b`."""
        graph, width = self.graph, self._params[name].shape
        left, right, scale = self._factors(name)
        weight, bias = self.transposed(name), self.parameter(bias_name(name))
        start, stop = 0, int(width[0])
        if columns is not None:
            start, stop = columns.start, columns.stop
            weight, left = self.take(weight, columns, axis=1), self.take(left, columns, axis=2)
            bias = self.take(bias, columns, axis=-1)
        y = self._by_set(graph.op("MatMul", x, weight), stop - start)
        h = graph.op("MatMul", self._by_set(x, int(width[1])), self._transposed(right))
        h = graph.op("Mul", h, scale)
        if self._vectors:  # the bias as one more direction: one sum less over every output
            left = graph.op("Concat", left, bias, axis=1)
            h = graph.op("Pad", h, graph.integers(0, 0, 0, 0, 0, 1), graph.scalar(1.0))
        y = graph.op("Add", y, graph.op("MatMul", h, left))
        y = y if self._vectors else graph.op("Add", y, bias)
        return graph.op("Reshape", y, graph.integers(-1, rows, stop - start))

    def patch_projection(self, patches: ir.Value) -> ir.Value:
        """`x W0^T + ((x VH^T) * s) U^T` for all sets at once: [B, N-1, 3*P*P] -> [B, N-1, D]."""
        graph, D = self.graph, self.spec.width
        left, right, scale = self._factors(CONV1)
        x = self._by_set(patches, int(self._bases.matrices[CONV1].vh.shape[2]))
        h = graph.op("Mul", graph.op("MatMul", x, self._transposed(right)), scale)
        delta = graph.op("MatMul", h, left)
        y = graph.op("Add", self._by_set(super().patch_projection(patches), D), delta)
        return graph.op("Reshape", y, graph.integers(-1, self.spec.tokens - 1, D))

    def parameter(self, name: str) -> ir.Value:
        """The base's, or of the vector parameters each set's own. [S, 1, P]"""
        return self._vectors[name] if name in self._vectors else super().parameter(name)

    def layer_norm(self, name: str, x: ir.Value) -> ir.Value:
        """With each set's scale and bias."""
        if not self._vectors:
            return super().layer_norm(name, x)
        y = super().layer_norm(name, self._by_set(x, self.spec.width))
        return self.graph.op("Reshape", y, self.graph.op("Shape", x))

    def positions(self) -> ir.Value:
        """Positions of each set's task, its class embedding in row 0. [S, N, D]"""
        graph, name, spec = self.graph, "positional_embedding", self.spec
        left, right, scale = self._factors(name)
        left = self._transposed(graph.op("Mul", left, self._transposed(scale)))
        table = graph.op("MatMul", left, right)  # [S, N, D]
        if not self._vectors:
            return graph.op("Add", table, super().positions())
        cls = graph.op(
            "Pad", self._vectors["class_embedding"], graph.integers(0, 0, 0, 0, spec.tokens - 1, 0)
        )
        return graph.op("Add", graph.op("Add", table, super().parameter(name)), cls)

    def with_positions(self, x: ir.Value) -> ir.Value:
        """[B, N, D] -> [B, N, D]."""
        graph, (N, D) = self.graph, (self.spec.tokens, self.spec.width)
        shape = graph.op("Concat", self._sets, graph.integers(-1, N, D), axis=0)
        table = graph.op("Unsqueeze", self.positions(), graph.integers(1))  # [S, 1, N, D]
        return graph.op(
            "Reshape", graph.op("Add", graph.op("Reshape", x, shape), table), graph.integers(-1, N, D)
        )

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj + ((x U) * s) VH`: proj is applied from the right, so its factors swap sides."""
        graph, name, E = self.graph, "proj", self.spec.embed_dim
        left, right, scale = self._factors(name)
        h = graph.op("MatMul", self._by_set(pooled, self.spec.width), self._transposed(left))
        delta = graph.op("MatMul", graph.op("Mul", h, scale), right)
        y = graph.op("Add", self._by_set(super().projection(pooled), E), delta)
        return graph.op("Reshape", y, graph.integers(-1, 1, E))

    def _gathered(self, name: str, *shape: int | str) -> ir.Value:
        """Rows of the sets' tasks out of a graph input [T, ..], which is declared when it is first needed."""
        if name not in self._inputs:
            stack = self.graph.input(name, ir.DataType.FLOAT, shape)
            self._inputs[name] = self.graph.op("Gather", stack, self._tasks, axis=0)
        return self._inputs[name]

    def _factors(self, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The sets' left and right bases and scales: [S, R, D_out], [S, R, D_in], [S, 1, R]

        To be called before other nodes are made of the layer's input: ONNX Runtime runs older nodes later, so these
        come just before their products, and not all layers' are held at once.
        """
        bases = self._bases.matrices[name]
        return (
            self._side(f"{LEFT}{name}", name, bases.u_t),
            self._side(f"{RIGHT}{name}", name, bases.vh),
            self._gathered(f"{SCALE}{name}", "T", 1, f"R.{name}"),
        )

    def _side(self, input_name: str, name: str, stored: StoredArray) -> ir.Value:
        place = self._bases.place(stored)
        if place is None:
            return self._gathered(input_name, "T", f"R.{name}", stored.shape[2])
        if input_name not in self._inputs:
            self._inputs[input_name] = self._rows.gather(stored, place)
        return self._inputs[input_name]

    def _table(self, index: int) -> ir.Value:
        if index not in self._tables:
            shape = self._bases.tables[index].shape
            self._tables[index] = self.graph.input(f"{BASES}{index}", ir.DataType.FLOAT, shape)
        return self._tables[index]

    def _transposed(self, value: ir.Value) -> ir.Value:
        return self.graph.op("Transpose", value, perm=[0, 2, 1])

    def _by_set(self, x: ir.Value, width: int) -> ir.Value:
        """[B, rows, width] -> [S, m*rows, width]."""
        if width not in self._shapes:
            self._shapes[width] = self.graph.op("Concat", self._sets, self.graph.integers(-1, width), axis=0)
        return self.graph.op("Reshape", x, self._shapes[width])


@dataclass(frozen=True)
class _Writer:
    """Writes the graphs of an artifact beside those of a bundle; they read the same weights."""

    artifact: Artifact
    weights: WeightsFile
    directory: Path
    bases: StackedBases
    tables: VectorTables | None
    preprocess: PreprocessSpec
    routes: bool

    def layers(self, graph: Graph) -> OneTaskLayers:
        """The layers of any tasks."""
        vision, own = self.artifact.info.vision, self.tables is not None
        return OneTaskLayers(graph, vision, self.artifact.base, self.bases, own_vectors=own)

    def write(self) -> OneTaskSpec:
        """The graphs of both passes, or of the second alone if the first has weights of its own."""
        info = self.artifact.info
        stops = stops_of(self.artifact) if self.routes else ()
        segments, routers, known = [], [], []
        for index, (start, stop) in enumerate(zip((0, *stops), stops, strict=False)):
            file, taps = self.segment(index, start, stop)
            known += taps
            segments.append(file)
            routers.append(self.router(index, stop, known))
        segments.append(self.rest(len(segments), stops[-1] if stops else 0))
        margin = 0.0 if info.calibration is None else info.calibration.stop_margin
        return OneTaskSpec(
            tuple(segments), self.patches(), self.tables, tuple(routers), margin, self.bases.tables
        )

    def segment(self, index: int, start: int, stop: int) -> tuple[str, list[Tap]]:
        """Blocks between two stops: the stream or the patches -> the stream and the features on the way."""
        graph, vision = Graph(f"{ONE_TASK}_{index}", self.weights), self.artifact.info.vision
        layers = self.layers(graph)
        features, stream = add_blocks(layers, self.artifact, self.start(layers, index, start), start, stop)
        outputs: Outputs = {stream_name(stop): (stream, ["B", self.rows(stop), vision.width])}
        outputs |= {feature_name(tap): (z, ["B", vision.width]) for tap, z in features.items()}
        return self.save(graph, outputs), list(features)

    def start(self, layers: OneTaskLayers, index: int, block: int) -> ir.Value:
        """What a segment begins with: the stream before a block, which the first segment makes of the patches."""
        if index:
            return self.stream(layers.graph, block)
        vision = self.artifact.info.vision
        shape: list[int | str] = ["B", vision.tokens - 1, vision.width]
        return tokens(layers, layers.graph.input(PATCHES, ir.DataType.FLOAT, shape))

    def patches(self) -> str:
        """Pixel values, and each task's own convolution [3*P*P, D] or its bases -> projected patches."""
        graph, vision = Graph(f"{ONE_TASK}_{PATCHES}", self.weights), self.artifact.info.vision
        images = add_image_input(graph, self.preprocess)
        if self.tables is not None and self.tables.conv1_bases is not None:
            layers = OneTaskLayers(graph, vision, self.artifact.base, self.bases, own_vectors=False)
            projected = layers.patch_projection(cut_patches(graph, vision, images))
            return self.save(graph, {PATCHES: (projected, ["B", vision.tokens - 1, vision.width])})
        side = 3 * vision.patch_size[0] * vision.patch_size[1]
        if self.tables is None:
            conv1 = Layers(graph, vision, self.artifact.base, "base.").patch_weight()
        else:
            conv1 = graph.input("conv1", ir.DataType.FLOAT, [side, vision.width])
        flat = graph.op("Reshape", cut_patches(graph, vision, images), graph.integers(-1, side))
        projected = graph.op(
            "Reshape", graph.op("MatMul", flat, conv1), graph.integers(-1, vision.tokens - 1, vision.width)
        )
        return self.save(graph, {PATCHES: (projected, ["B", vision.tokens - 1, vision.width])})

    def rows(self, block: int) -> int:
        """Tokens of the residual stream before a block."""
        info = self.artifact.info
        return 1 if block == info.vision.layers and info.router.token == "cls" else info.vision.tokens

    def router(self, index: int, stop: int, taps: Sequence[Tap]) -> str:
        """The stream and the features on the way -> residuals."""
        graph, info = Graph(f"{ONE_TASK}_router_{index}", self.weights), self.artifact.info
        stream = self.stream(graph, stop)
        given = {
            tap: graph.input(feature_name(tap), ir.DataType.FLOAT, ["B", info.vision.width]) for tap in taps
        }
        layers = Layers(graph, info.vision, self.artifact.base, "base.")
        residuals, unknown = add_router(layers, self.artifact, stop, given, stream)
        outputs: Outputs = {"residuals": (residuals, ["B", len(info.tasks)])}
        if unknown is not None:
            outputs["unknown"] = (unknown, ["B"])
        return self.save(graph, outputs)

    def rest(self, index: int, start: int) -> str:
        """The stream or the patches -> logits."""
        graph = Graph(f"{ONE_TASK}_{index}", self.weights)
        layers = self.layers(graph)
        feature = encode_rest(layers, start, self.start(layers, index, start))
        return self.save(graph, self.logits(add_heads(graph, feature, self.artifact.heads)))

    def stream(self, graph: Graph, block: int) -> ir.Value:
        shape: list[int | str] = ["B", self.rows(block), self.artifact.info.vision.width]
        return graph.input(stream_name(block), ir.DataType.FLOAT, shape)

    def logits(self, value: ir.Value) -> Outputs:
        return {"logits": (value, ["B", sum(len(task.classes) for task in self.artifact.info.tasks)])}

    def save(self, graph: Graph, outputs: Outputs) -> str:
        path = self.directory / f"{graph.name}.onnx"
        graph.save(path, outputs, mass_export.__version__)
        return path.name


def stream_name(block: int) -> str:
    """Name of the residual stream before a block."""
    return f"stream.{block}"


def feature_name(tap: Tap) -> str:
    """Name of a routing feature between the parts."""
    return f"z.{tap.layer}.{tap.site}"


def write_one_task(
    artifact: Artifact,
    weights: WeightsFile,
    directory: Path,
    bases: StackedBases,
    tables: VectorTables | None,
    preprocess: PreprocessSpec,
    *,
    routes: bool,
) -> OneTaskSpec:
    """Write the graphs beside the other two; they read the same weights.

    Args:
        artifact: of the bundle.
        weights: its weights file.
        directory: of the bundle.
        bases: stored in the weights file.
        tables: stored there, too; with a first pass on the base its own row comes last.
        preprocess: how images come in.
        routes: the graphs run the first pass, too; only if it runs on the base in the same precision.
    """
    return _Writer(artifact, weights, directory, bases, tables, preprocess, routes).write()
