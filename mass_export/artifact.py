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
from mass_export.artifact_layout import NOTHING, check_layout, check_values
from mass_export.errors import ArtifactError
from mass_export.factor_storage import Storage, decode, encode, storage_of
from mass_export.heads import Head
from mass_export.low_rank import LowRank, orthonormal_rows
from mass_export.router_spec import CalibrationInfo
from mass_export.safetensors_writer import has_its_checksum, write_safetensors
from mass_export.spec import ArtifactInfo

STOPS = ("stop_weight", "stop_bias", "stop_whiten", "stop_centres")
CALIBRATION_OPTIONAL = ("weight", "bias", "whiten", "centres", *STOPS, *NOTHING)


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

    def with_calibration(self, info: CalibrationInfo, calibration: Calibration) -> Artifact:
        """The same, taught by images."""
        return dataclasses.replace(
            self, info=dataclasses.replace(self.info, calibration=info), calibration=calibration
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
    check_layout(tensors, artifact.info, str(path))
    check_values(tensors, str(path))
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
    check_layout(tensors, info, str(path))
    tensors = {name: tensor.to(torch.float32) for name, tensor in tensors.items()}
    check_values(tensors, str(path))
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
