"""The recipe: a YAML file that names the model, the checkpoints and how to merge them.

    model: model_config.json        # an open_clip model name, or a path to its JSON config
    base: base.safetensors
    rank_ratio: 0.125               # default 1/T; or `rank: N`; or `rank_budget: 0.1`, allotted by energy
    patch_embed: full               # full | low_rank; how the artifact stores the deltas of conv1
    base_merge: tsvm                # tsvm | isotropic | mean | zeroshot | {file: ..}; zeroshot if router is default
    compose: tsvm                   # tsvm | sum
    sum_weights: uniform            # uniform | gates; for compose: sum
    vectors: mean                   # mean | base
    head_choice: max                # max | mean
    router: default                 # default | paper | {layer: 9, site: mlp, mode: topk, threshold: 0.2, ..}
    tasks:
      - name: cars
        checkpoint: cars.safetensors
        head: {file: heads.safetensors, tensor: cars.weight, bias: cars.bias}    # bias optional
        classes: [suv, sedan]       # or a text file, one class a line
        rank_ratio: 0.25            # optional; or `rank: N`
      - name: pets
        adapter: pets_lora          # folder of a PEFT LoRA adapter, instead of a checkpoint
        head: {classes: pets.txt, templates: openai}    # zero-shot; templates: openai, a file, or a list

Paths are relative to the recipe. A checkpoint is a file, a folder, or a repository of the hub, `hf:org/name` or
`hf:org/name@revision`. Only model, base and tasks are required.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mass_export.checks import checked_mapping, require, require_choice
from mass_export.errors import RecipeError
from mass_export.model_config import load_model_config, preprocess_spec_from_config, vision_spec_from_config
from mass_export.recipe_settings import (
    MERGE_KEYS,
    RANK_KEYS,
    merge_settings,
    rank_budget,
    rank_settings,
    router_settings,
)
from mass_export.recipe_sources import (
    HeadRecipe,
    checkpoint_source,
    head_recipe,
    lines_of,
    text,
    zero_shot_head_recipe,
)
from mass_export.recipe_yaml import parse_yaml
from mass_export.router_spec import RouterSettings
from mass_export.spec import MergeSettings, PatchEmbed, TaskInfo, VisionSpec, rank_of
from runtime.bundle import PreprocessSpec

_TOP_KEYS = ("model", "base", *RANK_KEYS, "rank_budget", "patch_embed", *MERGE_KEYS, "router", "tasks")
_TASK_KEYS = ("name", "checkpoint", "adapter", "head", "classes", *RANK_KEYS)


@dataclass(frozen=True)
class TaskRecipe:
    """One task. `rank_ratio` or `rank` is the one in force: the task's own, else the recipe's.

    Attributes:
        checkpoint: file or folder of the fine-tuned model, or folder of an adapter.
        is_adapter: which of the two.
    """

    name: str
    checkpoint: Path
    head: HeadRecipe
    classes: tuple[str, ...]
    rank_ratio: float | None
    rank: int | None
    is_adapter: bool = False


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: every file in it exists, every setting is valid, `router.layer` is a number.

    Attributes:
        path: the recipe's own file.
        model_config: open_clip's model config, parsed.
        rank_ratio: 1/T unless given; None where `rank` is given.
        base_merge_file: merged checkpoint of the first pass, for `base_merge: {file: ..}`.
        rank_budget: the ratio whose number of parameters is allotted to the matrices by energy, or None.
        patch_embed: how the artifact stores the deltas of conv1.
        allow_pickle: whether pickled modules are read.
    """

    path: Path
    vision: VisionSpec
    preprocess: PreprocessSpec
    model_config: dict[str, Any]
    base: Path
    tasks: tuple[TaskRecipe, ...]
    rank_ratio: float | None
    rank: int | None
    merge: MergeSettings
    base_merge_file: Path | None
    router: RouterSettings
    rank_budget: float | None = None
    patch_embed: PatchEmbed = "full"
    allow_pickle: bool = False

    def inputs(self) -> tuple[Path, ...]:
        """Every file that the merge reads."""
        per_task = [path for task in self.tasks for path in (task.checkpoint, task.head.file)]
        extra = [] if self.base_merge_file is None else [self.base_merge_file]
        return (self.path, self.base, *per_task, *extra)


