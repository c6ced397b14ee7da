"""The merged artifact: one self-describing safetensors file with everything that export needs.

The header's metadata holds `format`, `schema_version`, `info` (an `ArtifactInfo` in JSON) and `sha256` (of the file,
see `mass_export.safetensors_writer`). Tensors:

    base.<parameter>                     the base tower
    merged.<parameter>                   the tower of the first pass; absent when base_merge is zeroshot
    tasks.<task>.<parameter>.u|s|vh      factors of a matrix' delta: [D_out, R], [R], [R, D_in]
    tasks.<task>.<parameter>.delta       the delta of a vector parameter
    router.<task>.<parameter>.vh         the router's basis at the tap that <parameter> reads: [R, D]
    heads.<task>.weight|bias             [C, E], [C]; the bias is optional
    calibration.offset|scale             mean and spread of each task's residual at each tap: [L, T]; optional
    calibration.weight|bias              linear discriminant over M taps: [T, M*D], [T]; optional
    calibration.whiten|centres|nothing   what known images look like, and dull ones: [D, D], [K, D], [M, D]; optional
    calibration.stop_*                   the same five at each of E early stops: [E, ..]; optional

Tensors are float32, float16 or bfloat16 in the file, or encoded (`mass_export.factor_storage`), and float32 once
read. Equal artifacts give equal bytes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mass_export.artifact_header import info_from_metadata, metadata_from_info
from mass_export.errors import ArtifactError, shortened
from mass_export.factor_storage import Storage, decode, encode, storage_of
from mass_export.heads import Head
from mass_export.low_rank import LowRank, orthonormal_rows
from mass_export.router_spec import CalibrationInfo
from mass_export.safetensors_writer import has_its_checksum, write_safetensors
from mass_export.spec import ArtifactInfo

STOPS = ("stop_weight", "stop_bias", "stop_whiten", "stop_centres")
NOTHING = ("nothing", "stop_nothing")  # older artifacts have none
CALIBRATION_OPTIONAL = ("weight", "bias", "whiten", "centres", *STOPS, *NOTHING)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ANY_RANK = -1


@dataclass(frozen=True)
class TaskFactors:
    """A task vector: its matrices as factors, its vector parameters as whole deltas."""

    matrices: dict[str, LowRank]
    vectors: dict[str, Tensor]


@dataclass(frozen=True)
class Calibration:
    """What images taught the router; `info.calibration` says how it is used.

    Attributes:
        offset: subtracted from each tap's residuals. [L, T]
        scale: then divides them, > 0. [L, T]
        weight: linear discriminant on the features at `info.calibration.discriminant`, M taps. [T, M*D] or None
        bias: [T] or None
        whiten: inverse square root of the features' covariance within groups at `info.calibration.unknown`.
            [D, D] or None
        centres: whitened means of the K groups. [K, D] or None
        nothing: whitened features of M images of nothing. [M, D] or None
        stop_weight, stop_bias: discriminants of the early stops, zero where one does not read. [E, T, M*D], [E, T]
        stop_whiten, stop_centres: what known images look like there, scaled to the one threshold. [E, D, D], [E, K, D]
        stop_nothing: the same for `nothing`. [E, M, D] or None
    """

    offset: Tensor
    scale: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    whiten: Tensor | None = None
    centres: Tensor | None = None
    stop_weight: Tensor | None = None
    stop_bias: Tensor | None = None
    stop_whiten: Tensor | None = None
    stop_centres: Tensor | None = None
    nothing: Tensor | None = None
    stop_nothing: Tensor | None = None

    def known_at_stop(self, index: int) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """What `whitened_distance` compares with at an early stop: whiten, centres, nothing; None if there is none."""
        if self.stop_whiten is None or self.stop_centres is None:
            return None
        nothing = None if self.stop_nothing is None else self.stop_nothing[index]
        return self.stop_whiten[index], self.stop_centres[index], nothing

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclass(frozen=True)
class Artifact:
    """What `mass merge` makes.

    Attributes:
        base: parameters of the base tower.
        merged: parameters of the first pass' tower; empty when it is the base (`base_merge: zeroshot`).
        tasks: factors, in the order of `info.tasks`, as are all that follow.
        router_bases: of each task, by the parameter that reads the tap; orthonormal rows. [R, D] each
        heads: one per task.
        calibration: of the router, if there is one.
        storage: how it lies in its file.
    """

    info: ArtifactInfo
    base: dict[str, Tensor]
    merged: dict[str, Tensor]
    tasks: tuple[TaskFactors, ...]
    router_bases: tuple[dict[str, Tensor], ...]
    heads: tuple[Head, ...] = field(default=())
    calibration: Calibration | None = None
    storage: Storage = field(default=Storage())

    @cached_property
    def routing_bases(self) -> tuple[dict[str, Tensor], ...]:
        """`router_bases` for use: their rows are orthonormal also where the file holds them in fewer bits."""
        return tuple(
            {name: orthonormal_rows(vh) for name, vh in bases.items()} for bases in self.router_bases
        )

    def without_calibration(self) -> Artifact:
        """The artifact before it was calibrated, with the router's settings of then."""
        if self.info.calibration is None:
            return self
        router = self.info.calibration.router or self.info.router
        info = dataclasses.replace(self.info, router=router, calibration=None)
        return dataclasses.replace(self, info=info, calibration=None)


