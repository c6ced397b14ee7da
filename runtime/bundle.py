"""The bundle: a directory with two ONNX graphs, their weights and `manifest.json`.

This module owns the format; the builder imports it from here, so every name exists once. `manifest.json`
is the JSON form of `Manifest` (`json_from_manifest` / `manifest_from_json`). The arrays that the runtime
itself needs (stacked bases, for the cores of task sets) lie raw and little-endian in the external data
file that the graphs use too; `StoredArray` says where.
"""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np

from runtime.engine_spec import EngineSpec, Precision
from runtime.errors import BundleError

FORMAT = "mass-bundle"
SCHEMA_VERSION = 2
MANIFEST_FILE = "manifest.json"
FIRST_PASS = "first_pass"
SECOND_PASS = "second_pass"
FLOAT_INPUT, BYTES_INPUT = "pixel_values", "images"
MAX_MANIFEST_BYTES = 64 << 20
PIECE_BYTES = 64 << 20
_MAX_FLOAT = 1e300

GateMode = Literal["topk", "top1", "weighted"]
HeadChoice = Literal["max", "mean"]
Compose = Literal["tsvm", "sum"]
SumWeights = Literal["uniform", "gates"]
Verify = Literal["size", "full"]
ImageDtype = Literal["float32", "uint8"]

STORED_DTYPES = ("int8", "float16", "float32", "float64")

_T = TypeVar("_T")


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
    """A raw little-endian C-order array inside a bundle file; `offset` in bytes, dtype of `STORED_DTYPES`."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.dtype(self.dtype).itemsize) * math.prod(self.shape)


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
        tasks: of each set. [S] int64
        right.<name>, scale.<name>, left.<name>: vh, s and u_t of `matrices`. [T, R, D_in], [T, 1, R], [T, R, D_out]
        vectors: of `tables`; absent with the base's parameters for all tasks. [T, P]
        conv1: one task's row of `tables`; with `conv1_bases` its bases instead, as of `matrices`. [3*P*P, D]
    In an int8 bundle left, right and conv1 are int8; scale carries their rows' scales; conv1_scale [D] comes in, too.

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
    """

    segments: tuple[str, ...]
    patches: str
    tables: VectorTables | None
    routers: tuple[str, ...] = ()
    stop_margin: float = 0.0

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


def json_from_manifest(manifest: Manifest) -> str:
    """Serialise, with a stable layout."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, ensure_ascii=False) + "\n"


def manifest_from_json(text: str, where: str = MANIFEST_FILE) -> Manifest:
    """Parse and validate.

    Raises:
        BundleError: not JSON, another format or schema version, a missing, unknown or ill-typed key.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{where}: not valid JSON ({error}); export the bundle again.") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f'{where}: not a {FORMAT} manifest (its "format" key must be "{FORMAT}").')
    version = data.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        advice = "install a newer mass-export" if newer else "export the bundle again with this version"
        raise BundleError(
            f"{where}: schema version {version!r}, this runtime reads {SCHEMA_VERSION}; {advice}."
        )
    manifest = _typed_dataclass(Manifest, data, where)
    _check_consistency(manifest, where)
    return manifest


def router_fault(router: RouterSpec) -> str | None:
    """Say what is wrong with the settings' values; None if nothing is."""
    return next(_router_faults(router), None)


def _router_faults(router: RouterSpec) -> Iterator[str]:
    if not 0 <= router.threshold < 1:
        yield f"threshold must lie in [0, 1), got {router.threshold}"
    for name in ("temperature", "confidence_scale"):
        value = getattr(router, name)
        if not (value > 0 and math.isfinite(value)):
            yield f"{name} must be finite and > 0, got {value}"
    if router.max_tasks < 1:
        yield f"max_tasks must be >= 1, got {router.max_tasks}"
    for name, least in {"verify_margin": 0.0, "verify_prior": 0.0, "unknown_threshold": -math.inf}.items():
        value = getattr(router, name)
        if value is not None and not (value >= least and math.isfinite(value)):
            yield f"{name} must be finite{' and >= 0' if least == 0 else ''}, got {value}"
    if not 0 <= router.verify_budget <= 1:
        yield f"verify_budget must lie in [0, 1], got {router.verify_budget}"


