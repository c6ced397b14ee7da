"""Which block should the router read? Measured on validation images, never on test images.

One pass of the first-pass model gives the residuals of every block. What the second pass would answer is
worked out once for each pair of an image and a task set that some block leads to, with dense merged weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact
from mass_export.datasets import load_labelled_images
from mass_export.errors import RecipeError
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.recipe import Recipe
from mass_export.router_spec import Tap
from mass_export.routing import projection_residuals, routing_feature
from mass_export.spec import TaskInfo
from mass_export.task_factors import factorize_delta, open_task_vector
from mass_export.vit import attention, attention_input, embed, mlp, mlp_input
from runtime.bundle import GateMode, TaskSpec
from runtime.routing import Selection, answer, gates_from_residuals, select_tasks

PAPER_MODES: tuple[GateMode, ...] = ("topk", "top1")
IMAGES_PER_TASK = 150


@dataclass(frozen=True)
class LayerScore:
    """What a routing layer achieves; averages over tasks.

    Attributes:
        layer: block, counted from 0.
        mode: of the gates.
        routing_accuracy: the right task has the smallest residual.
        kept_accuracy: the right task is in the selected set.
        joint_accuracy: task and class are both right.
    """

    layer: int
    mode: GateMode
    routing_accuracy: float
    kept_accuracy: float
    joint_accuracy: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def best_layer(scores: Sequence[LayerScore]) -> LayerScore:
    """Highest joint accuracy; ties go to the better routing, then to the earlier layer, which costs less."""
    return max(scores, key=lambda score: (score.joint_accuracy, score.routing_accuracy, -score.layer))


def score_layers(
    recipe: Recipe,
    data: Path,
    *,
    split: str = "val",
    modes: Sequence[GateMode] = PAPER_MODES,
    images_per_task: int = IMAGES_PER_TASK,
    progress: Progress,
) -> tuple[LayerScore, ...]:
    """Score every block as the routing layer, with the recipe's other settings.

    Args:
        recipe: its router's site, token, norm, rank, threshold, temperature and max_tasks are kept.
        data: directory of labelled images, see `mass_export.datasets`.
        split: validation images.
        modes: gates to try.
        images_per_task: at most so many images are looked at.
        progress: where to show it.

    Raises:
        MassExportError: a checkpoint or the images of a task are missing or do not fit.
    """
    artifact = merge(recipe, progress)
    infos = artifact.info.tasks
    images = [load_labelled_images(data, info, split).sample(images_per_task) for info in infos]
    pixel_values = np.concatenate([part.pixel_values(recipe.preprocess) for part in images])
    truth = np.repeat(np.arange(len(infos)), [len(part) for part in images])
    labels = np.concatenate([part.labels for part in images])
    residuals = residuals_by_layer(artifact, bases_by_layer(recipe, artifact), pixel_values, progress)
    choices = {
        (layer, mode): select(artifact, residuals[layer], mode)
        for mode in modes
        for layer in range(recipe.vision.layers)
    }
    logits = LogitTable(MassModel(artifact), pixel_values)
    logits.fill(list(choices.values()), progress)
    scores = []
    for (layer, mode), selection in choices.items():
        task_index, class_index = logits.answers(selection)
        routed = residuals[layer].argmin(axis=1) == truth
        kept = selection.selected[np.arange(len(truth)), truth]
        right = (task_index == truth) & (class_index == labels)
        routed_share, kept_share, right_share = (macro_average(hits, truth) for hits in (routed, kept, right))
        scores.append(LayerScore(layer, mode, routed_share, kept_share, right_share))
    return tuple(scores)


def with_layer(recipe: Recipe, score: LayerScore) -> Recipe:
    """The recipe with the layer and mode of a score."""
    router = dataclasses.replace(recipe.router, layer=score.layer, layers=None, mode=score.mode)
    return dataclasses.replace(recipe, router=router)


def select(artifact: Artifact, residuals: NDArray[np.float32], mode: GateMode) -> Selection:
    """Task sets from the residuals [n, T] of one layer; their members count alike, whatever their gates."""
    router = artifact.info.router
    gates = gates_from_residuals(residuals, mode, router.temperature)
    return select_tasks(gates, mode, router.threshold, router.max_tasks)


def bases_by_layer(recipe: Recipe, artifact: Artifact) -> list[list[Tensor]]:
    """The router's bases at every layer: vh_i [R, D] by layer and task."""
    rank, site = recipe.router.rank, recipe.router.site
    if site == "both":
        raise RecipeError("router.site: choosing a layer needs one site, mlp or attn.")
    names = [Tap(layer, site).parameter for layer in range(recipe.vision.layers)]
    if rank is None:
        return [[task.matrices[name].vh for task in artifact.tasks] for name in names]
    bases: list[list[Tensor]] = [[] for _ in names]
    for task in recipe.tasks:
        task_vector = open_task_vector(task, recipe, artifact.base)
        for layer, name in enumerate(names):
            kept = min(rank, *artifact.base[name].shape)
            bases[layer].append(factorize_delta(task_vector.delta(name), kept).vh.float())
    return bases


