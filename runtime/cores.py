"""Cores: the small matrices that turn stacked low-rank bases into the TSV-M merge of a set of tasks.

For a set with stacked bases `U [D_out, K*R]` and `VH [K*R, D_in]` the merge is `delta = U M VH` with the core
`M = (U^T U)^(-1/2) diag(S) (VH VH^T)^(-1/2)`, because the polar factor of U is `U (U^T U)^(-1/2)` (TSV-M:
Gargiulo et al., arXiv 2412.00081, section 4). A core depends on the set alone: it is computed once and kept.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import MatrixBases
from runtime.mapped_files import MappedFiles

# Singular directions below this share of the largest count as absent, as in the builder's dense merge.
RELATIVE_CUTOFF = 1e-4

Cores = Mapping[str, NDArray[np.float32]]


def _inverse_square_root(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """`gram^(-1/2)` by eigenvalues, those below the cutoff left out (a pseudo-inverse)."""
    eigenvalues, vectors = np.linalg.eigh(gram)
    kept = eigenvalues > RELATIVE_CUTOFF**2 * eigenvalues[-1]
    roots = np.where(kept, 1 / np.sqrt(np.where(kept, eigenvalues, 1)), 0)
    inverse: NDArray[np.float64] = (vectors * roots) @ vectors.T
    return inverse


def compute_core(
    u_t: Sequence[NDArray[np.floating[Any]]],
    s: Sequence[NDArray[np.floating[Any]]],
    vh: Sequence[NDArray[np.floating[Any]]],
) -> NDArray[np.float32]:
    """Core of one matrix for one set of K tasks.

    A single task needs no orthogonalisation: its core is `diag(s)` exactly. Zero rows (padding, zero deltas)
    contribute nothing. A direction that several tasks share is merged into one: the same task given twice has
    the delta of that task once.

    Args:
        u_t: transposed left bases of each task. K of [R, D_out]
        s: singular values. K of [R]
        vh: right bases. K of [R, D_in]

    Returns:
        core: [K*R, K*R] float32, computed in float64

    Example:
        Two tasks of rank 1 whose directions are orthogonal need no orthogonalisation:

        >>> import numpy as np
        >>> rows = np.eye(2)
        >>> compute_core([rows[:1], rows[1:]], [np.array([3.0]), np.array([2.0])], [rows[:1], rows[1:]])
        array([[3., 0.],
               [0., 2.]], dtype=float32)
    """
    scale = np.concatenate([np.asarray(part, np.float64) for part in s])
    if len(s) == 1 or not scale.any():
        return np.diag(scale.astype(np.float32))
    left = np.concatenate([np.asarray(part, np.float64) for part in u_t])  # [K*R, D_out]
    right = np.concatenate([np.asarray(part, np.float64) for part in vh])  # [K*R, D_in]
    core: NDArray[np.float64] = (_inverse_square_root(left @ left.T) * scale) @ _inverse_square_root(
        right @ right.T
    )
    return core.astype(np.float32)


def scaled_core(
    tasks: Sequence[int],
    u_t: NDArray[np.int8],
    s: NDArray[np.float32],
    vh: NDArray[np.int8],
    scales: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Core for bases in int8 steps: that of the widened bases, between the scales of their rows.

    Args:
        tasks: of the set, ascending.
        u_t: steps of the transposed left bases of all tasks. [T, R, D_out]
        s: singular values. [T, R]
        vh: steps of the right bases. [T, R, D_in]
        scales: of the rows of u_t and of vh. [T, R] each
    """
    left, right = ([scale[i] for i in tasks] for scale in scales)
    core = compute_core(
        [u_t[i] * scale[:, None] for i, scale in zip(tasks, left, strict=True)],
        [s[i] for i in tasks],
        [vh[i] * scale[:, None] for i, scale in zip(tasks, right, strict=True)],
    )
    scaled: NDArray[np.float32] = np.concatenate(left)[:, None] * core * np.concatenate(right)
    return scaled


def stacked_cores(sets: Sequence[tuple[int, ...]], cores: CoreCache) -> dict[str, NDArray[np.float32]]:
    """Cores of several sets as inputs of the second pass.

    Args:
        sets: task indices of each set, ascending; all of one size.
        cores: computes or remembers them.

    Returns:
        input name -> cores. [S, K*R, K*R] float32
    """
    found = [cores.get(tasks) for tasks in sets]
    return {name: np.stack([core[name] for core in found]) for name in found[0]}


class CoreCache:
    """The cores of the sets seen last, at most `max_sets` of them. Thread-safe.

    A set that several threads ask for at once is computed once. Bases are read through a memory map, and only
    those of the set's tasks. One set of K tasks costs `4 (K R)^2` bytes per matrix.
    """

    def __init__(self, directory: Path, matrices: Sequence[MatrixBases], max_sets: int) -> None:
        files = MappedFiles(directory)
        self._bases = {
            matrix.core: tuple(files.array(array) for array in (matrix.u_t, matrix.s, matrix.vh))
            for matrix in matrices
        }
        self._scales = {
            matrix.core: (files.array(matrix.u_scale), files.array(matrix.vh_scale))
            for matrix in matrices
            if matrix.u_scale is not None and matrix.vh_scale is not None
        }
        self._max_sets = max_sets
        self._cores: OrderedDict[tuple[int, ...], Future[Cores]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._cores)

    def get(self, tasks: tuple[int, ...]) -> Cores:
        """Cores of a set.

        Args:
            tasks: task indices, ascending.

        Returns:
            name of the second-pass input -> core [K*R, K*R] float32, read-only.
        """
        with self._lock:
            future = self._cores.get(tasks)
            missed = future is None
            if future is None:
                future = self._cores[tasks] = Future()
            self._cores.move_to_end(tasks)
            while len(self._cores) > self._max_sets:
                self._cores.popitem(last=False)
        if missed:
            try:
                future.set_result(self._compute(tasks))
            except BaseException as error:
                with self._lock:  # the next caller tries again
                    if self._cores.get(tasks) is future:
                        del self._cores[tasks]
                future.set_exception(error)
                raise
        return future.result()

    def _compute(self, tasks: tuple[int, ...]) -> Cores:
        cores = {}
        for name, (u_t, s, vh) in self._bases.items():
            if name in self._scales:  # int8: the graph multiplies bare steps, so that cores carry the scales
                core = scaled_core(tasks, u_t, s, vh, self._scales[name])
            else:
                core = compute_core([u_t[i] for i in tasks], [s[i] for i in tasks], [vh[i] for i in tasks])
            core.flags.writeable = False
            cores[name] = core
        return cores