def check_destination(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse, before any work is done, a place where an artifact cannot or should not be written.

    Raises:
        ArtifactError: its directory does not exist, it is a directory, or it is one of the inputs.
    """
    if not path.parent.is_dir():
        raise ArtifactError(f"{path}: the directory {path.parent} does not exist; make it first.")
    if path.is_dir():
        raise ArtifactError(f"{path}: is a directory; give the name of a file to write.")
    if path.resolve() in {given.resolve() for given in inputs}:
        raise ArtifactError(f"{path}: is an input of the merge; give another name for its result.")


def write_artifact(path: Path, artifact: Artifact) -> None:
    """Check and write an artifact, all or nothing, encoded as its `storage` says.

    Raises:
        ArtifactError: the tensors do not fit the header, or the file cannot be written.
    """
    tensors = _tensors_from_artifact(artifact)
    _check_layout(tensors, artifact.info, str(path))
    _check_values(tensors, str(path))
    tensors = encode(tensors, artifact.storage)
    try:
        write_safetensors(path, tensors, metadata_from_info(artifact.info))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written ({error.strerror}).") from error


def read_artifact(path: Path) -> Artifact:
    """Read and check an artifact; float32 tensors may be mapped from the file.

    Raises:
        ArtifactError: no such file, damaged, no artifact, of another schema version, or inconsistent.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: no such file; give the artifact that mass merge wrote.")
    try:
        file = cast("Any", safe_open(path, framework="pt"))
        info = info_from_metadata(file.metadata(), str(path))
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(
            f"{path}: not a complete safetensors file ({error}); copy or merge it again."
        ) from error
    storage = storage_of(tensors)
    tensors = decode(tensors, str(path))
    _check_layout(tensors, info, str(path))
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    _check_values(tensors, str(path))
    if has_its_checksum(path) is False:
        raise ArtifactError(
            f"{path}: was changed since it was written (its sha256 differs). Copy or merge the artifact again."
        )
    return dataclasses.replace(_artifact_from_tensors(info, tensors), storage=storage)


def _tensors_from_artifact(artifact: Artifact) -> dict[str, Tensor]:
    names = [task.name for task in artifact.info.tasks]
    counts = {len(artifact.tasks), len(artifact.router_bases), len(artifact.heads)}
    if counts != {len(names)}:
        raise ArtifactError(f"{len(names)} tasks, but factors, router bases and heads for {sorted(counts)}.")
    tensors = {f"base.{name}": tensor for name, tensor in artifact.base.items()}
    tensors |= {f"merged.{name}": tensor for name, tensor in artifact.merged.items()}
    rows = zip(names, artifact.tasks, artifact.router_bases, artifact.heads, strict=True)
    for task, factors, router_bases, head in rows:
        for name, matrix in factors.matrices.items():
            stem = f"tasks.{task}.{name}"
            tensors |= {f"{stem}.u": matrix.u, f"{stem}.s": matrix.s, f"{stem}.vh": matrix.vh}
        tensors |= {f"tasks.{task}.{name}.delta": delta for name, delta in factors.vectors.items()}
        tensors |= {f"router.{task}.{name}.vh": vh for name, vh in router_bases.items()}
        tensors[f"heads.{task}.weight"] = head.weight
        if head.bias is not None:
            tensors[f"heads.{task}.bias"] = head.bias
    if artifact.calibration is not None:
        tensors |= {f"calibration.{name}": t for name, t in artifact.calibration.tensors().items()}
    return tensors


def _artifact_from_tensors(info: ArtifactInfo, tensors: Mapping[str, Tensor]) -> Artifact:
    shapes, matrices = info.vision.parameter_shapes(), info.vision.matrix_names()

    def factors(task: str) -> TaskFactors:
        stem = f"tasks.{task}."
        return TaskFactors(
            {
                name: LowRank(*(tensors[f"{stem}{name}.{part}"] for part in ("u", "s", "vh")))
                for name in matrices
            },
            {name: tensors[f"{stem}{name}.delta"] for name in shapes if name not in matrices},
        )

    names = [task.name for task in info.tasks]
    return Artifact(
        info=info,
        base={name: tensors[f"base.{name}"] for name in shapes},
        merged={name: tensors[f"merged.{name}"] for name in shapes if f"merged.{name}" in tensors},
        tasks=tuple(factors(name) for name in names),
        router_bases=tuple(
            {tap.parameter: tensors[f"router.{name}.{tap.parameter}.vh"] for tap in info.taps()}
            for name in names
        ),
        heads=tuple(Head(tensors[f"heads.{n}.weight"], tensors.get(f"heads.{n}.bias")) for n in names),
        calibration=_calibration(info, tensors),
    )


def _calibration(info: ArtifactInfo, tensors: Mapping[str, Tensor]) -> Calibration | None:
    if info.calibration is None:
        return None
    given = {name: tensors.get(f"calibration.{name}") for name in CALIBRATION_OPTIONAL}
    return Calibration(tensors["calibration.offset"], tensors["calibration.scale"], **given)


def _expected_shapes(info: ArtifactInfo) -> dict[str, tuple[int, ...]]:
    """Every tensor that may be there; a rank is _ANY_RANK."""
    vision = info.vision
    shapes, matrices = vision.parameter_shapes(), set(vision.matrix_names())
    expected = {f"base.{name}": shape for name, shape in shapes.items()}
    if info.merge.base_merge != "zeroshot":
        expected |= {f"merged.{name}": shape for name, shape in shapes.items()}
    for task in info.tasks:
        for name, shape in shapes.items():
            stem = f"tasks.{task.name}.{name}"
            if name in matrices:
                expected[f"{stem}.u"] = (shape[0], _ANY_RANK)
                expected[f"{stem}.s"] = (_ANY_RANK,)
                expected[f"{stem}.vh"] = (_ANY_RANK, shape[1])
            else:
                expected[f"{stem}.delta"] = shape
        for tap in info.taps():
            expected[f"router.{task.name}.{tap.parameter}.vh"] = (_ANY_RANK, vision.width)
        expected[f"heads.{task.name}.weight"] = (len(task.classes), vision.embed_dim)
        expected[f"heads.{task.name}.bias"] = (len(task.classes),)
    if info.calibration is not None:
        table = (len(info.taps()), len(info.tasks))
        expected |= {"calibration.offset": table, "calibration.scale": table}
        if info.calibration.discriminant:
            read = len(info.calibration.discriminant) * vision.width
            expected["calibration.weight"] = (len(info.tasks), read)
            expected["calibration.bias"] = (len(info.tasks),)
        if info.calibration.unknown is not None:
            expected["calibration.whiten"] = (vision.width, vision.width)
            expected["calibration.centres"] = (_ANY_RANK, vision.width)
            expected["calibration.nothing"] = (_ANY_RANK, vision.width)
        expected |= _stop_shapes(info.calibration, expected)
    return expected


def _stop_shapes(
    info: CalibrationInfo, expected: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """Tensors of the early stops: those of the last, for each of them."""
    known = ("whiten", "centres", "nothing") if info.unknown is not None else ()
    names = ("weight", "bias", *known) if info.stops else ()
    return {f"calibration.stop_{name}": (len(info.stops), *expected[f"calibration.{name}"]) for name in names}


def _check_layout(tensors: Mapping[str, Tensor], info: ArtifactInfo, where: str) -> None:
    """Compare names, shapes, ranks and dtypes with the header; every problem is named at once."""
    expected = _expected_shapes(info)
    optional = {f"heads.{task.name}.bias" for task in info.tasks}
    optional |= {f"calibration.{name}" for name in NOTHING}
    problems = [f"{name} is missing" for name in sorted(set(expected) - set(tensors) - optional)]
    problems += [f"{name} is unexpected" for name in sorted(set(tensors) - set(expected))]
    for name, tensor in tensors.items():
        got, shape = tuple(tensor.shape), expected.get(name, tuple(tensor.shape))
        if len(got) != len(shape) or any(a not in (b, _ANY_RANK) for a, b in zip(shape, got, strict=True)):
            problems.append(f"{name}: expected shape {_shape_text(shape)}, got {list(got)}")
        if tensor.dtype not in DTYPES:
            problems.append(f"{name}: expected float32, float16 or bfloat16, got {tensor.dtype}")
    if not problems:
        problems = _rank_problems(tensors)
    if problems:
        raise ArtifactError(
            f"{where}: the tensors do not fit the header: {shortened(problems, separator='; ')}. "
            "Copy or merge the artifact again."
        )


def _rank_problems(tensors: Mapping[str, Tensor]) -> list[str]:
    problems = []
    for name in tensors:
        if name.startswith("tasks.") and name.endswith(".s"):
            stem = name.removesuffix(".s")
            u, s, vh = (tensors[f"{stem}.{part}"] for part in ("u", "s", "vh"))
            if not u.shape[1] == s.shape[0] == vh.shape[0]:
                problems.append(
                    f"{stem}: u, s and vh have the ranks {u.shape[1]}, {s.shape[0]} and {vh.shape[0]}"
                )
    return problems


def _check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    bad = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    if bad:
        raise ArtifactError(
            f"{where}: NaN or infinite values in {shortened(bad)}. Merge again from sound checkpoints."
        )


def _shape_text(shape: tuple[int, ...]) -> str:
    return f"[{', '.join('R' if size == _ANY_RANK else str(size) for size in shape)}]"
