"""Ranks of all matrices at a given number of parameters, each rank where it keeps most energy."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from torch import Tensor

from mass_export.spec import VisionSpec, rank_of


def rank_caps(vision: VisionSpec, budget: float, tasks: int) -> dict[str, int]:
    """The most that a matrix can be given: 1/T of its smaller side, so that the tasks' bases fit side by side."""
    shapes = vision.parameter_shapes()
    return {
        name: max(rank_of(shapes[name], budget, None), min(shapes[name]) // tasks, 1)
        for name in vision.matrix_names()
    }


def allot_ranks(
    spectra: Sequence[Mapping[str, Tensor]], vision: VisionSpec, budget: float, caps: Mapping[str, int]
) -> dict[str, int]:
    """Ranks for all tasks alike, that together take as many parameters as `rank_ratio: budget` does.

    Each matrix starts at rank 1. Then the next rank goes to where it adds most energy for its D_out + D_in numbers:
    the sum over tasks of the squared singular value, as a share of what the task's matrices have in all.

    Args:
        spectra: singular values of every matrix, descending, by task. [R] each
        vision: the tower.
        budget: the rank ratio whose size is to be kept.
        caps: the largest rank of every matrix.

    Returns:
        rank of every matrix.
    """
    shapes = vision.parameter_shapes()
    costs = {name: sum(shapes[name]) for name in caps}
    room = sum(rank_of(shapes[name], budget, None) * cost for name, cost in costs.items()) - sum(
        costs.values()
    )
    totals = [sum(float(s.double().square().sum()) for s in task.values()) or 1.0 for task in spectra]
    gains = {
        name: [
            sum(
                float(task[name][r]) ** 2 / total if r < len(task[name]) else 0.0
                for task, total in zip(spectra, totals, strict=True)
            )
            for r in range(cap)
        ]
        for name, cap in caps.items()
    }
    ranks = dict.fromkeys(caps, 1)
    queue = [(-gains[name][1] / costs[name], name) for name, cap in caps.items() if cap > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        if costs[name] > room:
            continue
        room -= costs[name]
        ranks[name] += 1
        if ranks[name] < caps[name]:
            heapq.heappush(queue, (-gains[name][ranks[name]] / costs[name], name))
    return ranks
