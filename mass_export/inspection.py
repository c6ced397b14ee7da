"""Artifact or bundle -> `Inspection`: read it, add up its parts, compare the tasks' subspaces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.errors import ArtifactError
from mass_export.inspection_report import (
    FORMAT,
    SCHEMA_VERSION,
    Inspection,
    MatrixCondition,
    Overlap,
    OverlapMatrix,
    PairOverlap,
    PartSize,
    Size,
    SizeRatios,
    SizeSummary,
    TaskSummary,
)
from mass_export.inspection_sources import Source, source_from_artifact, source_from_bundle, sum_sizes
from mass_export.progress import Progress
from mass_export.subspaces import StackGeometry, mean_overlap, stack_geometry


def inspect(path: Path, progress: Progress) -> Inspection:
    """Inspect an artifact (a file) or a bundle (a directory).

    Raises:
        ArtifactError: no such path, or a file that is no artifact.
        BundleError: a directory that is no bundle, or a damaged one.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: no such file or directory; give an artifact or a bundle.")
    source = source_from_bundle(path) if path.is_dir() else source_from_artifact(path)
    names = list(source.classes)
    overlap, conditioning = _subspaces(names, source, progress)
    return Inspection(
        format=FORMAT,
        schema_version=SCHEMA_VERSION,
        kind=source.kind,
        path=str(path),
        producer=source.producer,
        model=dataclasses.asdict(source.vision),
        tasks=tuple(_task_summary(source, i, name) for i, name in enumerate(names)),
        router=source.router,
        merge=source.merge,
        size=_size_summary(source),
        overlap=overlap,
        conditioning=conditioning,
        provenance=source.provenance,
    )


def _task_summary(source: Source, index: int, name: str) -> TaskSummary:
    ranks = [matrix.ranks[index] for matrix in source.matrices]
    used = sum(_nonzero_rows(matrix.vh[index]) for matrix in source.matrices)
    router_rank = max((_nonzero_rows(rows[index]) for rows in source.taps.values()), default=0)
    return TaskSummary(name, source.classes[name], min(ranks), max(ranks), sum(ranks) - used, router_rank)


def _nonzero_rows(rows: NDArray[np.floating[Any]]) -> int:
    return int(np.any(rows != 0, axis=1).sum())


def _size_summary(source: Source) -> SizeSummary:
    base, heads, total = source.parts["base"], source.parts["heads"], sum_sizes(source.parts.values())
    tower_parameters = sum(math.prod(shape) for shape in source.vision.parameter_shapes().values())
    item_bytes = base.bytes / base.parameters
    separate, one = (
        Size(
            towers * tower_parameters + heads.parameters,
            round(towers * tower_parameters * item_bytes) + heads.bytes,
        )
        for towers in (len(source.classes), 1)
    )
    ratios = SizeRatios(
        parameters_to_separate_models=total.parameters / separate.parameters,
        bytes_to_separate_models=total.bytes / separate.bytes,
        parameters_to_one_model=total.parameters / one.parameters,
        bytes_to_one_model=total.bytes / one.bytes,
    )
    parts = tuple(PartSize(size.parameters, size.bytes, part) for part, size in source.parts.items())
    return SizeSummary(parts, total, separate, one, ratios)


def _subspaces(
    names: Sequence[str], source: Source, progress: Progress
) -> tuple[Overlap, tuple[MatrixCondition, ...]]:
    u: list[StackGeometry] = []
    vh: list[StackGeometry] = []
    for matrix in progress.track(source.matrices, "Comparing subspaces"):
        u.append(matrix.u_geometry)
        vh.append(matrix.vh_geometry)
    at_taps = [stack_geometry(rows) for rows in source.taps.values()]
    of_vh, of_u, of_router = (_overlap_matrix(geometries, len(names)) for geometries in (vh, u, at_taps))
    pairs = [
        PairOverlap((name, names[j]), of_vh.mean[i][j], of_u.mean[i][j], of_router.mean[i][j])
        for i, name in enumerate(names)
        for j in range(i + 1, len(names))
    ]
    pairs.sort(key=lambda pair: -1.0 if pair.vh is None else pair.vh, reverse=True)
    rows = zip(source.matrices, u, vh, strict=True)
    conditioning = tuple(MatrixCondition(m.name, left.condition, right.condition) for m, left, right in rows)
    return Overlap(of_vh, of_u, of_router, tuple(pairs)), conditioning


def _overlap_matrix(geometries: Sequence[StackGeometry], tasks: int) -> OverlapMatrix:
    if not geometries:
        return OverlapMatrix(((None,) * tasks,) * tasks, None)
    mean, chance = mean_overlap(geometries)
    off_diagonal = chance[np.triu_indices(len(chance), k=1)]
    known = off_diagonal[~np.isnan(off_diagonal)]
    return OverlapMatrix(
        tuple(tuple(None if math.isnan(value) else value for value in row) for row in mean.tolist()),
        float(known.mean()) if known.size else None,
    )