def _check_consistency(manifest: Manifest, where: str) -> None:
    _check_tasks(manifest.tasks, where)
    if fault := router_fault(manifest.router):
        raise BundleError(f"{where}: router: {fault}.")
    spec = manifest.preprocess
    if min(spec.image_size) < 1 or min(spec.std) <= 0:
        raise BundleError(f"{where}: preprocess: image_size and std must be positive.")
    if set(manifest.passes) != {FIRST_PASS, SECOND_PASS}:
        raise BundleError(
            f"{where}: passes must be {FIRST_PASS} and {SECOND_PASS}, got {sorted(manifest.passes)}."
        )
    if strays := {engine.pass_name for engine in manifest.engines} - set(manifest.passes):
        raise BundleError(f"{where}: engines of unknown passes {sorted(strays)}.")
    _check_file_names(manifest, where)
    for name, file in manifest.files.items():
        expected = -(-file.bytes // PIECE_BYTES)
        if len(file.pieces) not in (0, expected):
            raise BundleError(f"{where}: files: {name}: {len(file.pieces)} pieces, expected {expected}.")
    for matrix in manifest.matrices:
        _check_matrix(matrix, manifest, where)
    if manifest.one_task is not None:
        _check_one_task(manifest.one_task, manifest, f"{where}: one_task")


def _check_one_task(one_task: OneTaskSpec, manifest: Manifest, where: str) -> None:
    counts = len(one_task.segments), len(one_task.routers)
    if not counts[0] or counts[1] not in (0, counts[0] - 1):
        raise BundleError(f"{where}: {counts[0]} segments do not fit {counts[1]} routers.")
    tables = one_task.tables
    if tables is not None and (tables.conv1 is None) == (tables.conv1_bases is None):
        raise BundleError(f"{where}: tables: expected either conv1 or conv1_bases.")
    if tables is not None and tables.conv1_bases is not None:
        _check_matrix(tables.conv1_bases, manifest, where)
    for key, array in _table_arrays(one_task).items():
        _check_array(array, manifest, f"{where}: {key}")
        rows = len(manifest.tasks) + one_task.has_base
        if len(array.shape) != (3 if key == "conv1" else 2) or array.shape[0] != rows:
            raise BundleError(f"{where}: {key}: shape {list(array.shape)} does not fit.")


def all_matrices(manifest: Manifest) -> tuple[MatrixBases, ...]:
    """Those with cores, and the patch convolution's where it has bases."""
    tables = None if manifest.one_task is None else manifest.one_task.tables
    patches = None if tables is None else tables.conv1_bases
    return manifest.matrices if patches is None else (*manifest.matrices, patches)


def _table_arrays(one_task: OneTaskSpec) -> dict[str, StoredArray]:
    tables = one_task.tables
    if tables is None:
        return {}
    arrays = {"vectors": tables.vectors, "conv1": tables.conv1, "conv1_scale": tables.conv1_scale}
    return {key: array for key, array in arrays.items() if array is not None}


def _scales(matrix: MatrixBases) -> dict[str, StoredArray]:
    arrays = {"u_scale": matrix.u_scale, "vh_scale": matrix.vh_scale}
    return {key: array for key, array in arrays.items() if array is not None}


def _check_array(array: StoredArray, manifest: Manifest, here: str) -> None:
    if array.dtype not in STORED_DTYPES:
        raise BundleError(f"{here}: dtype must be one of {', '.join(STORED_DTYPES)}, got {array.dtype!r}.")
    size, end = manifest.files[array.file].bytes, array.offset + array.nbytes
    if array.offset < 0 or end > size:
        raise BundleError(f"{here}: lies at bytes {array.offset}..{end} of {array.file!r}, which has {size}.")


def _check_tasks(tasks: tuple[TaskSpec, ...], where: str) -> None:
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{where}: task names must be given and distinct, got {names}.")
    start = 0
    for task in tasks:
        if task.start != start or task.stop - task.start != len(task.classes) or not task.classes:
            raise BundleError(
                f"{where}: task {task.name!r}: head range {task.start}..{task.stop} does not fit: it has "
                f"{len(task.classes)} classes and starts at {start}."
            )
        start = task.stop


def _check_file_names(manifest: Manifest, where: str) -> None:
    matrices = all_matrices(manifest)
    arrays = [array for matrix in matrices for array in (matrix.u_t, matrix.s, matrix.vh)]
    arrays += [array for matrix in matrices for array in _scales(matrix).values()]
    used = {spec.file for spec in manifest.passes.values()} | {array.file for array in arrays}
    used |= {engine.file for engine in manifest.engines}
    if manifest.one_task is not None:
        used |= set(manifest.one_task.files)
        used |= {array.file for array in _table_arrays(manifest.one_task).values()}
    for name in sorted(used | set(manifest.files)):
        plain = PurePosixPath(name).name == name and name.isprintable()
        if not plain or name in ("", "..", MANIFEST_FILE) or any(mark in name for mark in "\\:"):
            raise BundleError(
                f"{where}: unsafe file name {name!r}; bundle files lie in the bundle directory."
            )
        if name not in manifest.files:
            raise BundleError(f"{where}: file {name!r} is used but not listed under files.")


def _check_matrix(matrix: MatrixBases, manifest: Manifest, where: str) -> None:
    arrays = {"u_t": matrix.u_t, "s": matrix.s, "vh": matrix.vh} | _scales(matrix)
    for key, array in arrays.items():
        here = f"{where}: matrix {matrix.name!r}: {key}"
        if len(array.shape) != (3 if key in ("u_t", "vh") else 2) or min(array.shape) < 0:
            raise BundleError(f"{here}: shape {list(array.shape)} is not that of stacked bases.")
        _check_array(array, manifest, here)
    tasks = len(manifest.tasks)
    leading = {array.shape[:2] for array in arrays.values()}
    if (
        len(leading) > 1
        or len(matrix.ranks) != tasks
        or not all(0 <= rank <= matrix.s.shape[1] for rank in matrix.ranks)
        or matrix.s.shape[0] != tasks
    ):
        shapes = [list(array.shape) for array in arrays.values()]
        raise BundleError(
            f"{where}: matrix {matrix.name!r}: ranks {list(matrix.ranks)} and shapes {shapes} do not fit "
            f"{tasks} tasks."
        )


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` from parsed JSON; every mismatch names its place."""
    origin = typing.get_origin(kind)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        made: Any = _typed_dataclass(kind, value, where)
    elif origin is not None:
        made = _typed_generic(kind, origin, value, where)
    elif kind is float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= _MAX_FLOAT:
            raise BundleError(f"{where}: expected a finite number, got {_shortened(value)}.")
        made = float(value)
    else:
        if kind is not Any and (
            not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        ):
            raise BundleError(f"{where}: expected {kind.__name__}, got {_shortened(value)}.")
        made = value
    return made


def _typed_generic(kind: Any, origin: Any, value: Any, where: str) -> Any:
    args = typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise BundleError(
                f"{where}: expected one of {', '.join(map(str, args))}, got {_shortened(value)}."
            )
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise BundleError(f"{where}: expected a list for {kind}, got {_shortened(value)}.")
        item_kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        pairs = zip(item_kinds, value, strict=True)
        return tuple(_typed(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {_shortened(value)}.")
        return {str(key): _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    nested = [kind for kind in args if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Literal]
    if nested:  # a dataclass, or one of some texts, or None
        return None if value is None else _typed(nested[0], value, where)
    if not isinstance(value, args) or isinstance(value, bool):  # a union of plain types
        raise BundleError(f"{where}: expected {kind}, got {_shortened(value)}.")
    return value


def _shortened(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _typed_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, got {value!r}.")
    hints, needed = _keys_of(typing.cast("Any", kind))
    unknown, missing = sorted(set(value) - set(hints)), sorted(needed - set(value))
    if unknown or missing:
        raise BundleError(f"{where}: missing keys {missing}, unknown keys {unknown}.")
    return kind(**{name: _typed(hints[name], item, f"{where}.{name}") for name, item in value.items()})


@cache
def _keys_of(kind: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """Types of a dataclass' fields by name, and which have no default."""
    needed = (field.name for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING)
    return typing.get_type_hints(kind), frozenset(needed)


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json` of a bundle directory.

    Raises:
        BundleError: no such directory or file, or an invalid manifest.
    """
    path = directory / MANIFEST_FILE
    try:
        if not directory.is_dir() or not path.is_file():
            raise BundleError(
                f"{directory}: not a bundle (no {MANIFEST_FILE}); give the directory that mass-export wrote."
            )
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest.")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not UTF-8 text; export the bundle again.") from error
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}).") from error
    return manifest_from_json(text, str(path))
