"""The merge pipeline: recipe -> artifact, one fine-tuned checkpoint in memory at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mass_export
from mass_export.artifact import Artifact, TaskFactors
from mass_export.checkpoint_folder import sha256_of_checkpoint
from mass_export.checkpoints import load_checkpoint
from mass_export.factor_cache import FactorCache
from mass_export.factor_storage import FactorDtype, Storage
from mass_export.head_evidence import with_evidence_decided
from mass_export.heads import load_head
from mass_export.hub import source_name
from mass_export.lora import sha256_of_adapter
from mass_export.merging import merge_isotropic, merge_tsvm
from mass_export.parallel import parallel_map
from mass_export.progress import Progress
from mass_export.rank_budget import allot_ranks, rank_caps
from mass_export.recipe import Recipe, TaskRecipe
from mass_export.spec import ArtifactInfo, BaseMerge, TaskInfo
from mass_export.task_factors import TaskVector, factorize_task, open_task_vector, ranks_of, router_bases
from runtime.checksums import sha256_of_file

FULL_DELTAS = ("isotropic", "mean")  # base merges of more than the factors


@dataclass
class TaskFactorizer:
    """Factorises the tasks of a recipe one by one, or takes them from the cache.

    Attributes:
        recipe: whose tasks.
        base: what they were fine-tuned from.
        base_sha256: of its file.
        dtype: of the factors.
        progress: where to show it.
        cache: where factors are kept, if anywhere.
        delta_sum: sum of the full deltas so far, for the base merges that need it; else empty. float64
    """

    recipe: Recipe
    base: Mapping[str, Tensor]
    base_sha256: str
    dtype: torch.dtype
    progress: Progress
    cache: FactorCache | None = None
    delta_sum: dict[str, Tensor] = field(default_factory=dict)

    def factors(
        self, task: TaskRecipe, ranks: Mapping[str, int], sha256: str
    ) -> tuple[TaskFactors, dict[str, Tensor]]:
        """Factors and router bases of a task.

        Args:
            task: one of the recipe's.
            ranks: of every matrix.
            sha256: of its checkpoint or adapter.
        """
        recipe, key, found = self.recipe, "", None
        if self.cache is not None:
            taps = recipe.router.taps(recipe.vision.layers)
            key = self.cache.key(
                base=self.base_sha256,
                checkpoint=sha256,
                vision=dataclasses.asdict(recipe.vision),
                ranks=dict(ranks),
                router=[[tap.parameter for tap in taps], recipe.router.rank],
                dtype=self.dtype,
            )
            found = self.cache.load(key)
        in_full = recipe.merge.base_merge in FULL_DELTAS
        if found is not None and not in_full:
            return found
        task_vector = open_task_vector(task, recipe, self.base)
        if in_full:
            self._add_in_full(task_vector)
        if found is not None:
            return found
        factors = factorize_task(task_vector, ranks, recipe.vision, self.dtype, self.progress, task.name)
        bases = router_bases(task_vector, factors, recipe, self.dtype, task.name)
        if self.cache is not None:
            self.cache.store(key, factors, bases)
        return factors, bases

    def _add_in_full(self, task_vector: TaskVector) -> None:
        for name in self.base:
            delta = task_vector.dense(name)
            self.delta_sum[name] = (
                self.delta_sum[name].add_(delta) if name in self.delta_sum else delta.clone()
            )


def merge(
    recipe: Recipe,
    progress: Progress,
    dtype: torch.dtype = torch.float32,
    *,
    cache: FactorCache | None = None,
    factor_dtype: FactorDtype = "float32",
) -> Artifact:
    """Factorise every task of the recipe, merge the first pass, and collect what export needs.

    Args:
        recipe: what to merge.
        progress: where to show it.
        dtype: of the result; everything is computed in float64 and rounded once, at the end.
        cache: where factors of tasks are kept until the merge is complete, and taken from.
        factor_dtype: in which the artifact's file will hold the tasks.

    Raises:
        MassExportError: any input is missing, damaged or does not fit; nothing is written.
    """
    vision, budget = recipe.vision, recipe.rank_budget
    base = load_checkpoint(recipe.base, vision, allow_pickle=recipe.allow_pickle)
    heads = tuple(load_head(t.head, t.name, t.classes, vision.embed_dim) for t in recipe.tasks)
    router = with_evidence_decided(recipe.router, heads)
    provenance = _provenance(recipe)
    factorizer = TaskFactorizer(recipe, base, provenance["base"]["sha256"], dtype, progress, cache)
    tasks: list[TaskFactors] = []
    bases: list[dict[str, Tensor]] = []
    for task in progress.track(recipe.tasks, "Factorising tasks"):
        caps = ranks_of(task, vision) if budget is None else rank_caps(vision, budget, len(recipe.tasks))
        sha256 = provenance["tasks"][task.name]["checkpoint"]["sha256"]
        factors, task_bases = factorizer.factors(task, caps, sha256)
        tasks.append(factors)
        bases.append(task_bases)
    if budget is not None:
        tasks, bases = _allotted(recipe, budget, tasks, bases)
    if recipe.base_merge_file is not None:
        merged = load_checkpoint(recipe.base_merge_file, vision, allow_pickle=recipe.allow_pickle, base=base)
    else:
        assert recipe.merge.base_merge != "file"
        method = recipe.merge.base_merge
        merged = merge_first_pass(base, tasks, factorizer.delta_sum, method, progress, dtype)
    info = ArtifactInfo(
        vision=vision,
        preprocess=recipe.preprocess,
        tasks=tuple(TaskInfo(t.name, t.classes) for t in recipe.tasks),
        merge=recipe.merge,
        router=router,
        rank_ratios=tuple(t.rank_ratio for t in recipe.tasks),
        provenance=provenance,
        ranks=tuple(t.rank for t in recipe.tasks),
        model_config=recipe.model_config,
    )
    storage = Storage(factor_dtype, recipe.patch_embed)
    return Artifact(info, base, merged, tuple(tasks), tuple(bases), heads, storage=storage)


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

    def parameter(name: str) -> Tensor:
        if name in tasks[0].vectors:
            delta = torch.stack([task.vectors[name].double() for task in tasks]).mean(dim=0)
        elif method == "tsvm":
            delta = merge_tsvm([task.matrices[name] for task in tasks], name)
        elif method == "isotropic":
            delta = merge_isotropic(delta_sum[name])
        else:
            delta = delta_sum[name] / len(tasks)
        return (base[name].double() + delta).to(dtype)

    names = list(base)
    merged = progress.track(parallel_map(parameter, names), "Merging the first pass", total=len(names))
    return dict(zip(names, merged, strict=True))


def _provenance(recipe: Recipe) -> dict[str, Any]:
    provenance: dict[str, Any] = {
        "producer": f"mass-export {mass_export.__version__}",
        "recipe": {"file": recipe.path.name, "sha256": sha256_of_file(recipe.path)},
        "base": {"file": source_name(recipe.base), "sha256": sha256_of_checkpoint(recipe.base)},
        "tasks": task_provenance(recipe),
    }
    if recipe.base_merge_file is not None:
        file = recipe.base_merge_file
        provenance["base_merge"] = {"file": file.name, "sha256": sha256_of_checkpoint(file)}
    return provenance


def task_provenance(recipe: Recipe) -> dict[str, Any]:
    """Names and checksums of every task's inputs."""
    hashes: dict[Path, str] = {}  # heads of all tasks often lie in one file

    def entry(path: Path, hash_of: Callable[[Path], str] = sha256_of_checkpoint) -> dict[str, str]:
        if path not in hashes:
            hashes[path] = hash_of(path)
        return {"file": source_name(path), "sha256": hashes[path]}

    return {
        t.name: {
            "checkpoint": entry(t.checkpoint, sha256_of_adapter if t.is_adapter else sha256_of_checkpoint),
            "head": entry(t.head.file),
        }
        for t in recipe.tasks
    }
