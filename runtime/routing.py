"""Residuals to gates, gates to sets of tasks, heads' logits to answers. Numpy only.

The arithmetic is that of MASS (arXiv 2504.05342, section 4.2 and algorithm 2) as its reference implementation
does it; decisions are made in float64, results are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import GateMode, HeadChoice, TaskSpec

STD_EPSILON = 1e-6


@dataclass(frozen=True)
class Selection:
    """The set of tasks of each sample.

    Attributes:
        selected: which tasks are in the set, at least one. [B, T] bool
        order: all task indices, the set's first, in the order in which heads compete (a later one must be
            strictly better): ascending index, or descending gate where the cap of `topk` has cut the set.
            [B, T] int64
    """

    selected: NDArray[np.bool_]
    order: NDArray[np.int64]

    def sets(self) -> list[tuple[int, ...]]:
        """Task indices of each sample's set, ascending."""
        return [tuple(np.flatnonzero(row).tolist()) for row in self.selected]


def softmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Along the last axis."""
    exponentials = np.exp(values - values.max(axis=-1, keepdims=True))
    shares: NDArray[np.float64] = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return shares


def gates_from_residuals(
    residuals: NDArray[np.floating[Any]],
    mode: GateMode,
    temperature: float,
    allowed: Sequence[int] | None = None,
) -> NDArray[np.float32]:
    """Turn distances into weights that sum to 1.

    - `topk`: `softmax(a / temperature)`, `a = (-r - mean(-r)) / (std(-r) + 1e-6)`, sample standard deviation.
    - `weighted`: `softmax(-r / temperature)`.
    - `top1`: one-hot of the smallest residual, ties to the lowest index.

    Args:
        residuals: distance to each task's subspace, lower matches better. [B, T]
        mode: see above.
        temperature: > 0.
        allowed: tasks that may answer; the others get gate 0 and do not enter the mean and deviation.

    Returns:
        gates: [B, T] float32 in [0, 1]

    Example:
        >>> import numpy as np
        >>> gates_from_residuals(np.array([[2.0, 1.0, 3.0]]), "topk", 1.0).round(2)
        array([[0.24, 0.67, 0.09]], dtype=float32)
        >>> gates_from_residuals(np.array([[2.0, 1.0, 3.0]]), "top1", 1.0, allowed=[0, 2])
        array([[1., 0., 0.]], dtype=float32)
    """
    columns = np.arange(residuals.shape[1]) if allowed is None else np.asarray(sorted(allowed), np.int64)
    scores = -residuals[:, columns].astype(np.float64)  # [B, A]
    if mode == "top1":
        picked = np.zeros_like(scores)
        picked[np.arange(len(scores)), scores.argmax(axis=1)] = 1
    elif mode == "weighted":
        picked = softmax(scores / temperature)
    else:
        # One task alone has no sample deviation; it is its own mean, so any value gives gate 1.
        deviation = scores.std(axis=1, ddof=1, keepdims=True) if scores.shape[1] > 1 else 0.0
        centred = scores - scores.mean(axis=1, keepdims=True)
        picked = softmax(centred / (deviation + STD_EPSILON) / temperature)
    gates = np.zeros(residuals.shape, np.float32)
    gates[:, columns] = picked
    return gates


def select_tasks(gates: NDArray[np.float32], mode: GateMode, threshold: float, max_tasks: int) -> Selection:
    """Keep the tasks whose gate is greater than the threshold; the largest alone where none is.

    `topk` keeps at most `max_tasks`, those with the largest gates (ties to the lowest index); `weighted` has
    no cap; `top1` keeps the one-hot task whatever the threshold.

    Args:
        gates: [B, T] float32
        mode: that of the gates.
        threshold: in [0, 1).
        max_tasks: >= 1.

    Example:
        >>> import numpy as np
        >>> gates = np.array([[0.24, 0.67, 0.09], [0.1, 0.1, 0.1]], np.float32)
        >>> select_tasks(gates, "topk", threshold=0.2, max_tasks=3).sets()
        [(0, 1), (0,)]
    """
    by_index = np.broadcast_to(np.arange(gates.shape[1]), gates.shape)
    by_gate = np.argsort(-gates, axis=1, kind="stable")
    selected = np.zeros(gates.shape, np.bool_) if mode == "top1" else gates > np.float32(threshold)
    np.put_along_axis(selected, by_gate[:, :1], values=True, axis=1)  # whoever passes, the largest does
    cut = selected.sum(axis=1, keepdims=True) > (max_tasks if mode == "topk" else gates.shape[1])  # [B, 1]
    capped = selected.copy()
    np.put_along_axis(capped, by_gate[:, max_tasks:], values=False, axis=1)
    selected = np.where(cut, capped, selected)
    ranking = np.where(cut, by_gate, by_index)
    in_set = np.take_along_axis(selected, ranking, axis=1)
    first_the_set = np.argsort(~in_set, axis=1, kind="stable")
    return Selection(selected, np.take_along_axis(ranking, first_the_set, axis=1).astype(np.int64))


def answer(
    logits: NDArray[np.floating[Any]],
    tasks: Sequence[TaskSpec],
    selection: Selection,
    head_choice: HeadChoice,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Let the heads of each sample's set compete.

    Args:
        logits: every head, tasks in order. [B, sum C]
        tasks: where each head's logits stand.
        selection: of the same samples.
        head_choice: a head bids its `max` or `mean` logit; of equal bids the first in `selection.order` wins.

    Returns:
        task_index [B] int64, and class_index [B] int64 within the task's head: its largest logit.
    """
    heads = [logits[:, task.start : task.stop].astype(np.float64) for task in tasks]
    bids = np.stack([h.max(axis=1) if head_choice == "max" else h.mean(axis=1) for h in heads], axis=1)
    bids = np.where(selection.selected, bids, -np.inf)  # [B, T]
    winner = np.take_along_axis(bids, selection.order, axis=1).argmax(axis=1)
    task_index = np.take_along_axis(selection.order, winner[:, None], axis=1)[:, 0]
    best = np.stack([h.argmax(axis=1) for h in heads], axis=1)  # [B, T]
    return task_index, np.take_along_axis(best, task_index[:, None], axis=1)[:, 0].astype(np.int64)
