"""What the classifier returns: arrays for a batch, and one `Prediction` for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import RouterSpec, TaskSpec
from runtime.routing import softmax
from runtime.verification import two_best


@dataclass(frozen=True, eq=False)
class ForwardResult:
    """What the model computes for a batch.

    Attributes:
        residuals: distance to each task's subspace, >= 0, lower matches better; None when one task was given,
            because then there is no first pass. [B, T] float32
        gates: weight of each task before selection, sum 1. [B, T] float32
        selected: the set of tasks that was merged for the sample. [B, T] bool
        logits: every head on the second-pass feature, tasks in order. [B, sum C] float32
        task_index: the task that answers. [B] int64
        class_index: its class, within the task. [B] int64
        verified: routes that were unsure, so that the second-best task was run, too. [B] bool
        unknown: higher where no task explains the image; None when one task was given, or the bundle does not say.
            [B] float32
    """

    residuals: NDArray[np.float32] | None
    gates: NDArray[np.float32]
    selected: NDArray[np.bool_]
    logits: NDArray[np.float32]
    task_index: NDArray[np.int64]
    class_index: NDArray[np.int64]
    verified: NDArray[np.bool_]
    unknown: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Prediction:
    """The answer for one image.

    Attributes:
        task: name of the task that answers.
        label: its best class.
        score: softmax probability of the label among the task's classes, 0..1.
        alternatives: (task, label, score) of the task's best classes, best first; the first is the answer.
        gates: weight of each task before selection, sum 1.
        residuals: distance to each task, lower matches better; None when the task was given.
        route_margin: how much smaller the best task's residual is than the second's, of those that may answer,
            >= 0; None when the task was given.
        route_confidence: how sure the router is of `task`, 0..1: `softmax(-confidence_scale * residuals)` over those
            that may answer. Where the bundle was calibrated with images of every task this is a probability that
            was fitted to them, else it only ranks. None when the task was given.
        unknown: how badly even the best task explains the image, higher is worse; None where it is not known. Its
            scale is the bundle's: about 1 for known images with a calibration, else it only ranks.
        is_unknown: whether that exceeds the bundle's threshold; None without a score or a threshold.
    """

    task: str
    label: str
    score: float
    alternatives: tuple[tuple[str, str, float], ...]
    gates: dict[str, float]
    residuals: dict[str, float] | None
    route_margin: float | None = None
    route_confidence: float | None = None
    unknown: float | None = None
    is_unknown: bool | None = None

    def _repr_html_(self) -> str:
        """For notebooks."""
        from runtime.notebook import html_from_prediction  # noqa: PLC0415

        return html_from_prediction(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        keys = ("task", "label", "score")
        named = [dict(zip(keys, alternative, strict=True)) for alternative in self.alternatives]
        return {**dataclasses.asdict(self), "alternatives": named}


def joined(parts: Sequence[ForwardResult]) -> ForwardResult:
    """Results of consecutive parts of a batch, as one."""
    residuals = [part.residuals for part in parts if part.residuals is not None]
    unknown = [part.unknown for part in parts if part.unknown is not None]
    return ForwardResult(
        residuals=np.concatenate(residuals) if residuals else None,
        gates=np.concatenate([part.gates for part in parts]),
        selected=np.concatenate([part.selected for part in parts]),
        logits=np.concatenate([part.logits for part in parts]),
        task_index=np.concatenate([part.task_index for part in parts]),
        class_index=np.concatenate([part.class_index for part in parts]),
        verified=np.concatenate([part.verified for part in parts]),
        unknown=np.concatenate(unknown) if unknown else None,
    )


def predictions_from_result(
    result: ForwardResult,
    tasks: Sequence[TaskSpec],
    top_k: int,
    *,
    allowed: Sequence[int] | None = None,
    router: RouterSpec | None = None,
) -> list[Prediction]:
    """Name the answers of a batch.

    Args:
        result: of the batch.
        tasks: of the bundle.
        top_k: alternatives for each image, at most.
        allowed: tasks that may answer, ascending; None for all.
        router: of the bundle, for its `unknown_threshold` and `confidence_scale`; without it there is no verdict.
    """
    names = [task.name for task in tasks]
    threshold = None if router is None else router.unknown_threshold
    columns = list(range(len(tasks))) if allowed is None else list(allowed)
    margins, shares = route_shares(
        result.residuals, columns, 1.0 if router is None else router.confidence_scale
    )
    predictions = []
    for row, task_index in enumerate(result.task_index.tolist()):
        task = tasks[task_index]
        logits = result.logits[row, task.start : task.stop].astype(np.float64)
        scores = softmax(logits)
        best = np.argsort(-logits, kind="stable")[:top_k]
        alternatives = tuple((task.name, task.classes[i], float(scores[i])) for i in best)
        residuals = None
        if result.residuals is not None:
            residuals = dict(zip(names, result.residuals[row].tolist(), strict=True))
        gates = dict(zip(names, result.gates[row].tolist(), strict=True))
        unknown = None if result.unknown is None else float(result.unknown[row])
        predictions.append(
            Prediction(
                *alternatives[0],
                alternatives,
                gates,
                residuals,
                route_margin=None if margins is None else float(margins[row]),
                route_confidence=None if shares is None else float(shares[row, columns.index(task_index)]),
                unknown=unknown,
                is_unknown=None if unknown is None or threshold is None else unknown > threshold,
            )
        )
    return predictions


def route_shares(
    residuals: NDArray[np.float32] | None, columns: list[int], scale: float
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """How clear each route is.

    Args:
        residuals: distance to each task; None without a first pass. [B, T]
        columns: tasks that may answer, A of them.
        scale: the router's `confidence_scale`.

    Returns:
        margin of the best task [B], and share of each task that may answer [B, A]; None without a second one.
    """
    if residuals is None or len(columns) < 2:
        return None, None
    chosen = residuals[:, columns].astype(np.float64)
    return two_best(chosen)[1], softmax(-scale * chosen)
