"""Verification of unsure routes: run the two best tasks one by one and let their heads decide.

A route is unsure when the scores of its two best tasks differ by less than a margin. Each candidate is then run
as a set of its own, and the one with the larger sum of route and head evidence wins:

    value = log max softmax(logits of its head) - prior * score

The confidence of a head on its own task's model is high where the task is right, and says nothing about the
router's mistakes, so the two are nearly independent witnesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import GateMode, TaskSpec
from runtime.routing import Selection

TaskSet = tuple[int, ...]


class VerifySettings(Protocol):
    """The part of the router's settings that is read here."""

    @property
    def mode(self) -> GateMode:
        """Only `top1` routes are verified: sets of several tasks hedge already."""

    @property
    def verify_margin(self) -> float:
        """Scores closer than this are unsure; 0 is off."""

    @property
    def verify_budget(self) -> float:
        """Share of a batch, at most."""

    @property
    def verify_prior(self) -> float:
        """Weight of the router's score in the decision."""


def verify_routes(
    selection: Selection,
    logits: NDArray[np.floating[Any]],
    scores: NDArray[np.floating[Any]],
    *,
    allowed: Sequence[int] | None,
    settings: VerifySettings,
    tasks: Sequence[TaskSpec],
    run: Callable[[NDArray[np.int64], list[TaskSet]], NDArray[np.floating[Any]]],
) -> tuple[Selection, NDArray[np.bool_]]:
    """Run the second-best task where the route is unsure, and keep the better of the two.

    Args:
        selection: top-1 sets.
        logits: of those sets; rows that change hands are overwritten. [B, sum C]
        scores: the router's, lower matches better. [B, T]
        allowed: tasks that may answer; None for all.
        settings: margin, budget, prior.
        tasks: where each head's logits stand.
        run: second pass for some rows of the batch with a set for each: -> [V, sum C].

    Returns:
        the final selection, and which samples were verified [B] bool
    """
    verified = np.zeros(len(logits), np.bool_)
    choices = scores.shape[1] if allowed is None else len(allowed)
    if settings.verify_margin <= 0 or settings.mode != "top1" or choices < 2:
        return selection, verified
    candidates, margin = two_best(scores, allowed)
    rows = unsure_samples(margin, settings.verify_margin, settings.verify_budget)
    if not len(rows):
        return selection, verified
    verified[rows] = True
    seconds = run(rows, [(int(task),) for task in candidates[rows, 1]])
    winner = decide([logits[rows], seconds], candidates[rows], scores[rows], tasks, settings.verify_prior)
    changed = rows[winner == 1]
    logits[changed] = seconds[winner == 1]
    selected, order = selection.selected.copy(), selection.order.copy()
    selected[changed] = False
    selected[changed, candidates[changed, 1]] = True
    order[changed] = np.argsort(~selected[changed], axis=1, kind="stable")
    return Selection(selected, order), verified


def two_best(
    scores: NDArray[np.floating[Any]], allowed: Sequence[int] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Best and second-best task of each sample, and by how much the best leads.

    Args:
        scores: the router's, lower matches better. [B, T]
        allowed: tasks that may answer, at least two; None for all.

    Returns:
        candidates [B, 2] int64, margin [B] float64, >= 0
    """
    wide = scores.astype(np.float64)
    if allowed is not None:
        barred = [i for i in range(scores.shape[1]) if i not in set(allowed)]
        wide[:, barred] = np.inf
    candidates = np.argsort(wide, axis=1, kind="stable")[:, :2]
    lead = np.take_along_axis(wide, candidates, axis=1)
    return candidates, lead[:, 1] - lead[:, 0]


def unsure_samples(margin: NDArray[np.float64], threshold: float, budget: float) -> NDArray[np.int64]:
    """Samples to verify: margin below the threshold, at most `budget` of the batch, the smallest margins first.

    With a budget below 1 the cap makes a sample's answer depend on its batch.

    Returns:
        rows, ascending [V] int64
    """
    rows = np.flatnonzero(margin < threshold)
    most = int(budget * len(margin))
    if len(rows) > most:
        rows = rows[np.argsort(margin[rows], kind="stable")[:most]]
    return np.sort(rows)


def head_confidence(logits: NDArray[np.floating[Any]], task: TaskSpec) -> NDArray[np.float64]:
    """Log of the largest class probability within one head: logits [V, sum C] -> [V], <= 0."""
    head = logits[:, task.start : task.stop].astype(np.float64)
    shifted = head - head.max(axis=1, keepdims=True)
    confidence: NDArray[np.float64] = -np.log(np.exp(shifted).sum(axis=1))
    return confidence


def decide(
    logits: Sequence[NDArray[np.floating[Any]]],
    candidates: NDArray[np.int64],
    scores: NDArray[np.floating[Any]],
    tasks: Sequence[TaskSpec],
    prior: float,
) -> NDArray[np.int64]:
    """Which of the two candidates wins: 0 or 1 per sample; equal values keep the router's first.

    Args:
        logits: of the passes with the first and with the second candidate. 2 of [V, sum C]
        candidates: [V, 2]
        scores: the router's. [V, T]
        tasks: where each head's logits stand.
        prior: weight of the router's score, >= 0.

    Returns:
        [V] int64
    """
    values = np.empty(candidates.shape, np.float64)
    for place in (0, 1):
        for index, task in enumerate(tasks):
            rows = np.flatnonzero(candidates[:, place] == index)
            values[rows, place] = head_confidence(logits[place][rows], task)
    values -= prior * np.take_along_axis(scores.astype(np.float64), candidates, axis=1)
    winner: NDArray[np.int64] = np.argmax(values, axis=1)
    return winner
