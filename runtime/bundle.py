"""The bundle: a directory with two ONNX graphs, their weights and `manifest.json`.

This module owns the format; the builder imports it from here, so every name exists once. `manifest.json`
is the JSON form of `Manifest` (`runtime.manifest`). The arrays that the runtime
itself needs (stacked bases, for the cores of task sets) lie raw and little-endian in the external data
file that the graphs use too; `StoredArray` says where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from runtime.engine_spec import EngineSpec, Precision

FORMAT = "mass-bundle"
SCHEMA_VERSION = 3
MANIFEST_FILE = "manifest.json"
FIRST_PASS = "first_pass"
SECOND_PASS = "second_pass"
FLOAT_INPUT, BYTES_INPUT = "pixel_values", "images"
MAX_MANIFEST_BYTES = 64 << 20
PIECE_BYTES = 64 << 20

GateMode = Literal["topk", "top1", "weighted"]
HeadChoice = Literal["max", "mean"]
Compose = Literal["tsvm", "sum"]
SumWeights = Literal["uniform", "gates"]
Verify = Literal["size", "full"]
ImageDtype = Literal["float32", "uint8"]

STORED_DTYPES = ("int8", "float16", "float32", "float64")


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a dynamic dimension is its letter, such as `"B"`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PassSpec:
    """One of the two graphs; all dimensions but T, K*R and sum C are dynamic.

    Images are `pixel_values [B, 3, H, W] float32`, normalised, or `images [B, H, W, 3] uint8`, see `PreprocessSpec`.

    first pass: images -> `residuals [B, T] float32`, and where it can be said
        `unknown [B] float32`: higher where no task explains the image.

    second pass, for samples whose sets have the same size K -> `logits [B, sum C] float32`, every head:
        pixel_values or images: as above
        slots: task indices of each set, ascending. [S, K] int64, S is B or 1 (one set for the whole batch)
        weights: of each slot's task, sum to 1. [S, K] float32
        cores: with `compose` tsvm, one input per matrix, named `MatrixBases.core`. [S, K*R, K*R] float32
    """

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StoredArray:
    """A raw little-endian array inside a bundle file.

    Attributes:
        file: its name.
        offset: of the first byte.
        dtype: of `STORED_DTYPES`.
        shape: in C order.
        stride: bytes from one entry of the first axis to the next, where other arrays lie between them.
    """

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]
    stride: int | None = None

    @property
    def nbytes(self) -> int:
        """Size of its values in bytes."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)

    @property
    def entry_nbytes(self) -> int:
        """Size of an entry of the first axis in bytes."""
        return self.nbytes // max(1, self.shape[0])

    @property
    def end(self) -> int:
        """The byte behind its last."""
        if self.stride is None or not self.nbytes:
            return self.offset + self.nbytes
        return self.offset + (self.shape[0] - 1) * self.stride + self.entry_nbytes


@dataclass(frozen=True)
class MatrixBases:
    """The stacked low-rank task vectors of one matrix parameter, padded with zeros to the largest rank R.

    Attributes:
        name: parameter name, as in the checkpoint (`visual.` stripped).
        core: name of the second-pass input that takes this matrix' cores, or empty.
        ranks: rank of each task, at most R.
        u_t: transposed left bases, rows orthonormal. [T, R, D_out]
        s: singular values, descending. [T, R]
        vh: right bases, rows orthonormal. [T, R, D_in]
        u_scale, vh_scale: of int8 bases, what each row of them is multiplied with; else absent. [T, R]
    """

    name: str
    core: str
    ranks: tuple[int, ...]
    u_t: StoredArray
    s: StoredArray
    vh: StoredArray
    u_scale: StoredArray | None = None
    vh_scale: StoredArray | None = None


@dataclass(frozen=True)
class VectorTables:
    """The parameters that are no matrices, of each task's own model; a set takes the mean of its tasks' rows.

    Attributes:
        vectors: all 1-D parameters, concatenated in the order of the second pass. [T, P]
        conv1: the patch convolution as a product's right side. [T, 3*P*P, D]
        conv1_scale: of an int8 conv1, what each output is multiplied with; else absent. [T, D]
        conv1_bases: instead of conv1, where what the tasks change of it is of low rank: of the convolution as a matrix
            [D, 3*P*P]; a set takes the mean of its tasks' deltas, so that there are no cores.

    Where `OneTaskSpec` has several segments vectors and conv1 have one row more, the base's own.
    """

    vectors: StoredArray
    conv1: StoredArray | None = None
    conv1_scale: StoredArray | None = None
    conv1_bases: MatrixBases | None = None