@torch.inference_mode()
def residuals_by_layer(
    artifact: Artifact,
    bases: Sequence[Sequence[Tensor]],
    pixel_values: NDArray[np.float32],
    progress: Progress,
    batch_size: int = 64,
) -> NDArray[np.float32]:
    """Residuals at every block from one pass each: [n, 3, H, W] -> [layers, n, T]."""
    params, spec, router = artifact.merged or artifact.base, artifact.info.vision, artifact.info.router
    starts = range(0, len(pixel_values), batch_size)
    parts = []
    for start in progress.track(list(starts), "Residuals of all layers"):
        x = embed(params, torch.from_numpy(pixel_values[start : start + batch_size]), spec)
        rows = []
        for layer in range(spec.layers):
            h = attention_input(params, layer, x, spec)
            x = x + attention(params, layer, h, spec)
            z = mlp_input(params, layer, x, spec)
            feature = routing_feature(z if router.site == "mlp" else h, router.token)
            rows.append(projection_residuals(feature, bases[layer], router.norm))
            x = x + mlp(params, layer, z, spec)
        parts.append(torch.stack(rows).numpy())
    return np.concatenate(parts, axis=1)


class LogitTable:
    """Logits of the second pass for the pairs of an image and a task set that are asked for."""

    def __init__(self, model: MassModel, pixel_values: NDArray[np.float32]) -> None:
        self._model = model
        self._pixel_values = torch.from_numpy(pixel_values)
        self._logits: dict[tuple[int, tuple[int, ...]], NDArray[np.float32]] = {}

    def fill(self, selections: Sequence[Selection], progress: Progress, batch_size: int = 64) -> None:
        """Run every pair of the selections once, set by set: weights are merged once per set."""
        rows_by_set: dict[tuple[int, ...], set[int]] = {}
        for selection in selections:
            for row, tasks in enumerate(selection.sets()):
                rows_by_set.setdefault(tasks, set()).add(row)
        for tasks, wanted in progress.track(sorted(rows_by_set.items()), "Second passes"):
            rows = sorted(wanted)
            for start in range(0, len(rows), batch_size):
                chunk = rows[start : start + batch_size]
                logits = self._model.logits(self._pixel_values[chunk], tasks).numpy()
                self._logits.update({(row, tasks): logits[i] for i, row in enumerate(chunk)})

    def answers(self, selection: Selection) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Task and class of every image under these sets: [n], [n]."""
        info = self._model.artifact.info
        logits = np.stack([self._logits[row, tasks] for row, tasks in enumerate(selection.sets())])
        return answer(logits, _task_specs(info.tasks), selection, info.merge.head_choice)


def _task_specs(tasks: Sequence[TaskInfo]) -> list[TaskSpec]:
    stops = list(accumulate(len(task.classes) for task in tasks))
    return [
        TaskSpec(t.name, t.classes, stop - len(t.classes), stop) for t, stop in zip(tasks, stops, strict=True)
    ]


def macro_average(hits: NDArray[np.bool_], truth: NDArray[np.int64]) -> float:
    """Share of hits within each task, averaged over the tasks that occur.

    Args:
        hits: [n]
        truth: task of each. [n]
    """
    return float(np.mean([hits[truth == task].mean() for task in np.unique(truth)]))


def scores_to_rows(scores: Sequence[LayerScore]) -> list[Mapping[str, Any]]:
    """Plain data for JSON, best first."""
    return [s.to_dict() for s in sorted(scores, key=lambda s: s.joint_accuracy, reverse=True)]
