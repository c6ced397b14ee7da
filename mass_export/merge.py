"""The merge pipeline: recipe -> artifact, one fine-tuned checkpoint in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact, TaskFactors
from mass_export.checkpoint_folder import sha256_of_checkpoint
from mass_export.checkpoints import load_checkpoint
from mass_export.factor_cache import FactorCache
from mass_export.heads import load_head
from mass_export.lora import sha256_of_adapter
from mass_export.merging import merge_isotropic, merge_tsvm
from mass_export.progress import Progress
from mass_export.rank_budget import allot_ranks, rank_caps
from mass_export.recipe import Recipe, TaskRecipe
from mass_export.spec import ArtifactInfo, BaseMerge, TaskInfo
from mass_export.task_factors import factorize_task, open_task_vector, ranks_of, router_bases
from runtime.bundle import sha256_of_file

_FULL_DELTAS = ("isotropic", "mean")  # base merges of more than the factors


def merge(
    recipe: Recipe,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    *,
    cache: FactorCache | None = None,
) -> Artifact:
    """Factorise every task of the recipe, merge the first pass, and collect what export needs.

    Args:
        recipe: what to merge.
        progress: where to show it.
        dtype: of the result; everything is computed in float64 and rounded once, at the end.
        cache: where factors of tasks are kept until the merge is complete, and taken from.

    Raises:
        MassExportError: any input is missing, damaged or does not fit; nothing is written.
    """
    base = load_checkpoint(recipe.base, recipe.vision, allow_pickle=recipe.allow_pickle)
    heads = tuple(load_head(t.head, t.name, t.classes, recipe.vision.embed_dim) for t in recipe.tasks)
    provenance = _provenance(recipe)
    tasks: list[TaskFactors] = []
    bases: list[dict[str, Tensor]] = []
    delta_sum: dict[str, Tensor] = {}
    for task in progress.track(recipe.tasks, "Factorising tasks"):
        factors, task_bases = _factors(task, recipe, base, dtype, provenance, delta_sum, progress, cache)
        tasks.append(factors)
        bases.append(task_bases)
    if recipe.rank_budget is not None:
        tasks, bases = _allotted(recipe, recipe.rank_budget, tasks, bases)
    if recipe.base_merge_file is not None:
        merged = load_checkpoint(
            recipe.base_merge_file, recipe.vision, allow_pickle=recipe.allow_pickle, base=base
        )
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
        provenance=provenance,
        ranks=tuple(t.rank for t in recipe.tasks),
        model_config=recipe.model_config,
    )
    return Artifact(info, base, merged, tuple(tasks), tuple(bases), heads)


def _factors(
    task: TaskRecipe,
    recipe: Recipe,
    base: Mapping[str, Tensor],
    dtype: torch.dtype,
    provenance: Mapping[str, Any],
    delta_sum: dict[str, Tensor],
    progress: Progress,
    cache: FactorCache | None,
) -> tuple[TaskFactors, dict[str, Tensor]]:
    """Factors and router bases of a task, new or from the cache; its full delta is added to `delta_sum` if needed."""
    ranks = ranks_of(task, recipe.vision)
    if recipe.rank_budget is not None:
        ranks = rank_caps(recipe.vision, recipe.rank_budget, len(recipe.tasks))
    key, found = "", None
    if cache is not None:
        key = cache.key(
            base=provenance["base"]["sha256"],
            checkpoint=provenance["tasks"][task.name]["checkpoint"]["sha256"],
            vision=dataclasses.asdict(recipe.vision),
            ranks=ranks,
            router=[[tap.parameter for tap in recipe.router.taps(recipe.vision.layers)], recipe.router.rank],
            dtype=dtype,
        )
        found = cache.load(key)
    in_full = recipe.merge.base_merge in _FULL_DELTAS
    if found is not None and not in_full:
        return found
    task_vector = open_task_vector(task, recipe, base)
    if in_full:
        for name in base:
            delta = task_vector.dense(name)
            delta_sum[name] = delta_sum[name].add_(delta) if name in delta_sum else delta.clone()
    if found is not None:
        return found
    factors = factorize_task(task_vector, ranks, recipe.vision, dtype, progress, task.name)
    bases = router_bases(task_vector, factors, recipe, dtype, task.name)
    if cache is not None:
        cache.store(key, factors, bases)
    return factors, bases


def _allotted(
    recipe: Recipe, budget: float, tasks: list[TaskFactors], bases: list[dict[str, Tensor]]
) -> tuple[list[TaskFactors], list[dict[str, Tensor]]]:
    """The tasks and their router bases cut to the ranks that the budget allots."""
    caps = rank_caps(recipe.vision, budget, len(tasks))
    spectra = [{name: matrix.s for name, matrix in task.matrices.items()} for task in tasks]
    ranks = allot_ranks(spectra, recipe.vision, budget, caps)
    cut = [
        TaskFactors({name: m.truncated(ranks[name]) for name, m in task.matrices.items()}, task.vectors)
        for task in tasks
    ]
    if recipe.router.rank is None:
        bases = [{name: vh[: ranks[name]].clone() for name, vh in of_task.items()} for of_task in bases]
    return cut, bases


def merge_first_pass(
    base: Mapping[str, Tensor],
    tasks: list[TaskFactors],
    delta_sum: Mapping[str, Tensor],
    method: BaseMerge,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The fixed merge of the first pass (MASS.md section 2).

    `tsvm` merges the truncated matrices; `isotropic` and `mean` use `delta_sum`, the sum of the full deltas, which
    the others do not need. Vector parameters get the mean of the deltas in each. `zeroshot` is the base itself,
    returned as an empty dict: no second copy.

    Returns:
        parameters of the first pass.
    """
    if method == "zeroshot":
        return {}
    merged: dict[str, Tensor] = {}
    for name, parameter in progress.track(list(base.items()), "Merging the first pass"):
        if name in tasks[0].vectors:
            delta = torch.stack([task.vectors[name].double() for task in tasks]).mean(dim=0)
        elif method == "tsvm":
            delta = merge_tsvm([task.matrices[name] for task in tasks], name)
        elif method == "isotropic":
            delta = merge_isotropic(delta_sum[name])
        else:
            delta = delta_sum[name] / len(tasks)
        merged[name] = (parameter.double() + delta).to(dtype)
    return merged


def _provenance(recipe: Recipe) -> dict[str, Any]:
    hashes: dict[Path, str] = {}  # heads of all tasks often lie in one file

    def entry(path: Path, hash_of: Callable[[Path], str] = sha256_of_checkpoint) -> dict[str, str]:
        if path not in hashes:
            hashes[path] = hash_of(path)
        return {"file": path.name, "sha256": hashes[path]}

    provenance: dict[str, Any] = {
        "producer": f"mass-export {mass_export.__version__}",
        "recipe": {"file": recipe.path.name, "sha256": sha256_of_file(recipe.path)},
        "base": entry(recipe.base),
        "tasks": {
            t.name: {
                "checkpoint": entry(
                    t.checkpoint, sha256_of_adapter if t.is_adapter else sha256_of_checkpoint
                ),
                "head": entry(t.head.file),
            }
            for t in recipe.tasks
        },
    }
    if recipe.base_merge_file is not None:
        provenance["base_merge"] = entry(recipe.base_merge_file)
    return provenance
