"""Low-rank bases of all tasks in the weights file, and how a graph gathers those of a few tasks.

What belongs to a task lies together: a system that maps the file in large pages brings in that task and hardly more,
and reading it from a disk is one stretch. A side [R, D] of a matrix, D a multiple of the tower's width W, is R*D/W rows
of W; a table [T*n, W] has the n rows of the first task, then those of the second. A graph reads rows
`task * n + first, ..`. Sides of other widths are arrays [T, R, D] of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.graph import Graph
from mass_export.low_rank import LowRank
from mass_export.progress import Progress
from mass_export.weights_file import WeightsFile
from runtime.bundle import MatrixBases, StoredArray

# TensorRT takes no larger tensor.
MAX_ELEMENTS = 2**31 - 1
Side = Literal["u_t", "vh"]
SIDES: tuple[Side, ...] = ("u_t", "vh")
# What the names of bases in a graph begin with: of tables, and of sides that are arrays of their own.
BASES = "bases."


@dataclass(frozen=True)
class Place:
    """Where a side lies in a table.

    Attributes:
        table: index.
        first: its first row, counted from that of the task.
        rows: how many it has.
    """

    table: int
    first: int
    rows: int


@dataclass(frozen=True)
class StackedBases:
    """Stored bases.

    Attributes:
        matrices: by parameter.
        tables: the rows of all tasks. [T*n, W] each
    """

    matrices: Mapping[str, MatrixBases]
    tables: tuple[StoredArray, ...]

    def place(self, side: StoredArray) -> Place | None:
        """Where it lies, None if it is an array of its own."""
        return place_in(self.tables, side)


def place_in(tables: Sequence[StoredArray], side: StoredArray) -> Place | None:
    """Where a side [T, R, D] lies in one of the tables, None if it is an array of its own."""
    for index, table in enumerate(tables):
        start, share = side.offset - table.offset, table.nbytes // side.shape[0]
        if side.stride is not None and side.file == table.file and 0 <= start < share:
            return Place(index, start // table.entry_nbytes, side.entry_nbytes // table.entry_nbytes)
    return None


def moved(side: StoredArray, old: Sequence[StoredArray], new: Sequence[StoredArray]) -> StoredArray:
    """The same side in tables of the same rows, of another type or in another file.

    Args:
        side: lies in one of the old tables.
        old: tables.
        new: their counterparts.
    """
    place = place_in(old, side)
    assert place is not None
    table = new[place.table]
    return _side_of(table, place.first, side.shape)


def _side_of(table: StoredArray, first: int, shape: tuple[int, ...]) -> StoredArray:
    offset = table.offset + first * table.entry_nbytes
    return StoredArray(table.file, offset, table.dtype, shape, table.nbytes // shape[0])


def store_bases(
    weights: WeightsFile,
    factors: Mapping[str, Sequence[LowRank]],
    cores: Mapping[str, str],
    width: int,
    progress: Progress,
) -> StackedBases:
    """Stack the factors of each matrix over the tasks, padded with zeros to the largest rank, into the weights file.

    Args:
        weights: where to.
        factors: by parameter, of every task.
        cores: input of the second pass for each parameter's cores.
        width: of the tower, W.
        progress: where to show it.
    """
    stacks = {name: _Stack(of_tasks) for name, of_tasks in factors.items()}
    sides: dict[tuple[str, Side], StoredArray] = {}
    tables = []
    for held in _shares(stacks, width):
        tables.append(_store_table(weights, stacks, held, width, progress))
        first = 0
        for name, side in held:
            sides[name, side] = _side_of(tables[-1], first, stacks[name].shape(side))
            first += stacks[name].rows(side, width)
    for name, stack in stacks.items():
        for side in SIDES:
            if (name, side) not in sides:
                sides[name, side] = weights.add(np.stack([stack.padded(side, i) for i in range(stack.tasks)]))
    matrices = {
        name: MatrixBases(
            name, cores[name], stack.ranks, sides[name, "u_t"], weights.add(stack.values()), sides[name, "vh"]
        )
        for name, stack in stacks.items()
    }
    return StackedBases(matrices, tuple(tables))


def _store_table(
    weights: WeightsFile,
    stacks: Mapping[str, _Stack],
    held: Sequence[tuple[str, Side]],
    width: int,
    progress: Progress,
) -> StoredArray:
    """The given sides, task by task. [T*n, W]"""
    tasks = next(iter(stacks.values())).tasks
    rows = sum(stacks[name].rows(side, width) for name, side in held)
    parts = (
        stacks[name].padded(side, task)
        for task in progress.track(range(tasks), "Stacking bases")
        for name, side in held
    )
    return weights.add_parts(parts, np.dtype(np.float32), (tasks * rows, width))


class _Stack:
    """One matrix' factors of all tasks."""

    def __init__(self, factors: Sequence[LowRank]) -> None:
        self._factors = factors
        self.tasks = len(factors)
        self.ranks = tuple(f.rank for f in factors)

    def shape(self, side: Side) -> tuple[int, int, int]:
        first = self._factors[0]
        return self.tasks, max(self.ranks), first.u.shape[0] if side == "u_t" else first.vh.shape[1]

    def rows(self, side: Side, width: int) -> int:
        _, R, D = self.shape(side)
        return R * D // width if D % width == 0 else 0

    def padded(self, side: Side, task: int) -> NDArray[np.float32]:
        factors, (_, R, D) = self._factors[task], self.shape(side)
        rows = np.zeros((R, D), np.float32)
        rows[: factors.rank] = factors.u.numpy().T if side == "u_t" else factors.vh.numpy()
        return rows

    def values(self) -> NDArray[np.float32]:
        s = np.zeros((self.tasks, max(self.ranks)), np.float32)
        for row, factors in zip(s, self._factors, strict=True):
            row[: factors.rank] = factors.s.numpy()
        return s


