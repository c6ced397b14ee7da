"""How the tasks' low-rank bases lie to each other: overlap of pairs, conditioning of the stack. Numpy, float64.

Everything comes from the Gram matrix of the stacked rows, which is no larger than the stack has directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.cores import RELATIVE_CUTOFF

# Below this share of the largest, an eigenvalue of a Gram matrix is rounding: the condition number is infinite.
_EIGENVALUE_NOISE = 1e-14


@dataclass(frozen=True)
class StackCondition:
    """Conditioning of the stacked bases of all tasks, of which the polar factor is taken.

    Attributes:
        directions: K, stacked directions over all tasks; those that are zero are not counted.
        width: D of the space that they lie in; more than D directions cannot be independent.
        condition: largest over smallest singular value of the K directions, >= 1 (orthogonal tasks); None when
            it is infinite, or there are no directions.
        below_cutoff: directions whose singular value is at most `runtime.cores.RELATIVE_CUTOFF` of the largest.
            They are shared between tasks, and merged into one.
    """

    directions: int
    width: int
    condition: float | None
    below_cutoff: int


@dataclass(frozen=True)
class StackGeometry:
    """What the Gram matrix of a stack says.

    Attributes:
        overlap: mean squared cosine of the principal angles of each pair of tasks, 0 (orthogonal) to 1 (the
            smaller lies in the larger); NaN where one of them has no directions. [T, T] float64
        chance: what random subspaces of these ranks overlap by, NaN as above. [T, T] float64
    """

    overlap: NDArray[np.float64]
    chance: NDArray[np.float64]
    condition: StackCondition


def stack_geometry(bases: Sequence[NDArray[np.floating[Any]]]) -> StackGeometry:
    """Overlaps and conditioning of the bases of one matrix.

    The squared cosines of the principal angles between the row spaces of `vh_i` and `vh_j` are the squared
    singular values of `vh_i vh_j^T` (Bjorck and Golub 1973), so that their mean is
    `||vh_i vh_j^T||_F^2 / min(R_i, R_j)`. Random subspaces reach `max(R_i, R_j) / D` on average.

    Args:
        bases: of each task, rows orthonormal or zero; zero rows (padding, triplets beyond a delta's own rank)
            are left out. T of [R_i, D]
    """
    present = [np.asarray(rows[np.any(rows != 0, axis=1)], np.float64) for rows in bases]
    ranks = np.array([len(rows) for rows in present])
    stack = np.concatenate(present)  # [K, D]
    gram = stack @ stack.T  # [K, K]
    owner = np.repeat(np.eye(len(present)), ranks, axis=1)  # [T, K]
    smaller = np.minimum.outer(ranks, ranks).astype(np.float64)
    smaller[smaller == 0] = np.nan
    overlap = np.clip(owner @ gram**2 @ owner.T / smaller, 0, 1)
    larger = np.maximum.outer(ranks, ranks) / stack.shape[1]
    chance = np.where(np.isnan(smaller), np.nan, larger)
    return StackGeometry(overlap, chance, _condition(stack, gram))


def _condition(stack: NDArray[np.float64], gram: NDArray[np.float64]) -> StackCondition:
    directions, width = stack.shape
    if directions == 0:
        return StackCondition(directions, width, None, 0)
    eigenvalues = np.linalg.eigvalsh(gram if directions <= width else stack.T @ stack)
    largest, smallest = eigenvalues[-1], eigenvalues[0]
    kept = int((eigenvalues > RELATIVE_CUTOFF**2 * largest).sum())
    infinite = directions > width or smallest <= _EIGENVALUE_NOISE * largest
    condition = None if infinite else float(np.sqrt(largest / smallest))
    return StackCondition(directions, width, condition, directions - kept)


def mean_overlap(
    geometries: Sequence[StackGeometry],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Overlap and chance, averaged pair by pair over the matrices where both tasks have directions.

    Returns:
        overlap and chance, NaN for pairs that meet nowhere. Each [T, T] float64
    """
    overlaps = np.stack([geometry.overlap for geometry in geometries])
    count = (~np.isnan(overlaps)).sum(axis=0).astype(np.float64)
    count[count == 0] = np.nan
    chances = np.stack([geometry.chance for geometry in geometries])
    return np.nansum(overlaps, axis=0) / count, np.nansum(chances, axis=0) / count