def load_recipe(path: Path, *, allow_pickle: bool = False) -> Recipe:
    """Read and check a recipe; repositories of the hub are fetched, unless they are in its cache.

    Args:
        path: a YAML file.
        allow_pickle: also take the parameters of pickled modules.

    Raises:
        RecipeError: the recipe cannot be read, or a key is unknown, missing or invalid; it is named.
        ModelConfigError: the model is unknown or not supported.
        HubError: a repository cannot be fetched.
    """
    data = parse_yaml(path)
    try:
        top = checked_mapping(data, _TOP_KEYS, "recipe", required=("model", "base", "tasks"))
        config, preprocess, where = load_model_config(text(top["model"], "model"), path.parent)
        vision = vision_spec_from_config(config, where)
        entries = top["tasks"]
        require(
            isinstance(entries, list) and bool(entries), f"tasks: expected a list of tasks, got {entries!r}."
        )
        budget = rank_budget(top)
        rank_ratio, rank = rank_settings(top, "", (budget or 1 / len(entries), None))
        base = checkpoint_source(top["base"], "base", path)
        settings = TaskDefaults(path, base, config, (rank_ratio, rank), allow_pickle)
        tasks = tuple(task_from_entry(entry, index, settings) for index, entry in enumerate(entries))
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"tasks: the name(s) {', '.join(twice)} are given twice; rename one of them.")
        merge, base_merge_file = merge_settings(top, path)
        adapt_rank = rank_of((vision.width, vision.width), rank_ratio, rank)
        router = router_settings(top, vision.layers, max(1, adapt_rank // 2), path)
        patch_embed: Any = top.get("patch_embed") or "full"
        require_choice("patch_embed", patch_embed, PatchEmbed)
        require(
            budget is None or not any(set(RANK_KEYS) & set(entry) for entry in entries),
            "rank_budget: allots the ranks of all tasks; leave out rank and rank_ratio of single tasks.",
        )
    except RecipeError as error:
        raise RecipeError(f"{path}: {error}") from error
    return Recipe(
        path=path,
        vision=vision,
        preprocess=preprocess_spec_from_config(preprocess, vision.image_size, where),
        model_config=config,
        base=base,
        tasks=tasks,
        rank_ratio=rank_ratio,
        rank=rank,
        merge=merge,
        base_merge_file=base_merge_file,
        router=router,
        rank_budget=budget,
        patch_embed=patch_embed,
        allow_pickle=allow_pickle,
    )


@dataclass(frozen=True)
class TaskDefaults:
    """What every task's entry is read with."""

    path: Path
    base: Path
    config: dict[str, Any]
    rank: tuple[float | None, int | None]
    allow_pickle: bool


def task_from_entry(entry: object, index: int, shared: TaskDefaults) -> TaskRecipe:
    """Read and check one entry of `tasks`."""
    key, path = f"tasks[{index}]", shared.path
    if isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        key += f" ({entry['name']})"
    data = checked_mapping(entry, _TASK_KEYS, key, required=("name", "head"))
    sources = [kind for kind in ("checkpoint", "adapter") if data.get(kind) is not None]
    require(bool(sources), f"{key}: missing key(s) checkpoint (or adapter).")
    require(len(sources) == 1, f"{key}: checkpoint and adapter: give one of them, not both.")
    prompts = (
        isinstance(data["head"], Mapping) and "file" not in data["head"] and "tensor" not in data["head"]
    )
    classes = data["head"].get("classes") if prompts and data.get("classes") is None else data.get("classes")
    require(classes is not None, f"{key}: missing key(s) classes.")
    try:
        info = TaskInfo(text(data["name"], "name"), lines_of(classes, f"{key}.classes", path, "class"))
    except RecipeError as error:
        raise RecipeError(str(error) if key in str(error) else f"{key}: {error}") from error
    rank_ratio, fixed_rank = rank_settings(data, f"{key}.", shared.rank)
    if prompts:
        head = zero_shot_head_recipe(
            data["head"], f"{key}.head", path, shared.base, shared.config, info.classes
        )
    else:
        head = head_recipe(data["head"], f"{key}.head", path)
    return TaskRecipe(
        name=info.name,
        checkpoint=checkpoint_source(
            data[sources[0]], f"{key}.{sources[0]}", path, folder=sources == ["adapter"]
        ),
        head=dataclasses.replace(head, allow_pickle=shared.allow_pickle),
        classes=info.classes,
        rank_ratio=rank_ratio,
        rank=fixed_rank,
        is_adapter=sources == ["adapter"],
    )
