"""What a recipe says of ranks, of the merge and of the router."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mass_export.checks import checked_mapping, is_int, is_real, require
from mass_export.errors import RecipeError
from mass_export.recipe_sources import file_source
from mass_export.router_spec import PAPER_ROUTER, RouterSettings, default_router, default_routing_layer
from mass_export.spec import MergeSettings

MERGE_KEYS = tuple(field.name for field in dataclasses.fields(MergeSettings))
RANK_KEYS = ("rank_ratio", "rank")


def rank_budget(top: Mapping[str, Any]) -> float | None:
    """The ratio whose number of parameters is allotted by energy, or None."""
    budget = top.get("rank_budget")
    if budget is None:
        return None
    valid = is_real(budget) and 0 < budget <= 1
    require(valid, f"rank_budget: expected a number in (0, 1], such as 0.1; got {budget!r}.")
    given = [key for key in RANK_KEYS if top.get(key) is not None]
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


def merge_settings(top: Mapping[str, Any], path: Path) -> tuple[MergeSettings, Path | None]:
    """How to merge, and the merged checkpoint that the first pass is given, if it is."""
    given = {name: top[name] for name in MERGE_KEYS if top.get(name) is not None}
    file = None
    if top.get("router") in (None, "default"):  # this router reads the base
        given.setdefault("base_merge", "zeroshot")
    if isinstance(given.get("base_merge"), Mapping):
        nested = checked_mapping(given["base_merge"], ("file",), "base_merge", required=("file",))
        given["base_merge"], file = "file", file_source(nested["file"], "base_merge.file", path)
    elif given.get("base_merge") == "file":
        raise RecipeError("base_merge: write {file: merged.safetensors} to start from a merged checkpoint.")
    return MergeSettings(**given), file


def router_settings(top: Mapping[str, Any], layers: int, half_rank: int, path: Path) -> RouterSettings:
    """The router, its layer filled in.

    Args:
        top: the recipe.
        layers: blocks of the tower.
        half_rank: of a task's bases; what the default router reads.
        path: of the recipe.
    """
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
