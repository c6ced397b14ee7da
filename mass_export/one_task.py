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
from mass_export.stacked_bases import RowGather, StackedBases, are_tasks
from mass_export.vit_graph import Layers, bias_name, cut_patches, encode_rest, tokens
from mass_export.weights_file import WeightsFile
from runtime.bundle import OneTaskSpec, PreprocessSpec, StoredArray, VectorTables

ONE_TASK = "one_task"
PATCHES, TASKS = "patches", "tasks"
LEFT, RIGHT, SCALES = "left.", "right.", "scales"

Outputs = dict[str, tuple[ir.Value, Sequence[int | str]]]


class OneTaskLayers(Layers):
    """Layers with the base's weights and the low-rank branches of one task for each set of m images, B = S*m.

    They hold all tokens of a set in one: [S, m*rows, D], so that nothing but attention needs another shape.
    """

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
        self._tasks = graph.input(TASKS, ir.DataType.INT64, ["S"])
        self._sets = graph.op("Shape", self._tasks)
        self._tables: dict[int, ir.Value] = {}
        self._rows = RowGather(graph, bases, self._tasks, self._table, axes=1)
        self._vectors: dict[str, ir.Value] = {}
        self._scales = self._all_scales()
        self._held = graph.op("Concat", self._sets, graph.integers(-1, spec.width), axis=0)
        if own_vectors:
            sizes = vector_sizes(spec)
            rows = self._gathered("vectors", "T", sum(sizes.values()))
            rows = graph.op("Unsqueeze", rows, graph.integers(1))
            self._vectors = dict(zip(sizes, graph.split(rows, list(sizes.values()), axis=2), strict=True))

    def held_shape(self, rows: int) -> ir.Value:
        """[S, m*rows, D]."""
        del rows
        return self._held

    def held(self, x: ir.Value) -> ir.Value:
        """[B, rows, D] -> [S, m*rows, D]."""
        return self.graph.op("Reshape", x, self._held)

    def by_image(self, x: ir.Value, rows: int) -> ir.Value:
        """[S, m*rows, D] -> [B, rows, D]."""
        return self.graph.op("Reshape", x, self.graph.integers(-1, rows, self.spec.width))

    def linear(self, name: str, x: ir.Value, columns: slice | None = None) -> ir.Value:
        """`x W0^T + ((x VH^T) * s) U^T + b`."""
        graph = self.graph
        left, right, scale = self._factors(name)
        weight, bias = self.transposed(name), self.parameter(bias_name(name))
        if columns is not None:
            weight, left = self.take(weight, columns, axis=1), self.take(left, columns, axis=2)
            bias = self.take(bias, columns, axis=-1)
        y = graph.op("MatMul", x, weight)
        h = graph.op("MatMul", x, self._transposed(right))
        h = graph.op("Mul", h, scale)
        if self._vectors:  # the bias as one more direction: one sum less over every output
            left = graph.op("Concat", left, bias, axis=1)
            h = graph.op("Pad", h, graph.integers(0, 0, 0, 0, 0, 1), graph.scalar(1.0))
        y = graph.op("Add", y, graph.op("MatMul", h, left))
        return y if self._vectors else graph.op("Add", y, bias)

    def patch_projection(self, patches: ir.Value) -> ir.Value:
        """`x W0^T + ((x VH^T) * s) U^T` for all sets at once: [B, N-1, 3*P*P] -> [B, N-1, D]."""
        graph, D = self.graph, self.spec.width
        left, right, scale = self._factors(CONV1)
        side = int(self._bases.matrices[CONV1].vh.shape[2])
        by_set = graph.op("Concat", self._sets, graph.integers(-1, side), axis=0)
        x = graph.op("Reshape", patches, by_set)
        h = graph.op("Mul", graph.op("MatMul", x, self._transposed(right)), scale)
        delta = graph.op("MatMul", h, left)
        y = graph.op("Add", self.held(super().patch_projection(patches)), delta)
        return graph.op("Reshape", y, graph.integers(-1, self.spec.tokens - 1, D))

    def parameter(self, name: str) -> ir.Value:
        """The base's, or of the vector parameters each set's own. [S, 1, P]"""
        return self._vectors[name] if name in self._vectors else super().parameter(name)

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
        """[B, N, D] -> [S, m*N, D]."""
        graph, (N, D) = self.graph, (self.spec.tokens, self.spec.width)
        shape = graph.op("Concat", self._sets, graph.integers(-1, N, D), axis=0)
        table = graph.op("Unsqueeze", self.positions(), graph.integers(1))  # [S, 1, N, D]
        return self.held(graph.op("Add", graph.op("Reshape", x, shape), table))

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj + ((x U) * s) VH`: proj is applied from the right, so its factors swap sides."""
        graph = self.graph
        left, right, scale = self._factors("proj")
        h = graph.op("MatMul", pooled, self._transposed(left))
        delta = graph.op("MatMul", graph.op("Mul", h, scale), right)
        return graph.op("Add", super().projection(pooled), delta)

    def _gathered(self, name: str, *shape: int | str) -> ir.Value:
        """Rows of the sets' tasks out of a graph input [T, ..], which is declared when it is first needed."""
        if name not in self._inputs:
            stack = self.graph.input(name, ir.DataType.FLOAT, shape)
            with self.graph.section("gathers"):
                self._inputs[name] = self.graph.op("Gather", stack, self._tasks, axis=0)
        return self._inputs[name]

    def _factors(self, name: str) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The sets' left and right bases and scales: [S, R, D_out], [S, R, D_in], [S, 1, R]"""
        bases = self._bases.matrices[name]
        return (
            self._side(f"{LEFT}{name}", name, bases.u_t),
            self._side(f"{RIGHT}{name}", name, bases.vh),
            self._scales[name],
        )

    def _all_scales(self) -> dict[str, ir.Value]:
        """The sets' scales: one gather, one split. [S, 1, R] each"""
        graph = self.graph
        ranks = [matrix.s.shape[1] for matrix in self._bases.matrices.values()]
        rows = graph.op(
            "Gather", graph.input(SCALES, ir.DataType.FLOAT, ["T", 1, sum(ranks)]), self._tasks, axis=0
        )
        some = are_tasks(graph, self._tasks)
        end, axis = graph.op("Mul", some, graph.integers(sum(ranks))), graph.integers(2)
        rows = graph.op("Slice", rows, graph.integers(0), end, axis)
        scales = {name: ir.val(f"scale.{name}") for name in self._bases.matrices}
        graph.split_into(rows, graph.op("Mul", graph.integers(*ranks), some), list(scales.values()), axis=2)
        return scales

    def finish(self) -> None:
        """Add what is known only when all other nodes are there."""
        self._rows.finish()

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
        layers.finish()
        return self.save(graph, outputs), list(features)

    def start(self, layers: OneTaskLayers, index: int, block: int) -> ir.Value:
        """What a segment begins with: the stream before a block, which the first segment makes of the patches.

        As layers hold it.
        """
        if index:
            return layers.held(self.stream(layers.graph, block))
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
            layers.finish()
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
        feature = encode_rest(layers, start, self.start(layers, index, start), self.rows(start))
        logits = add_heads(graph, feature, self.artifact.heads)
        layers.finish()
        return self.save(graph, self.logits(logits))

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
