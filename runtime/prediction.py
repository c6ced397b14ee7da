"""What the classifier returns: arrays for a batch, and one `Prediction` for each image."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import TaskSpec


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
    unknown: float | None = None
    is_unknown: bool | None = None

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
    result: ForwardResult, tasks: Sequence[TaskSpec], top_k: int, unknown_threshold: float | None = None
) -> list[Prediction]:
    """Name the answers of a batch.

    Args:
        result: of the batch.
        tasks: of the bundle.
        top_k: alternatives for each image, at most.
        unknown_threshold: a greater `unknown` is a verdict; None gives none.
    """
    names = [task.name for task in tasks]
    predictions = []
    for row, task_index in enumerate(result.task_index.tolist()):
        task = tasks[task_index]
        logits = result.logits[row, task.start : task.stop].astype(np.float64)
        exponentials = np.exp(logits - logits.max())
        scores = exponentials / exponentials.sum()
        best = np.argsort(-logits, kind="stable")[:top_k]
        alternatives = tuple((task.name, task.classes[i], float(scores[i])) for i in best)
        residuals = None
        if result.residuals is not None:
            residuals = dict(zip(names, result.residuals[row].tolist(), strict=True))
        gates = dict(zip(names, result.gates[row].tolist(), strict=True))
        unknown = None if result.unknown is None else float(result.unknown[row])
        verdict = None if unknown is None or unknown_threshold is None else unknown > unknown_threshold
        predictions.append(Prediction(*alternatives[0], alternatives, gates, residuals, unknown, verdict))
    return predictions
