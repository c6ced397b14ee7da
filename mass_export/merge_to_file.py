"""`mass merge`: a recipe, or an artifact and what changes in it, into an artifact's file."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mass_export.artifact import Artifact, check_destination, read_artifact, write_artifact
from mass_export.artifact_changes import change_artifact
from mass_export.factor_cache import FactorCache
from mass_export.factor_storage import FactorDtype
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import load_recipe


@dataclass(frozen=True)
class MergeOptions:
    """What the command line says besides the recipe.

    Attributes:
        factor_dtype: in which the file holds the tasks; None is float32, or that of the artifact which is changed.
        progress: where to show it.
        allow_pickle: also take the parameters of pickled modules.
    """

    factor_dtype: FactorDtype | None
    progress: Progress
    allow_pickle: bool = False


def merge_to_file(recipe: Path, out: Path, options: MergeOptions) -> Artifact:
    """Merge a recipe and write the artifact; the factors of an interrupted merge are kept beside it, and used.

    Raises:
        MassExportError: an input is missing, damaged or does not fit, or `out` cannot be written.
    """
    parsed = load_recipe(recipe, allow_pickle=options.allow_pickle)
    check_destination(out, parsed.inputs())
    cache = _cache(out)
    factor_dtype = options.factor_dtype or "float32"
    artifact = merge(parsed, options.progress, cache=cache, factor_dtype=factor_dtype)
    write_artifact(out, artifact)
    cache.clear()
    return artifact


def change_file(
    path: Path, out: Path, add: Sequence[Path], remove: Sequence[str], options: MergeOptions
) -> Artifact:
    """Add tasks to an artifact or remove some; `out` may be the artifact itself.

    Raises:
        MassExportError: as `merge_to_file`, and as `change_artifact`.
    """
    check_destination(out, add)
    artifact = read_artifact(path)
    cache = _cache(out)
    changed = change_artifact(
        artifact,
        path,
        add=add,
        remove=remove,
        progress=options.progress,
        allow_pickle=options.allow_pickle,
        cache=cache,
    )
    if options.factor_dtype is not None:
        storage = dataclasses.replace(changed.storage, factor_dtype=options.factor_dtype)
        changed = dataclasses.replace(changed, storage=storage)
    write_artifact(out, changed)
    cache.clear()
    return changed


def _cache(out: Path) -> FactorCache:
    return FactorCache(out.with_name(f".{out.name}.factors"))