@dataclass(frozen=True)
class OneTaskSpec:
    """Both passes for images that need one task each, as a CPU wants them: what the tasks change comes as inputs.

    A batch is S sets of m images with the same task, B = S*m. Parameters are float32 as they lie in the files, of all
    tasks; a graph takes those that it needs:
        tasks: of each set, or a single -1 for the base, where bases have no rows. [S] int64
        bases.<i>: of `bases`. [T*n, D]
        right.<name>, left.<name>: vh and u_t of `matrices` that do not lie there. [T, R, D_in], [T, R, D_out]
        scales: s of all of these, matrices (and `conv1_bases`) in order. [T, 1, sum R]
        vectors: of `tables`; absent with the base's parameters for all tasks. [T, P]
        conv1: one task's row of `tables`; with `conv1_bases` its bases instead, as of `matrices`. [3*P*P, D]
    In an int8 bundle bases, left, right and conv1 are int8; scales carry their rows' scales; conv1_scale [D] comes in,
    too.

    Attributes:
        segments: of the tower, one after the other: tasks, and patches or the stream before -> stream.<block>
            [B, N, D] (or [B, 1, D]) and features z.<block>.<site> [B, D]; the last -> logits [B, sum C].
        patches: pixel_values of one set, conv1 -> patches [m, N-1, D]; with `conv1_bases` pixel_values of all sets,
            tasks and bases -> patches [B, N-1, D].
        tables: rows of all tasks.
        routers: of the first pass, one behind each segment but the last, or none where that pass has other weights: the
            stream and all features so far -> what the first pass puts out, if the segments ran with bases of rank 0 and
            the base's rows of `tables`.
        stop_margin: an image goes no further where its best task's residual is so much below the second's.
        bases: vh and u_t of `matrices` (and of `conv1_bases`), if of a multiple of D columns, as rows of D: the n rows
            of the first task, then those of the second. [T*n, D] each
    """

    segments: tuple[str, ...]
    patches: str
    tables: VectorTables | None
    routers: tuple[str, ...] = ()
    stop_margin: float = 0.0
    bases: tuple[StoredArray, ...] = ()

    @property
    def files(self) -> tuple[str, ...]:
        """All graphs."""
        return (*self.segments, self.patches, *self.routers)

    @property
    def has_base(self) -> bool:
        """Whether the tables have a row of the base."""
        return len(self.segments) > 1


@dataclass(frozen=True)
class TaskSpec:
    """A task: its name, its classes, and where its head's logits stand in `logits [B, sum C_i]`."""

    name: str
    classes: tuple[str, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class RouterSpec:
    """How residuals become gates, sets and answers; `layers` to `norm` only describe the first pass.

    Attributes:
        mode: of the gates, see `runtime.routing.gates_from_residuals`.
        threshold: a task is kept when its gate is greater, in [0, 1).
        temperature: divides the (standardised) residuals before the softmax, > 0.
        max_tasks: cap of `topk`, >= 1.
        head_choice: how the heads of a set compete: by their largest or their mean logit.
        sum_weights: the second pass' `weights`: 1/K, or with `compose` sum the set's gates, renormalised.
        verify_margin: top-1 routes whose two best scores differ by less are verified, see
            `runtime.verification`; 0 is off.
        verify_budget: share of a batch that may be verified, in [0, 1].
        verify_prior: weight of the score against the heads' confidence there, >= 0.
        unknown_threshold: an image whose `unknown` is greater is of no known task; None gives no verdict.
        confidence_scale: of the residuals in `Prediction.route_confidence`, > 0.
        layers: transformer blocks that are read, counted from 0.
        site: `mlp`, `attn` or `both`, the branches of the blocks that are read.
        token: `cls` or `mean`.
        norm: of the residual: `l2`, `l1` or `mahalanobis`.
    """

    mode: GateMode
    threshold: float
    temperature: float
    max_tasks: int
    head_choice: HeadChoice
    sum_weights: SumWeights = field(default="uniform", kw_only=True)
    verify_margin: float = field(default=0.0, kw_only=True)
    verify_budget: float = field(default=1.0, kw_only=True)
    verify_prior: float = field(default=1.0, kw_only=True)
    unknown_threshold: float | None = field(default=None, kw_only=True)
    confidence_scale: float = field(default=1.0, kw_only=True)
    layers: tuple[int, ...]
    site: str
    token: str
    norm: str


@dataclass(frozen=True)
class PreprocessSpec:
    """open_clip's validation transform: resize the shortest side, centre crop, RGB, normalise.

    With dtype `uint8` the graphs normalise: they take `images [B, H, W, 3]` of bytes instead of `pixel_values`.
    """

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"
    dtype: ImageDtype = "float32"

    @property
    def input_name(self) -> str:
        """Of the graphs' input that takes images."""
        return FLOAT_INPUT if self.dtype == "float32" else BYTES_INPUT

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Of one image there."""
        return (3, *self.image_size) if self.dtype == "float32" else (*self.image_size, 3)


@dataclass(frozen=True)
class FileSpec:
    """Size and checksums of a bundle file.

    Attributes:
        bytes: its size.
        sha256: of the whole file.
        pieces: sha256 of each `PIECE_BYTES` of a larger file, the last of what is left, so that they can be compared
            side by side, instead of the whole; else empty.
    """

    bytes: int
    sha256: str
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but the numbers.

    `precision` is that of the ONNX graphs, `router_precision` that of the first pass where it has another.
    """

    format: str
    schema_version: int
    producer: str
    model: dict[str, Any]
    preprocess: PreprocessSpec
    tasks: tuple[TaskSpec, ...]
    router: RouterSpec
    compose: Compose
    passes: dict[str, PassSpec]
    matrices: tuple[MatrixBases, ...]
    files: dict[str, FileSpec]
    provenance: dict[str, Any]
    precision: Precision = "fp32"
    engines: tuple[EngineSpec, ...] = ()
    one_task: OneTaskSpec | None = None
    router_precision: Precision | None = None

    @property
    def for_cpus(self) -> bool:
        """Whether a graph is of a precision that GPUs do not take: scales found for each token as the graph runs."""
        return "int8" in (self.precision, self.router_precision)


def all_matrices(manifest: Manifest) -> tuple[MatrixBases, ...]:
    """Those with cores, and the patch convolution's where it has bases."""
    tables = None if manifest.one_task is None else manifest.one_task.tables
    patches = None if tables is None else tables.conv1_bases
    return manifest.matrices if patches is None else (*manifest.matrices, patches)
