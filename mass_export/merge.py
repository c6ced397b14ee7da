"""The merge pipeline: recipe -> artifact, one fine-tuned checkpoint in memory at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact, TaskFactors
from mass_export.checkpoints import load_checkpoint
from mass_export.heads import load_head
from mass_export.low_rank import LowRank, factorize
from mass_export.merging import merge_isotropic, merge_tsvm
from mass_export.progress import Progress
from mass_export.recipe import Recipe, TaskRecipe
from mass_export.spec import ArtifactInfo, BaseMerge, TaskInfo, rank_of
from mass_export.task_vectors import compute_task_vector, is_matrix
from runtime.bundle import sha256_of_file


def merge(recipe: Recipe, progress: Progress, dtype: torch.dtype = torch.float32) -> Artifact:
    """Factorise every task of the recipe, merge the first pass, and collect what export needs.

    Args:
        recipe: what to merge.
        progress: where to show it.
        dtype: of the result; everything is computed in float64 and rounded once, at the end.

    Raises:
        MassExportError: any input is missing, damaged or does not fit; nothing is written.
    """
    base = load_checkpoint(recipe.base, recipe.vision)
    heads = tuple(load_head(t.head, t.name, t.classes, recipe.vision.embed_dim) for t in recipe.tasks)
    tasks: list[TaskFactors] = []
    router_bases: list[dict[str, Tensor]] = []
    delta_sum = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in base.items()}
    for task in progress.track(recipe.tasks, "Factorising tasks"):
        task_vector = compute_task_vector(load_checkpoint(task.checkpoint, recipe.vision), base)
        factors = factorize_task(task_vector, recipe, task, dtype)
        tasks.append(factors)
        router_bases.append(_router_bases(task_vector, factors, recipe, dtype))
        for name, delta in task_vector.items():
            delta_sum[name] += delta
    if recipe.base_merge_file is not None:
        merged = load_checkpoint(recipe.base_merge_file, recipe.vision)
    else:
        assert recipe.merge.base_merge != "file"
        merged = merge_first_pass(base, tasks, delta_sum, recipe.merge.base_merge, progress, dtype)
    info = ArtifactInfo(
        vision=recipe.vision,
        preprocess=recipe.preprocess,
        tasks=tuple(TaskInfo(t.name, t.classes) for t in recipe.tasks),
        merge=recipe.merge,
        router=recipe.router,
        rank_ratios=tuple(t.rank_ratio for t in recipe.tasks),
        provenance=_provenance(recipe),
        ranks=tuple(t.rank for t in recipe.tasks),
        model_config=recipe.model_config,
    )
    return Artifact(info, base, merged, tuple(tasks), tuple(router_bases), heads)


def factorize_task(
    task_vector: dict[str, Tensor], recipe: Recipe, task: TaskRecipe, dtype: torch.dtype = torch.float32
) -> TaskFactors:
    """Split a task vector (float64) into low-rank matrices and whole vector deltas."""
    matrices: dict[str, LowRank] = {}
    vectors: dict[str, Tensor] = {}
    for name, delta in task_vector.items():
        if is_matrix(delta):
            ratio, rank = _rank_setting(recipe, task)
            matrices[name] = factorize(delta, rank_of(tuple(delta.shape), ratio, rank)).to(dtype)
        else:
            vectors[name] = delta.to(dtype)
    return TaskFactors(matrices, vectors)


def _rank_setting(recipe: Recipe, task: TaskRecipe) -> tuple[float | None, int | None]:
    """The task's own ratio or rank, else the recipe's."""
    if task.rank_ratio is not None or task.rank is not None:
        return task.rank_ratio, task.rank
    return recipe.rank_ratio, recipe.rank


def _router_bases(
    task_vector: dict[str, Tensor], factors: TaskFactors, recipe: Recipe, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Right bases of the matrices that read the taps, at the router's own rank if it has one. [R, D] each"""
    bases = {}
    for tap in recipe.router.taps(recipe.vision.layers):
        vh, rank = factors.matrices[tap.parameter].vh, recipe.router.rank
        if rank is not None and rank > vh.shape[0]:
            delta = task_vector[tap.parameter]
            vh = factorize(delta, min(rank, *delta.shape)).vh.to(dtype)
        bases[tap.parameter] = vh[:rank].contiguous()
    return bases


def merge_first_pass(
    base: dict[str, Tensor],
    tasks: list[TaskFactors],
    delta_sum: dict[str, Tensor],
    method: BaseMerge,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The fixed merge of the first pass (MASS.md section 2).

    `tsvm` merges the truncated matrices; `isotropic` and `mean` use the sum of the full deltas. Vector parameters
    get the mean of the deltas in each. `zeroshot` is the base itself, returned as an empty dict: no second copy.

    Returns:
        parameters of the first pass.
    """
    if method == "zeroshot":
        return {}
    merged: dict[str, Tensor] = {}
    for name, parameter in progress.track(list(base.items()), "Merging the first pass"):
        mean = delta_sum[name] / len(tasks)
        if not is_matrix(parameter) or method == "mean":
            delta = mean
        elif method == "tsvm":
            delta = merge_tsvm([task.matrices[name] for task in tasks], name)
        else:
            delta = merge_isotropic(delta_sum[name])
        merged[name] = (parameter.double() + delta).to(dtype)
    return merged


def _provenance(recipe: Recipe) -> dict[str, Any]:
    def entry(path: Path) -> dict[str, str]:
        return {"file": path.name, "sha256": sha256_of_file(path)}

    provenance: dict[str, Any] = {
        "producer": f"mass-export {mass_export.__version__}",
        "recipe": entry(recipe.path),
        "base": entry(recipe.base),
        "tasks": {
            t.name: {"checkpoint": entry(t.checkpoint), "head": entry(t.head.file)} for t in recipe.tasks
        },
    }
    if recipe.base_merge_file is not None:
        provenance["base_merge"] = entry(recipe.base_merge_file)
    return provenance
