"""The second pass: pixel values and a task set per sample -> logits of every head.

One static graph serves every set. For a set Omega of K tasks the merged delta of a matrix is
`U_Omega M_Omega VH_Omega` (MASS.md section 4): the stacked bases of all tasks are constants, the graph gathers
the K slices that `slots` names, and the small core M_Omega is an input. What is not selected is not read.

Inputs beside `pixel_values [B, 3, H, W]`:

    slots          task indices of the sets, ascending. [S, K] int64
    weights        weight of each slot, see below. [S, K] float32
    cores.<name>   compose=tsvm only: M_Omega of each matrix. [S, K*R, K*R] float32

S is B (a set per sample) or 1 (one set for the whole batch: slices are gathered once and broadcast).
`weights` are 1/K with compose=tsvm, where they average the vector parameters' deltas. With compose=sum they scale
the matrices' deltas (1/K or the set's gates), whose core is then `diag(w_k s_k)` and needs no input; vector
parameters take the plain mean over the slots. Ranks that differ between tasks are padded with zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, TaskFactors
from mass_export.factor_storage import patch_rank
from mass_export.graph import Graph
from mass_export.heads import Head
from mass_export.low_rank import LowRank, factorize
from mass_export.spec import MergeSettings, VisionSpec
from mass_export.stacked_bases import BASES, SIDES, RowGather, StackedBases
from mass_export.vit_graph import Layers, bias_name, encode
from mass_export.weights_file import WeightsFile
from runtime.bundle import MatrixBases, StoredArray, VectorTables

CORE_PREFIX = "cores."
CONV1 = "conv1.weight"
# Relative to the delta: what float32 leaves of factors that were multiplied and taken apart again.
LOW_RANK_TOLERANCE = 1e-5


def all_factors(artifact: Artifact) -> dict[str, list[LowRank]]:
    """Every task's factors by parameter: of the matrices, and of the patch convolution where bundles keep it so."""
    tasks = artifact.tasks
    factors = {name: [task.matrices[name] for task in tasks] for name in artifact.info.vision.matrix_names()}
    if artifact.info.merge.vectors == "mean" and artifact.storage.patch_embed == "low_rank":
        patches = [found for task in tasks if (found := _patch_factors(task)) is not None]
        if len(patches) == len(tasks):
            factors[CONV1] = patches
    return factors


def core_name(parameter: str) -> str:
    """Input of the second pass for a parameter's cores; the patch convolution takes the mean of a set's deltas."""
    return "" if parameter == CONV1 else CORE_PREFIX + parameter


def _patch_factors(task: TaskFactors) -> LowRank | None:
    """What a task changes of the patch convolution as factors [D, 3*P*P], None if it takes more than it may."""
    delta = task.vectors[CONV1].double().flatten(1)
    factors = factorize(delta, min(*delta.shape, patch_rank(f.rank for f in task.matrices.values())))
    lost = float((factors.delta() - delta).norm())
    return factors.to(torch.float32) if lost <= LOW_RANK_TOLERANCE * float(delta.norm()) else None


def vector_sizes(spec: VisionSpec) -> dict[str, int]:
    """The 1-D parameters and their sizes, in the order of their table's columns."""
    return {name: shape[0] for name, shape in spec.parameter_shapes().items() if len(shape) == 1}


def store_vectors(
    weights: WeightsFile,
    spec: VisionSpec,
    base: Mapping[str, Tensor],
    tasks: Sequence[TaskFactors],
    *,
    with_base: bool,
    conv1_bases: MatrixBases | None = None,
) -> VectorTables:
    """The vector parameters of every task's own model, base and delta added up, into the weights file.

    The weights of a set add up to one, so the mean of these is the base plus the mean delta.

    Args:
        weights: where to.
        spec: of the tower.
        base: its parameters.
        tasks: whose models.
        with_base: a last row with the base's own.
        conv1_bases: what the tasks change of the patch convolution, where that is kept as bases.
    """

    def value(task: TaskFactors | None, name: str) -> NDArray[np.float32]:
        if task is None:
            return base[name].float().numpy()
        return (base[name].double() + task.vectors[name].double()).float().numpy()

    models = [*tasks, None] if with_base else [*tasks]
    rows = [np.concatenate([value(model, name) for name in vector_sizes(spec)]) for model in models]
    if conv1_bases is not None:
        return VectorTables(weights.add(np.stack(rows)), conv1_bases=conv1_bases)
    conv1 = [value(model, CONV1).reshape(spec.width, -1).T for model in models]  # [3*P*P, D] each
    return VectorTables(weights.add(np.stack(rows)), weights.add(np.stack(conv1)))


