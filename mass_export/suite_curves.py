"""Curves of a suite for its report: accuracy by rank and by number of tasks, residuals by block and task."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mass_export.artifact import Artifact, write_artifact
from mass_export.datasets import load_labelled_images
from mass_export.evaluation import evaluate_bundle
from mass_export.layer_choice import bases_by_layer, residuals_by_layer
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import Recipe
from mass_export.routing import standardize_over_tasks
from mass_export.spec import TaskInfo

RANK_RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
TASK_COUNTS = (2, 4, 8, 10)
SAMPLED_PER_TASK = 60

Build = Callable[[Recipe], Artifact]


def accuracy_by_rank(
    recipe: Recipe, data: Path, split: str, finetuned: Mapping[str, float], progress: Progress
) -> list[dict[str, float]]:
    """What more rank buys: the recipe as it stands, with every task's rank set.

    Returns:
        rows of `rank_ratio`, `joint` (task unknown) and `known` (task given), as shares of the fine-tuned accuracy.
    """
    rows = []
    for ratio in progress.track(RANK_RATIOS, "Accuracy by rank"):
        tasks = tuple(dataclasses.replace(task, rank_ratio=ratio, rank=None) for task in recipe.tasks)
        artifact = merge(dataclasses.replace(recipe, tasks=tasks), progress)
        rows.append({"rank_ratio": ratio, **shares(artifact, data, split, finetuned, progress)})
    return rows


def accuracy_by_tasks(
    recipe: Recipe,
    data: Path,
    split: str,
    finetuned: Mapping[str, float],
    builds: Mapping[str, Build],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What more tasks cost: the first two tasks of the recipe, the first four, and so on.

    Args:
        recipe: whose tasks.
        data: labelled images.
        split: of them.
        finetuned: accuracy of each task's own model.
        builds: name -> what makes an artifact of a recipe.
        progress: where to show it.

    Returns:
        rows of `tasks` (how many) and, under the names of `builds`, joint accuracies as shares of the fine-tuned.
    """
    rows = []
    counts = [count for count in TASK_COUNTS if count <= len(recipe.tasks)]
    for count in progress.track(counts, "Accuracy by number of tasks"):
        fewer = dataclasses.replace(recipe, tasks=recipe.tasks[:count])
        row: dict[str, Any] = {"tasks": count}
        for name, build in builds.items():
            row[name] = shares(build(fewer), data, split, finetuned, progress)["joint"]
        rows.append(row)
    return rows


def shares(
    artifact: Artifact, data: Path, split: str, finetuned: Mapping[str, float], progress: Progress
) -> dict[str, float]:
    """Accuracy of the exported artifact with the task unknown and given, divided by the fine-tuned models'.

    On `SAMPLED_PER_TASK` images of each task, which is what keeps curves cheap.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file, bundle = Path(scratch) / "merged.safetensors", Path(scratch) / "bundle"
        write_artifact(file, artifact)
        export_bundle(artifact, file, bundle, verify=False, progress=progress)
        own = {task.name: finetuned[task.name] for task in artifact.info.tasks}
        found = evaluate_bundle(
            bundle, data, split=split, finetuned=own, images_per_task=SAMPLED_PER_TASK, progress=progress
        )
    return {
        "joint": found.normalized_joint_accuracy or 0.0,
        "known": found.normalized_known_task_accuracy or 0.0,
    }


def residuals_by_block(
    recipe: Recipe, artifact: Artifact, data: Path, split: str, progress: Progress
) -> dict[str, Any]:
    """How clearly each block tells each task from the others, by the residuals of its mlp input.

    Args:
        recipe: of the artifact, with a router at one site.
        artifact: its first pass is read.
        data: labelled images.
        split: of them.
        progress: where to show it.

    Returns:
        `lead`: mean over a task's images of minus the z-score (over the tasks) of its own residual, higher is clearer;
        `routed`: share of the images whose own residual is the smallest. [blocks][tasks] each
    """
    infos = [TaskInfo(task.name, task.classes) for task in recipe.tasks]
    images = [load_labelled_images(data, info, split).sample(SAMPLED_PER_TASK) for info in infos]
    pixel_values = np.concatenate([part.pixel_values(recipe.preprocess) for part in images])
    truth = np.repeat(np.arange(len(infos)), [len(part) for part in images])
    residuals = residuals_by_layer(artifact, bases_by_layer(recipe, artifact), pixel_values, progress)
    scores = standardize_over_tasks(torch.from_numpy(residuals)).numpy()  # [L, n, T]
    own = scores[:, np.arange(len(truth)), truth]
    best = residuals.argmin(axis=2) == truth
    return {
        "lead": [_by_task(-row, truth) for row in own],
        "routed": [_by_task(row.astype(np.float64), truth) for row in best],
    }


def _by_task(values: Any, truth: Any) -> Sequence[float]:
    return [float(values[truth == task].mean()) for task in np.unique(truth)]
