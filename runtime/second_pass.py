"""The second pass over a batch whose samples have different sets: which runs, with which inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest
from runtime.cores import CoreCache
from runtime.one_task import OneTaskPass
from runtime.session import Session

TaskSet = tuple[int, ...]


# So many images make a run that is not much dearer for each image than a larger one.
FULL_RUN = 8


@dataclass(frozen=True)
class Run:
    """One call of a second-pass graph.

    Attributes:
        samples: rows of the batch, in the order of `sets`.
        sets: as many samples have each; all of one size.
    """

    samples: tuple[int, ...]
    sets: tuple[TaskSet, ...]


def plan_second_pass(
    sets: Sequence[TaskSet], *, own_weights: bool = False, by_task: bool = False
) -> list[Run]:
    """Divide a batch into runs.

    The graph takes sets of one size at a time, so there is one run for each size that occurs, smallest first.
    When all its samples share one set, that set is given once and its bases are gathered once; else each
    sample brings its own.

    Args:
        sets: tasks of each sample, ascending.
        own_weights: samples weigh equal sets differently, so that only sets of one task can be shared.
        by_task: divide the sets of one task as `runtime.one_task` takes them, see `plan_single_tasks`.
    """
    runs = []
    sizes = {len(tasks) for tasks in sets}
    if by_task:
        runs += plan_single_tasks({row: tasks[0] for row, tasks in enumerate(sets) if len(tasks) == 1})
        sizes -= {1}
    for size in sorted(sizes):
        samples = tuple(row for row, tasks in enumerate(sets) if len(tasks) == size)
        distinct = {sets[row] for row in samples}
        shared = len(distinct) == 1 and (size == 1 or not own_weights)
        runs.append(Run(samples, tuple(distinct) if shared else tuple(sets[row] for row in samples)))
    return runs


def plan_single_tasks(task_of: Mapping[int, int]) -> list[Run]:
    """Runs of sets of one task: few, large, and with few rows of bases to gather.

    A task with many images has a run of its own. Tasks with equally many share one if they have many together. What is
    left over runs together, each sample with a set of its own.

    Args:
        task_of: row of the batch -> its task.
    """
    rows: dict[int, list[int]] = {}
    for row, task in sorted(task_of.items()):
        rows.setdefault(task, []).append(row)
    alike: dict[int, list[int]] = {}
    for task in sorted(rows):
        alike.setdefault(len(rows[task]), []).append(task)
    runs, left = [], []
    for count, tasks in sorted(alike.items(), reverse=True):
        groups = [[task] for task in tasks] if count >= FULL_RUN else [tasks]
        for group in groups:
            if count * len(group) >= FULL_RUN or len(rows) == len(group):
                samples = tuple(row for task in group for row in rows[task])
                runs.append(Run(samples, tuple((task,) for task in group)))
            else:
                left += [row for task in group for row in rows[task]]
    if left:
        left.sort()
        each = [task_of[row] for row in left]
        sets = each[:1] if len(set(each)) == 1 else each
        runs.append(Run(tuple(left), tuple((task,) for task in sets)))
    return runs


def spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    """(first row, number of rows) of consecutive parts."""
    return list(zip(accumulate(counts, initial=0), counts, strict=False))


def batches_of_parts(counts: Sequence[int], most: int) -> Iterator[tuple[slice, list[tuple[int, int]]]]:
    """Cut consecutive parts into batches.

    Args:
        counts: images of each part.
        most: images of a batch.

    Yields:
        rows of a batch, and what it takes: (part, how many of its images)
    """
    taken = np.repeat(np.arange(len(counts)), counts)
    for start in range(0, len(taken), most):
        parts, sizes = np.unique(taken[start : start + most], return_counts=True)
        yield slice(start, start + most), list(zip(parts.tolist(), sizes.tolist(), strict=True))


def run_second_pass(
    session: Session,
    manifest: Manifest,
    cores: CoreCache,
    *,
    pixel_values: Any,
    sets: Sequence[TaskSet],
    gates: NDArray[np.float32],
    one_task: OneTaskPass | None = None,
) -> NDArray[np.float32]:
    """Logits of every head on each sample's adaptively merged model.

    Args:
        session: of the second-pass graph.
        manifest: of the bundle.
        cores: of the bundle; asked only with `compose` tsvm.
        pixel_values: images as the bundle takes them, as the session staged them. [B, ..]
        sets: tasks of each sample, ascending.
        gates: used where the bundle weights sums by them. [B, T] float32
        one_task: where there is one, it runs the sets of a single task.

    Returns:
        logits: tasks in order. [B, sum C] float32

    Raises:
        BackendError: the session failed.
    """
    by_gates = manifest.compose == "sum" and manifest.router.sum_weights == "gates"
    logits = np.empty((len(pixel_values), manifest.tasks[-1].stop), np.float32)
    for run in plan_second_pass(sets, own_weights=by_gates, by_task=one_task is not None):
        rows = list(run.samples)
        if one_task is not None and len(run.sets[0]) == 1:
            images = pixel_values if rows == list(range(len(pixel_values))) else pixel_values[rows]
            logits[rows] = one_task.run(images, [tasks[0] for tasks in run.sets])
            continue
        slots = np.array(run.sets, np.int64)  # [S, K]
        weights = np.full(slots.shape, 1 / slots.shape[1], np.float32)
        if by_gates and slots.shape[1] > 1:
            kept = np.take_along_axis(gates[rows], slots, axis=1)
            weights = kept / kept.sum(axis=1, keepdims=True)
        feeds: dict[str, Any] = {
            manifest.preprocess.input_name: pixel_values[rows],
            "slots": slots,
            "weights": weights,
        }
        if manifest.compose == "tsvm":
            feeds |= session.core_feeds(run.sets, cores)
        logits[rows] = session.run(feeds)["logits"]
    return logits
