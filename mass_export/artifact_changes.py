"""Tasks added to an artifact, or removed from it; the factors of all others stay as they are.

What depends on all tasks is made anew or dropped: the merge of the first pass, and the router's calibration. Ranks
stay, too: with T tasks merged at ratio 1/T and k more added, the ratio is still 1/T, not 1/(T + k).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from mass_export.artifact import Artifact, TaskFactors
from mass_export.checkpoints import load_checkpoint
from mass_export.errors import RecipeError
from mass_export.factor_cache import FactorCache
from mass_export.heads import Head, load_head
from mass_export.merge import FULL_DELTAS, TaskFactorizer, merge_first_pass, task_provenance
from mass_export.progress import Progress
from mass_export.recipe_fragment import Fragment, load_fragment
from mass_export.spec import TaskInfo
from mass_export.task_factors import ranks_of
from runtime.checksums import sha256_of_file

_FULL_RANK = 1.0


class ChangedArtifactWarning(UserWarning):
    """A change has a consequence that is easily overlooked."""


def change_artifact(
    artifact: Artifact,
    path: Path,
    *,
    add: Sequence[Path] = (),
    remove: Sequence[str] = (),
    progress: Progress,
    allow_pickle: bool = False,
    cache: FactorCache | None = None,
) -> Artifact:
    """Remove tasks by name, then add those of recipe fragments, in this order.

    Args:
        artifact: what `mass merge` wrote.
        path: its file, for messages.
        add: fragments, see `mass_export.recipe_fragment`.
        remove: names of tasks.
        progress: where to show it.
        allow_pickle: also take the parameters of pickled modules.
        cache: where factors of added tasks are kept until all are done.

    Raises:
        MassExportError: a task is unknown, the last one, or already there; an input does not fit; or the first
            pass was merged from full deltas, which the artifact does not hold.
    """
    method = artifact.info.merge.base_merge
    if method in FULL_DELTAS:
        raise RecipeError(
            f"{path}: its first pass (base_merge: {method}) is merged from the full deltas of all tasks, which an "
            "artifact does not hold; merge the whole recipe again."
        )
    changed = _without(artifact, path, remove) if remove else artifact
    for file in add:
        fragment = load_fragment(file, changed.info, allow_pickle=allow_pickle)
        changed = _with(changed, fragment, path, progress, cache)
    if method == "file":
        warnings.warn(
            f"{path}: the first pass stays the merged checkpoint that the recipe gave, whose tasks are the old ones.",
            ChangedArtifactWarning,
            stacklevel=2,
        )
        return changed
    merged = merge_first_pass(changed.base, list(changed.tasks), {}, method, progress)
    return dataclasses.replace(changed, merged=merged)


def _without(artifact: Artifact, path: Path, names: Sequence[str]) -> Artifact:
    info = artifact.info
    known = [task.name for task in info.tasks]
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise RecipeError(f"{path}: no task {', '.join(unknown)}; it holds {', '.join(known)}.")
    kept = [index for index, name in enumerate(known) if name not in names]
    if not kept:
        raise RecipeError(
            f"{path}: removing {', '.join(known)} leaves no task; keep one, or merge another recipe."
        )
    return _replaced(
        artifact,
        path,
        info.provenance
        | {
            "tasks": {k: v for k, v in info.provenance.get("tasks", {}).items() if k not in names},
            "changes": [*info.provenance.get("changes", []), *({"removed": name} for name in names)],
        },
        tasks=[info.tasks[i] for i in kept],
        rank_ratios=[info.rank_ratios[i] for i in kept],
        ranks=[info.ranks[i] for i in kept] if info.ranks else [None] * len(kept),
        factors=[artifact.tasks[i] for i in kept],
        router_bases=[artifact.router_bases[i] for i in kept],
        heads=[artifact.heads[i] for i in kept],
    )


def _with(
    artifact: Artifact, fragment: Fragment, path: Path, progress: Progress, cache: FactorCache | None
) -> Artifact:
    recipe, info = fragment.recipe, artifact.info
    if fragment.base is not None:
        _check_base(artifact, fragment, path)
    hashes = task_provenance(recipe)
    heads = [load_head(t.head, t.name, t.classes, info.vision.embed_dim) for t in recipe.tasks]
    base_sha256 = str(info.provenance.get("base", {}).get("sha256", ""))
    factorizer = TaskFactorizer(recipe, artifact.base, base_sha256, torch.float32, progress, cache)
    widest = {
        name: max(task.matrices[name].rank for task in artifact.tasks) for name in info.vision.matrix_names()
    }
    factors: list[TaskFactors] = []
    bases = []
    for task in progress.track(recipe.tasks, "Factorising tasks"):
        ranks = ranks_of(task, info.vision) if task.name in fragment.own_ranks else widest
        added, router_bases = factorizer.factors(task, ranks, hashes[task.name]["checkpoint"]["sha256"])
        factors.append(added)
        bases.append(router_bases)
    changed = _replaced(
        artifact,
        path,
        info.provenance
        | {
            "tasks": info.provenance.get("tasks", {}) | hashes,
            "changes": [
                *info.provenance.get("changes", []),
                {
                    "added": [task.name for task in recipe.tasks],
                    "fragment": {"file": recipe.path.name, "sha256": sha256_of_file(recipe.path)},
                },
            ],
        },
        tasks=[*info.tasks, *(TaskInfo(t.name, t.classes) for t in recipe.tasks)],
        rank_ratios=[*info.rank_ratios, *(t.rank_ratio for t in recipe.tasks)],
        ranks=[*(info.ranks or [None] * len(info.tasks)), *(t.rank for t in recipe.tasks)],
        factors=[*artifact.tasks, *factors],
        router_bases=[*artifact.router_bases, *bases],
        heads=[*artifact.heads, *heads],
    )
    _warn_if_crowded(changed, path)
    return changed


def _replaced(
    artifact: Artifact,
    path: Path,
    provenance: dict[str, Any],
    *,
    tasks: Sequence[TaskInfo],
    rank_ratios: Sequence[float | None],
    ranks: Sequence[int | None],
    factors: Sequence[TaskFactors],
    router_bases: Sequence[dict[str, torch.Tensor]],
    heads: Sequence[Head],
) -> Artifact:
    """The artifact with other tasks and without a calibration."""
    if artifact.calibration is not None:
        warnings.warn(
            f"{path}: the router's calibration was for the old tasks and is left out; run mass calibrate again.",
            ChangedArtifactWarning,
            stacklevel=4,
        )
    artifact = artifact.without_calibration()
    info = dataclasses.replace(
        artifact.info,
        tasks=tuple(tasks),
        rank_ratios=tuple(rank_ratios),
        ranks=tuple(ranks),
        provenance=provenance,
    )
    return dataclasses.replace(
        artifact,
        info=info,
        tasks=tuple(factors),
        router_bases=tuple(router_bases),
        heads=tuple(heads),
    )


def _check_base(artifact: Artifact, fragment: Fragment, path: Path) -> None:
    recipe = fragment.recipe
    given = load_checkpoint(recipe.base, recipe.vision, allow_pickle=recipe.allow_pickle)
    if not all(torch.equal(given[name], tensor) for name, tensor in artifact.base.items()):
        raise RecipeError(
            f"{recipe.path}: base: {recipe.base} is not the base of {path}; give that, or leave it out."
        )


def _warn_if_crowded(artifact: Artifact, path: Path) -> None:
    """Say when the ranks of all tasks together exceed a matrix' smaller side, as those of ratio 1/T never do."""
    shapes: Mapping[str, tuple[int, ...]] = artifact.info.vision.parameter_shapes()
    share = max(
        sum(task.matrices[name].rank for task in artifact.tasks) / min(shapes[name])
        for name in artifact.info.vision.matrix_names()
    )
    if share > _FULL_RANK:
        warnings.warn(
            f"{path}: the tasks' ranks now add up to {share:.2f} of a matrix' full rank, so that their subspaces must "
            f"overlap. The ranks of the old tasks are fixed; merge the whole recipe again for 1/{len(artifact.tasks)}.",
            ChangedArtifactWarning,
            stacklevel=4,
        )
