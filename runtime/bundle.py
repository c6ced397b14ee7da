"""The bundle: a directory with two ONNX graphs, their weights and `manifest.json`.

This module owns the format; the builder imports it from here, so every name exists once. `manifest.json`
is the JSON form of `Manifest` (`json_from_manifest` / `manifest_from_json`). The arrays that the runtime
itself needs (stacked bases, for the cores of task sets) lie raw and little-endian in the external data
file that the graphs use too; `StoredArray` says where.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError

FORMAT = "mass-bundle"
SCHEMA_VERSION = 1
MANIFEST_FILE = "manifest.json"
FIRST_PASS = "first_pass"
SECOND_PASS = "second_pass"
MAX_MANIFEST_BYTES = 64 << 20

GateMode = Literal["topk", "top1", "weighted"]
HeadChoice = Literal["max", "mean"]
Compose = Literal["tsvm", "sum"]
Verify = Literal["size", "full"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class TensorSpec:
    """One graph input or output; a dynamic dimension is its letter, such as `"B"`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class PassSpec:
    """One of the two graphs."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class StoredArray:
    """A raw little-endian C-order array inside a bundle file; `offset` in bytes."""

    file: str
    offset: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.dtype(self.dtype).itemsize * np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True)
class MatrixBases:
    """The stacked low-rank task vectors of one matrix parameter, padded with zeros to the largest rank R.

    Attributes:
        name: parameter name, as in the checkpoint (`visual.` stripped).
        core: name of the second-pass input that takes this matrix' cores.
        ranks: rank of each task, at most R.
        u_t: transposed left bases, rows orthonormal. [T, R, D_out]
        s: singular values, descending. [T, R]
        vh: right bases, rows orthonormal. [T, R, D_in]
    """

    name: str
    core: str
    ranks: tuple[int, ...]
    u_t: StoredArray
    s: StoredArray
    vh: StoredArray


@dataclass(frozen=True)
class TaskSpec:
    """A task: its name, its classes, and where its head's logits stand in `logits [B, sum C_i]`."""

    name: str
    classes: tuple[str, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class RouterSpec:
    """How residuals become gates and sets (MASS.md section 3). All but the first five are descriptive."""

    mode: GateMode
    threshold: float
    temperature: float
    max_tasks: int
    head_choice: HeadChoice
    layer: int
    site: str
    token: str
    norm: str


@dataclass(frozen=True)
class PreprocessSpec:
    """open_clip's validation transform: resize the shortest side, centre crop, RGB, normalise."""

    image_size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "squash"] = "shortest"


@dataclass(frozen=True)
class FileSpec:
    """Size and checksum of a bundle file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Everything about a bundle but the numbers."""

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
        raise BundleError(f"{where}: schema version {version!r}, this runtime reads {SCHEMA_VERSION}; {advice}.")
    manifest = _typed(Manifest, data, where)
    _check_consistency(manifest, where)
    return manifest


def _check_consistency(manifest: Manifest, where: str) -> None:
    start = 0
    for task in manifest.tasks:
        if task.start != start or task.stop - task.start != len(task.classes) or not task.classes:
            raise BundleError(f"{where}: task {task.name!r}: head range {task.start}..{task.stop} does not fit.")
        start = task.stop
    names = [task.name for task in manifest.tasks]
    if not names or len(set(names)) != len(names):
        raise BundleError(f"{where}: task names must be given and distinct, got {names}.")
    if set(manifest.passes) != {FIRST_PASS, SECOND_PASS}:
        raise BundleError(f"{where}: passes must be {FIRST_PASS} and {SECOND_PASS}, got {sorted(manifest.passes)}.")
    used = {spec.file for spec in manifest.passes.values()}
    arrays = [array for matrix in manifest.matrices for array in (matrix.u_t, matrix.s, matrix.vh)]
    used |= {array.file for array in arrays}
    for name in sorted(used | set(manifest.files)):
        pure = PurePosixPath(name)
        if pure.is_absolute() or ".." in pure.parts or "\\" in name or ":" in name or pure.name != name:
            raise BundleError(f"{where}: unsafe file name {name!r}; bundle files lie in the bundle directory.")
        if name not in manifest.files:
            raise BundleError(f"{where}: file {name!r} is used but not listed under files.")
    for array in arrays:
        end = array.offset + array.nbytes
        if array.offset < 0 or end > manifest.files[array.file].bytes:
            raise BundleError(f"{where}: an array ends at byte {end} of {array.file!r}, beyond its size.")


def _typed(kind: Any, value: Any, where: str) -> Any:
    """Build `kind` from parsed JSON; every mismatch names its place."""
    if dataclasses.is_dataclass(kind):
        return _typed_dataclass(kind, value, where)
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value not in args:
            raise BundleError(f"{where}: expected one of {', '.join(map(str, args))}, got {value!r}.")
        return value
    if origin in (types.UnionType, typing.Union):
        if not isinstance(value, args) or isinstance(value, bool):
            raise BundleError(f"{where}: expected {kind}, got {value!r}.")
        return value
    if origin is tuple:
        if not isinstance(value, list) or (args[-1] is not Ellipsis and len(value) != len(args)):
            raise BundleError(f"{where}: expected a list for {kind}, got {value!r}.")
        item_kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        pairs = zip(item_kinds, value, strict=True)
        return tuple(_typed(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(pairs))
    if origin is dict:
        if not isinstance(value, dict):
            raise BundleError(f"{where}: expected an object, got {value!r}.")
        return {str(key): _typed(args[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BundleError(f"{where}: expected {kind.__name__}, got {value!r}.")
    return value


def _typed_dataclass(kind: type[_T], value: Any, where: str) -> _T:
    if not isinstance(value, dict):
        raise BundleError(f"{where}: expected an object, got {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(value) - set(fields))
    missing = sorted(
        name for name, f in fields.items() if name not in value and f.default is dataclasses.MISSING
    )
    if unknown or missing:
        raise BundleError(f"{where}: missing keys {missing}, unknown keys {unknown}.")
    return kind(**{name: _typed(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def sha256_of_file(path: Path) -> str:
    """Hex digest, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(directory: Path) -> Manifest:
    """Read `manifest.json` of a bundle directory.

    Raises:
        BundleError: no such directory or file, or an invalid manifest.
    """
    path = directory / MANIFEST_FILE
    if not directory.is_dir() or not path.is_file():
        raise BundleError(f"{directory}: not a bundle (no {MANIFEST_FILE}); give the directory that mass-export wrote.")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise BundleError(f"{path}: larger than {MAX_MANIFEST_BYTES} bytes; not a manifest.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not UTF-8 text; export the bundle again.") from error
    return manifest_from_json(text, str(path))


def check_files(directory: Path, files: Mapping[str, FileSpec], verify: Verify = "full") -> None:
    """Compare every listed file with its size and, with `verify="full"`, its sha256.

    Raises:
        BundleError: naming every missing, resized or changed file.
    """
    problems = []
    for name, spec in files.items():
        path = directory / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif (size := path.stat().st_size) != spec.bytes:
            problems.append(f"{name} has {size} bytes, expected {spec.bytes}")
        elif verify == "full" and sha256_of_file(path) != spec.sha256:
            problems.append(f"{name} was changed (its sha256 differs from the manifest's)")
    if problems:
        raise BundleError(f"{directory}: {'; '.join(problems)}. Copy or export the bundle again.")


def map_array(directory: Path, array: StoredArray) -> NDArray[Any]:
    """Memory-map a stored array, read-only."""
    path = directory / array.file
    return np.memmap(path, dtype=np.dtype(array.dtype), mode="r", offset=array.offset, shape=array.shape)
