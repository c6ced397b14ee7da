"""What `mass inspect` reports, as data and as JSON.

`json_from_inspection` is `Inspection` as one JSON object, field by field as documented below: a tuple is a list,
None is null, and there is no NaN. Fields keep name and meaning while `schema_version` stays; new ones may come.

    format, schema_version, kind, path, producer, model, router, merge, provenance
    tasks         [{name, classes, rank_min, rank_max, unused_triplets, router_rank}]
    size          {parts: [{part, parameters, bytes}], total, separate_models, one_model, ratios}
    overlap       {vh, u, router: {mean: [[..]], chance}, pairs: [{tasks, vh, u, router}]}
    conditioning  [{matrix, u, vh: {directions, width, condition, below_cutoff}}]
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, Literal

from mass_export.subspaces import StackCondition

FORMAT = "mass-inspection"
SCHEMA_VERSION = 1

Kind = Literal["artifact", "bundle"]
Part = Literal["base", "merged", "bases", "vectors", "router", "heads", "engines", "container"]


@dataclass(frozen=True)
class TaskSummary:
    """A task.

    Attributes:
        classes: how many.
        rank_min: smallest kept rank over the matrices.
        rank_max: largest kept rank over the matrices.
        unused_triplets: kept triplets, over all matrices, that are zero because the delta has a smaller rank.
        router_rank: rank of the router's basis without rows that are zero; the largest over its taps.
    """

    name: str
    classes: int
    rank_min: int
    rank_max: int
    unused_triplets: int
    router_rank: int


@dataclass(frozen=True)
class Size:
    """Parameters, and bytes as stored."""

    parameters: int
    bytes: int


@dataclass(frozen=True)
class PartSize(Size):
    """What one part takes; an array that several parts share counts in one of them.

    Attributes:
        part: `base` (the tower; in a bundle the class embedding is added to the positions), `merged` (the first
            pass: whole in an artifact, up to the routing layer in a bundle), `bases` (u, s, vh of every task; in
            a bundle padded to equal ranks), `vectors` (deltas of vector parameters), `router` (its bases
            and calibration), `heads`; in bytes only `engines` (TensorRT's, which hold weights once more) and
            `container` (header, graphs, manifest, padding).
    """

    part: Part


@dataclass(frozen=True)
class SizeRatios:
    """Total over that of T separate models, and over that of one model."""

    parameters_to_separate_models: float
    bytes_to_separate_models: float
    parameters_to_one_model: float
    bytes_to_one_model: float


@dataclass(frozen=True)
class SizeSummary:
    """All parts, against the alternatives.

    Attributes:
        parts: in a fixed order; they add up to `total`, whose bytes are those on the disk.
        separate_models: T towers, and the heads.
        one_model: one tower, and the heads.
    """

    parts: tuple[PartSize, ...]
    total: Size
    separate_models: Size
    one_model: Size
    ratios: SizeRatios


@dataclass(frozen=True)
class OverlapMatrix:
    """Mean squared cosine of principal angles, averaged over matrices (see `subspaces.stack_geometry`).

    Attributes:
        mean: 0 (orthogonal) to 1 (one subspace lies in the other), symmetric, in the order of the tasks; None
            where a task has no directions. [T, T]
        chance: what random subspaces would give, averaged over the pairs; None if there are none.
    """

    mean: tuple[tuple[float | None, ...], ...]
    chance: float | None


@dataclass(frozen=True)
class PairOverlap:
    """Two tasks and their overlaps, as in `OverlapMatrix`."""

    tasks: tuple[str, str]
    vh: float | None
    u: float | None
    router: float | None


@dataclass(frozen=True)
class Overlap:
    """Overlap of the tasks' subspaces.

    Attributes:
        vh: row spaces of vh, over all matrices.
        u: column spaces of u, over all matrices.
        router: row spaces of the router's bases, over its taps.
        pairs: every pair of tasks, the largest overlap of vh first.
    """

    vh: OverlapMatrix
    u: OverlapMatrix
    router: OverlapMatrix
    pairs: tuple[PairOverlap, ...]


@dataclass(frozen=True)
class MatrixCondition:
    """Conditioning of one matrix' stacks of all tasks, U [D_out, K] and VH [K, D_in]."""

    matrix: str
    u: StackCondition
    vh: StackCondition


@dataclass(frozen=True)
class Inspection:
    """Everything that `mass inspect` says.

    Attributes:
        kind: what was inspected.
        path: as it was given.
        producer: the program that wrote it.
        model: the vision tower, `spec.VisionSpec`.
        router: mode, threshold, temperature, max_tasks, site, token, norm and what else is stored of the router;
            `layers` that it reads, counted from 0, and `taps`, the matrices whose input it reads
            against bases; for an artifact `calibration`, what images taught it, or None.
        merge: base_merge, compose, sum_weights, vectors, head_choice.
        provenance: names and checksums of what it was made from.
    """

    format: str
    schema_version: int
    kind: Kind
    path: str
    producer: str
    model: dict[str, Any]
    tasks: tuple[TaskSummary, ...]
    router: dict[str, Any]
    merge: dict[str, Any]
    size: SizeSummary
    overlap: Overlap
    conditioning: tuple[MatrixCondition, ...]
    provenance: dict[str, Any]


def json_from_inspection(inspection: Inspection) -> str:
    """One JSON object; see the module's docstring."""
    return json.dumps(dataclasses.asdict(inspection), indent=1, ensure_ascii=False, allow_nan=False)
