"""Layers of the one-task graphs: the base's weights beside low-rank branches that are gathered out of graph inputs.

See `mass_export.one_task` for what they are put together to, and `runtime.bundle.OneTaskSpec` for the inputs.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
from torch import Tensor

from mass_export.graph import Graph
from mass_export.second_pass import CONV1, vector_sizes
from mass_export.spec import VisionSpec
from mass_export.stacked_bases import BASES, RowGather, StackedBases, are_tasks, split_some
from mass_export.vit_graph import Layers, bias_name
from runtime.bundle import StoredArray

TASKS = "tasks"
LEFT, RIGHT, SCALES = "left.", "right.", "scales"


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
        with graph.section("indices"):
            some = are_tasks(graph, self._tasks)
        self._rows = RowGather(graph, bases, self._tasks, self._table, some)
        self._vectors: dict[str, ir.Value] = {}
        self._scales = self._all_scales(some)
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

    def _all_scales(self, some: ir.Value) -> dict[str, ir.Value]:
        """The sets' scales: one gather, one split. [S, 1, R] each"""
        graph = self.graph
        ranks = [matrix.s.shape[1] for matrix in self._bases.matrices.values()]
        rows = graph.op(
            "Gather", graph.input(SCALES, ir.DataType.FLOAT, ["T", 1, sum(ranks)]), self._tasks, axis=0
        )
        scales = {name: ir.val(f"scale.{name}") for name in self._bases.matrices}
        split_some(graph, rows, ranks, list(scales.values()), 2, some)
        return scales

    def finish(self) -> None:
        """Add what is known only when all other nodes are there."""
        self._rows.finish()

    def _side(self, input_name: str, name: str, stored: StoredArray) -> ir.Value:
        if input_name not in self._inputs:
            rows = self._rows.gather(stored)
            if rows is None:
                return self._gathered(input_name, "T", f"R.{name}", stored.shape[2])
            self._inputs[input_name] = rows
        return self._inputs[input_name]

    def _table(self, index: int) -> ir.Value:
        if index not in self._tables:
            shape = self._bases.tables[index].shape
            self._tables[index] = self.graph.input(f"{BASES}{index}", ir.DataType.FLOAT, shape)
        return self._tables[index]

    def _transposed(self, value: ir.Value) -> ir.Value:
        return self.graph.op("Transpose", value, perm=[0, 2, 1])
