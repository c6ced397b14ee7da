"""A fragment of a recipe: tasks to add to an artifact, which settles everything else.

    rank_ratio: 0.125       # or `rank: N`; by default as wide as the artifact's widest task
    base: base.safetensors  # only zero-shot heads need it, for the text tower
    tasks:
      - ...                 # as in a recipe

Paths are relative to the fragment.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mass_export.checks import checked_mapping, require
from mass_export.errors import RecipeError
from mass_export.recipe import Recipe, TaskDefaults, task_from_entry
from mass_export.recipe_settings import rank_settings
from mass_export.recipe_sources import checkpoint_source
from mass_export.recipe_yaml import parse_yaml
from mass_export.spec import ArtifactInfo

_KEYS = ("base", "rank_ratio", "rank", "tasks")


@dataclass(frozen=True)
class Fragment:
    """Tasks to add.

    Attributes:
        recipe: the fragment's tasks with the artifact's settings; `base` means nothing if the fragment has none.
        own_ranks: tasks whose rank the fragment gives.
        base: the base that the fragment names, or None.
    """

    recipe: Recipe
    own_ranks: frozenset[str]
    base: Path | None


def load_fragment(path: Path, info: ArtifactInfo, *, allow_pickle: bool = False) -> Fragment:
    """Read and check a fragment.

    Args:
        path: a YAML file.
        info: of the artifact that the tasks are for.
        allow_pickle: also take the parameters of pickled modules.

    Raises:
        RecipeError: the fragment cannot be read, a key is unknown, missing or invalid, or a name is taken.
        HubError: a repository cannot be fetched.
    """
    data = parse_yaml(path)
    try:
        top = checked_mapping(data, _KEYS, "fragment", required=("tasks",))
        entries = top["tasks"]
        require(
            isinstance(entries, list) and bool(entries), f"tasks: expected a list of tasks, got {entries!r}."
        )
        base = None if top.get("base") is None else checkpoint_source(top["base"], "base", path)
        rank_ratio, rank = rank_settings(top, "", _recorded(info))
        shared = TaskDefaults(path, base or path, info.model_config, (rank_ratio, rank), allow_pickle)
        tasks = tuple(task_from_entry(entry, index, shared) for index, entry in enumerate(entries))
        names = [task.name for task in tasks]
        taken = sorted(
            {name for name in names if names.count(name) > 1} | {t.name for t in info.tasks} & set(names)
        )
        require(
            not taken, f"tasks: the name(s) {', '.join(taken)} are taken; rename them, or remove those first."
        )
        for task in tasks:
            require(
                base is not None or task.head.prompts is None,
                f"base: missing; the zero-shot head of {task.name} is made with the text tower of the base.",
            )
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    given = any(top.get(key) is not None for key in ("rank", "rank_ratio"))
    own = {
        str(entry["name"])
        for entry in entries
        if given or any(entry.get(key) is not None for key in ("rank", "rank_ratio"))
    }
    recipe = Recipe(
        path=path,
        vision=info.vision,
        preprocess=info.preprocess,
        model_config=info.model_config,
        base=base or path,
        tasks=tasks,
        rank_ratio=rank_ratio,
        rank=rank,
        merge=info.merge,
        base_merge_file=None,
        router=info.router,
        allow_pickle=allow_pickle,
    )
    return Fragment(recipe, frozenset(own), base)


def _recorded(info: ArtifactInfo) -> tuple[float | None, int | None]:
    """Ratio or rank of the artifact's first task."""
    rank = info.ranks[0] if info.ranks else None
    return (info.rank_ratios[0], None) if rank is None else (None, rank)