def _shares(stacks: Mapping[str, _Stack], width: int) -> Iterator[list[tuple[str, Side]]]:
    """The sides that go into each table."""
    held: list[tuple[str, Side]] = []
    elements = 0
    for name, stack in stacks.items():
        for side in SIDES:
            size = stack.tasks * stack.rows(side, width) * width
            if not size:
                continue
            if elements + size > MAX_ELEMENTS and held:
                yield held
                held, elements = [], 0
            held.append((name, side))
            elements += size
    if held:
        yield held


class RowGather:
    """Gathers sides out of tables in a graph, for the sets that it was made with.

    Which rows that takes is found in a few nodes, for all sides at once: `finish` adds them.
    """

    def __init__(
        self,
        graph: Graph,
        bases: StackedBases,
        tasks: ir.Value,
        table: Callable[[int], ir.Value],
        some: ir.Value | None = None,
    ) -> None:
        """Prepare.

        Args:
            graph: of the nodes.
            bases: what lies where.
            tasks: indices. [S, K], or with `some` [S]
            table: gives the value of a table [T*n, W] in the graph.
            some: 1, or 0 if these are no tasks, so that sides have no rows, see `are_tasks`. [1]
        """
        self._graph = graph
        self._bases = bases
        self._tasks = tasks
        self._table = table
        self._some = some
        self._wanted: dict[int, list[tuple[Place, ir.Value]]] = {}
        self._shares: dict[int, int] = {}

    def gather(self, side: StoredArray) -> ir.Value | None:
        """Rows of the sets' tasks, None if the side lies in no table: [S, R, D], or of [S, K] tasks [S, K*R, D]."""
        graph, place = self._graph, self._bases.place(side)
        if place is None:
            return None
        table = self._bases.tables[place.table]
        numbers = ir.val(f"rows.{place.table}.{place.first}")
        self._wanted.setdefault(place.table, []).append((place, numbers))
        self._shares[place.table] = table.shape[0] // side.shape[0]
        with graph.section("gathers"):
            rows = graph.op("Gather", self._table(place.table), numbers, axis=0)  # [.., rows, W]
            if self._some is not None and side.shape[2] == table.shape[1]:
                return rows
            return graph.op("Reshape", rows, graph.integers(0, -1, side.shape[2]))

    def finish(self) -> None:
        """Number the rows of all sides that were gathered: `task * n + first, ..`. [S, rows] or [S, K, rows] each"""
        graph, axis = self._graph, 2 if self._some is None else 1
        for index, wanted in self._wanted.items():
            places, parts = zip(*wanted, strict=True)
            within = np.concatenate([place.first + np.arange(place.rows, dtype=np.int64) for place in places])
            with graph.section("indices"):
                starts = graph.op("Mul", self._tasks, graph.integers(self._shares[index]))
                starts = graph.op("Unsqueeze", starts, graph.integers(axis))
                numbers = graph.op("Add", starts, graph.constant(within, name=f"rows.{index}"))
                split_some(graph, numbers, [place.rows for place in places], parts, axis, self._some)


def are_tasks(graph: Graph, tasks: ir.Value) -> ir.Value:
    """1, or 0 if the first index is -1: [S] -> [1]"""
    zero = graph.integers(0)
    first = graph.op("Slice", tasks, zero, graph.integers(1), zero)
    return graph.op("Cast", graph.op("GreaterOrEqual", first, zero), to=int(ir.DataType.INT64))


def split_some(
    graph: Graph,
    value: ir.Value,
    sizes: Sequence[int],
    parts: Sequence[ir.Value],
    axis: int,
    some: ir.Value | None,
) -> None:
    """Split along an axis into values that are at hand; where `some` [1] is 0 they are empty."""
    wanted = graph.integers(*sizes)
    if some is not None:
        end = graph.op("Mul", some, graph.integers(sum(sizes)))
        value = graph.op("Slice", value, graph.integers(0), end, graph.integers(axis))
        wanted = graph.op("Mul", wanted, some)
    graph.split_into(value, wanted, parts, axis)
