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

import yaml

from mass_export.checks import checked_mapping, is_int, is_real, require, require_choice
from mass_export.errors import RecipeError
from mass_export.model_config import load_model_config, preprocess_spec_from_config, vision_spec_from_config
from mass_export.recipe_sources import (
    HeadRecipe,
    checkpoint_source,
    file_source,
    head_recipe,
    lines_of,
    text,
    zero_shot_head_recipe,
)
from mass_export.router_spec import PAPER_ROUTER, RouterSettings, default_router, default_routing_layer
from mass_export.spec import MergeSettings, PatchEmbed, TaskInfo, VisionSpec, rank_of
from runtime.bundle import PreprocessSpec

MAX_RECIPE_BYTES = 8 << 20

_MERGE_KEYS = tuple(field.name for field in dataclasses.fields(MergeSettings))
_RANK_KEYS = ("rank_ratio", "rank")
_TOP_KEYS = ("model", "base", *_RANK_KEYS, "rank_budget", "patch_embed", *_MERGE_KEYS, "router", "tasks")
_TASK_KEYS = ("name", "checkpoint", "adapter", "head", "classes", *_RANK_KEYS)


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


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML's safe loader, which would let the last of two equal keys win, made to refuse them."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:  # noqa: FBT001, FBT002
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "keys must be plain text", key.start_mark)
            if (key.tag, key.value) in seen:
                problem = f"the key {key.value!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep=deep)


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
        rank_budget = _rank_budget(top)
        rank_ratio, rank = rank_settings(top, "", (rank_budget or 1 / len(entries), None))
        base = checkpoint_source(top["base"], "base", path)
        settings = TaskDefaults(path, base, config, (rank_ratio, rank), allow_pickle)
        tasks = tuple(task_from_entry(entry, index, settings) for index, entry in enumerate(entries))
        names = [task.name for task in tasks]
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, f"tasks: the name(s) {', '.join(twice)} are given twice; rename one of them.")
        merge, base_merge_file = _merge_settings(top, path)
        adapt_rank = rank_of((vision.width, vision.width), rank_ratio, rank)
        router = _router_settings(top, vision.layers, max(1, adapt_rank // 2), path)
        patch_embed: Any = top.get("patch_embed") or "full"
        require_choice("patch_embed", patch_embed, PatchEmbed)
        require(
            rank_budget is None or not any(set(_RANK_KEYS) & set(entry) for entry in entries),
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
        rank_budget=rank_budget,
        patch_embed=patch_embed,
        allow_pickle=allow_pickle,
    )


def parse_yaml(path: Path) -> object:
    """What a YAML file holds, with errors that name the place."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes; not a recipe.")
        loader = _UniqueKeyLoader(path.read_text(encoding="utf-8"))
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: no such file; give the path of a recipe.") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise RecipeError(f"{path}: not a valid recipe{place}: {problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        if isinstance(error, RecipeError):
            raise
        raise RecipeError(f"{path}: not YAML text; give the path of a recipe.") from error


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


def _rank_budget(top: Mapping[str, Any]) -> float | None:
    budget = top.get("rank_budget")
    if budget is None:
        return None
    valid = is_real(budget) and 0 < budget <= 1
    require(valid, f"rank_budget: expected a number in (0, 1], such as 0.1; got {budget!r}.")
    given = [key for key in _RANK_KEYS if top.get(key) is not None]
    require(not given, f"rank_budget and {', '.join(given)}: give one of them.")
    return float(budget)


def rank_settings(
    data: Mapping[str, Any], prefix: str, default: tuple[float | None, int | None]
) -> tuple[float | None, int | None]:
    """The rank ratio or the fixed rank in `data`, else the default; one of the two is None."""
    ratio, rank = data.get("rank_ratio"), data.get("rank")
    if ratio is None and rank is None:
        return default
    require(
        ratio is None or rank is None, f"{prefix}rank_ratio and {prefix}rank: give one of them, not both."
    )
    if ratio is None:
        require(is_int(rank) and rank >= 1, f"{prefix}rank: expected an integer >= 1, got {rank!r}.")
        return None, rank
    valid = is_real(ratio) and 0 < ratio <= 1
    require(valid, f"{prefix}rank_ratio: expected a number in (0, 1], such as 0.125; got {ratio!r}.")
    return float(ratio), None


def _merge_settings(top: Mapping[str, Any], path: Path) -> tuple[MergeSettings, Path | None]:
    given = {name: top[name] for name in _MERGE_KEYS if top.get(name) is not None}
    file = None
    if top.get("router") in (None, "default"):  # this router reads the base
        given.setdefault("base_merge", "zeroshot")
    if isinstance(given.get("base_merge"), Mapping):
        nested = checked_mapping(given["base_merge"], ("file",), "base_merge", required=("file",))
        given["base_merge"], file = "file", file_source(nested["file"], "base_merge.file", path)
    elif given.get("base_merge") == "file":
        raise RecipeError("base_merge: write {file: merged.safetensors} to start from a merged checkpoint.")
    return MergeSettings(**given), file


def _router_settings(top: Mapping[str, Any], layers: int, half_rank: int, path: Path) -> RouterSettings:
    given = top.get("router")
    if given is None or given == "default":
        return default_router(layers, half_rank)
    if given == "paper":
        return dataclasses.replace(PAPER_ROUTER, layer=default_routing_layer(layers))
    require(
        isinstance(given, Mapping),
        f"router: expected default, paper or a mapping of settings, got {given!r}.",
    )
    if given.get("layers") == "all":
        given = {**given, "layers": list(range(layers))}
    router = RouterSettings.from_mapping(given, str(path), "router")
    if router.layer is None and router.layers is None:
        return dataclasses.replace(router, layer=default_routing_layer(layers))
    deepest = max(tap.layer for tap in router.taps(layers))
    if deepest >= layers:
        raise RecipeError(f"{path}: router.layer: expected 0 to {layers - 1} for this model, got {deepest}.")
    return router