class AdaptiveLayers(Layers):
    """Layers whose weights are the base plus each sample's merged delta."""

    def __init__(
        self,
        graph: Graph,
        spec: VisionSpec,
        base: Mapping[str, Tensor],
        settings: MergeSettings,
        bases: StackedBases,
        tables: VectorTables | None,
    ) -> None:
        super().__init__(graph, spec, base, "base.")
        self._settings = settings
        self._bases = bases.matrices
        self._slots = graph.input("slots", ir.DataType.INT64, ["S", "K"])
        self._weights = graph.input("weights", ir.DataType.FLOAT, ["S", "K"])
        self._cores: dict[str, ir.Value] = {}
        if settings.compose == "tsvm":
            for name, stored in self._bases.items():
                if not stored.core:
                    continue
                side = f"K*{stored.vh.shape[1]}"
                self._cores[name] = graph.input(stored.core, ir.DataType.FLOAT, ["S", side, side])
        tables_of = [graph.stored_weight(f"{BASES}{i}", table) for i, table in enumerate(bases.tables)]
        rows = RowGather(graph, bases, self._slots, tables_of.__getitem__)
        self._slices = {
            (name, side): self._gather_bases(rows, f"{BASES}{name}.{side}", getattr(stored, side))
            for name, stored in self._bases.items()
            for side in SIDES
        }
        rows.finish()
        self._tables = tables
        self._values = self._gather_vectors() if tables is not None else {}

    def linear(self, name: str, x: ir.Value, columns: slice | None = None) -> ir.Value:
        """`x W0^T + ((x VH^T) M^T) U^T + b`, where M acts from the left in `U M VH`."""
        graph = self.graph
        weight = self.transposed(name)
        y = graph.op("MatMul", x, weight if columns is None else self.take(weight, columns, axis=1))
        h = graph.op("MatMul", x, self._transpose(self._right(name)))  # [B, N, K*R]
        h = self._apply_core_transposed(name, h)
        u_t = self._left(name)
        bias = self._values[bias_name(name)] if self._values else self.parameter(bias_name(name))
        if columns is not None:
            u_t = self.take(u_t, columns, axis=2)
            bias = self.take(bias, columns, axis=-1)
        return graph.op("Add", graph.op("Add", y, graph.op("MatMul", h, u_t)), bias)

    def layer_norm(self, name: str, x: ir.Value) -> ir.Value:
        """LayerNorm with the set's scale and bias."""
        if not self._values:
            return super().layer_norm(name, x)
        graph = self.graph
        ones = graph.weight("ones", np.ones(self.spec.width, dtype=np.float32))
        x = graph.op("LayerNormalization", x, ones, axis=-1, epsilon=self.spec.layer_norm_eps)
        scaled = graph.op("Mul", x, self._values[f"{name}.weight"])
        return graph.op("Add", scaled, self._values[f"{name}.bias"])

    def patch_projection(self, patches: ir.Value) -> ir.Value:
        """conv1 with the set's weight, which each task has in full, or as bases beside the base's."""
        if self._tables is None:
            return super().patch_projection(patches)
        graph = self.graph
        if self._tables.conv1 is None:
            h = graph.op("MatMul", patches, self._transpose(self._right(CONV1)))
            delta = graph.op("MatMul", graph.op("Mul", h, self._shares_of(CONV1)), self._left(CONV1))
            return graph.op("Add", super().patch_projection(patches), delta)
        table = graph.stored_weight("vectors.conv1.weight.T", self._tables.conv1)
        mean = self._mean_over_slots(graph.op("Reshape", table, graph.integers(0, -1)))  # [S, 1, 3*P*P*D]
        weight = graph.op("Reshape", mean, graph.integers(0, -1, self.spec.width))  # [S, 3*P*P, D]
        return graph.op("MatMul", patches, weight)

    def positions(self) -> ir.Value:
        """Base table plus the low-rank delta of the positions, plus the class embedding's in row 0. [S, N, D]"""
        graph, name = self.graph, "positional_embedding"
        left = self._transpose(self._left(name))  # [S, N, K*R]
        table = graph.op("MatMul", self._apply_core(name, left), self._right(name))
        if not self._values:
            return graph.op("Add", table, super().positions())
        table = graph.op("Add", table, self.parameter(name))
        cls = self._values["class_embedding"]  # [S, 1, D]
        return graph.op(
            "Add", table, graph.op("Pad", cls, graph.integers(0, 0, 0, 0, self.spec.tokens - 1, 0))
        )

    def projection(self, pooled: ir.Value) -> ir.Value:
        """`x proj + ((x U) M) VH`: proj is applied from the right, so its factors swap sides."""
        graph, name = self.graph, "proj"
        h = graph.op("MatMul", pooled, self._transpose(self._left(name)))
        delta = graph.op("MatMul", self._apply_core(name, h), self._right(name))
        return graph.op("Add", super().projection(pooled), delta)

    def _left(self, name: str) -> ir.Value:
        """Gathered U^T. [S, K*R, D_out]"""
        return self._slices[name, "u_t"]

    def _right(self, name: str) -> ir.Value:
        """Gathered VH. [S, K*R, D_in]"""
        return self._slices[name, "vh"]

    def _gather_bases(self, rows: RowGather, initializer: str, stored: StoredArray) -> ir.Value:
        if (gathered := rows.gather(stored)) is not None:
            return gathered
        graph = self.graph
        with graph.section("gathers"):
            stack = graph.stored_weight(initializer, stored)
            slices = graph.op("Gather", stack, self._slots, axis=0)  # [S, K, R, D]
            return graph.op("Reshape", slices, graph.integers(0, -1, stored.shape[2]))

    def _apply_core(self, name: str, h: ir.Value) -> ir.Value:
        """`h M`: [.., K*R] -> [.., K*R]."""
        if name in self._cores:
            return self.graph.op("MatMul", h, self._cores[name])
        return self._scale(name, h)

    def _apply_core_transposed(self, name: str, h: ir.Value) -> ir.Value:
        """`h M^T`."""
        if name in self._cores:
            return self.graph.op("MatMul", h, self._transpose(self._cores[name]))
        return self._scale(name, h)

    def _scale(self, name: str, h: ir.Value) -> ir.Value:
        """compose=sum: the core is diagonal, `w_k s_k`."""
        graph = self.graph
        s = graph.op(
            "Gather", graph.stored_weight(f"bases.{name}.s", self._bases[name].s), self._slots, axis=0
        )
        s = graph.op("Mul", s, graph.op("Unsqueeze", self._weights, graph.integers(2)))  # [S, K, R]
        return graph.op("Mul", h, graph.op("Reshape", s, graph.integers(0, 1, -1)))

    def _shares_of(self, name: str) -> ir.Value:
        """`s_k / K`, for the mean of a set's deltas. [S, 1, K*R]"""
        graph = self.graph
        s = graph.op(
            "Gather", graph.stored_weight(f"bases.{name}.s", self._bases[name].s), self._slots, axis=0
        )
        count = graph.op("Cast", graph.op("Shape", self._slots, start=1), to=int(ir.DataType.FLOAT))  # K
        return graph.op("Reshape", graph.op("Div", s, count), graph.integers(0, 1, -1))

    def _transpose(self, value: ir.Value) -> ir.Value:
        return self.graph.op("Transpose", value, perm=[0, 2, 1])

    def _mean_over_slots(self, table: ir.Value) -> ir.Value:
        """Rows of a table [T, P], combined over each set: -> [S, 1, P]."""
        graph = self.graph
        gathered = graph.op("Gather", table, self._slots, axis=0)  # [S, K, P]
        if self._settings.compose == "sum":
            return graph.op("ReduceMean", gathered, graph.integers(1), keepdims=1)
        return graph.op("MatMul", graph.op("Unsqueeze", self._weights, graph.integers(1)), gathered)

    def _gather_vectors(self) -> dict[str, ir.Value]:
        """All 1-D parameters of the sets: one gather, one weighted mean, one split. [S, 1, P] each"""
        graph = self.graph
        assert self._tables is not None
        mean = self._mean_over_slots(graph.stored_weight("vectors", self._tables.vectors))
        sizes = vector_sizes(self.spec)
        return dict(zip(sizes, graph.split(mean, list(sizes.values()), axis=2), strict=True))


def add_second_pass(layers: Layers, heads: Sequence[Head], pixel_values: ir.Value) -> ir.Value:
    """Add the nodes of the second pass: -> logits [B, sum C_i], tasks in order."""
    return add_heads(layers.graph, encode(layers, pixel_values), heads)


def add_heads(graph: Graph, feature: ir.Value, heads: Sequence[Head]) -> ir.Value:
    """Every head on a normalised feature: [B, E] -> logits [B, sum C_i]."""
    weight = np.concatenate([head.weight.float().numpy() for head in heads])
    logits = graph.op("MatMul", feature, graph.weight("heads.weight.T", weight.T))
    if all(head.bias is None for head in heads):
        return logits
    return graph.op("Add", logits, graph.weight("heads.bias", head_biases(heads)))


def head_biases(heads: Sequence[Head]) -> NDArray[np.float32]:
    """All biases in task order, zero where a head has none. [sum C_i]"""
    parts = [
        h.bias.float().numpy() if h.bias is not None else np.zeros(h.weight.shape[0], np.float32)
        for h in heads
    ]
    return np.concatenate(parts).astype(np.float32)
