"""Artifacts and bundles read for inspection: settings, the tasks' bases as rows, bytes by part."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from mass_export.inspection_report import Kind, Part, Size
from mass_export.spec import VisionSpec
from mass_export.subspaces import StackGeometry, stack_geometry
from runtime.bundle import FIRST_PASS, MANIFEST_FILE, SECOND_PASS, Manifest, StoredArray
from runtime.checksums import check_files
from runtime.errors import BundleError
from runtime.manifest import read_manifest
from runtime.mapped_files import map_array

Rows = Sequence[NDArray[np.floating[Any]]]

_CONTAINER: Part = "container"
_PARTS_OF_ARRAYS: dict[str, Part] = {part: part for part in get_args(Part) if part != _CONTAINER}
_PARTS_OF_ARRAYS["calibration"] = "router"


@dataclass(frozen=True)
class MatrixRows:
    """One matrix' bases as rows, T arrays each: u_t [R_i, D_out], s [R_i], vh [R_i, D_in]."""

    name: str
    ranks: tuple[int, ...]
    u_t: Rows
    s: Rows
    vh: Rows

    @cached_property
    def u_geometry(self) -> StackGeometry:
        """How the tasks' left subspaces lie."""
        return stack_geometry(self.u_t)

    @cached_property
    def vh_geometry(self) -> StackGeometry:
        """How their right ones do."""
        return stack_geometry(self.vh)


@dataclass(frozen=True)
class Source:
    """What an artifact and a bundle have in common.

    Attributes:
        classes: number of classes by task, in the order of the tasks.
        router: settings of the router, as `Inspection` has them.
        merge: settings of the merge, likewise.
        heads: class vectors by task, [C, E] each; None where a bundle does not hold them in floating point.
        base_norm: of the base's matrices together (Frobenius); None where, likewise.
        taps: the router's bases, by the matrix whose input it reads; none where a bundle's router has learned to do
            without residuals. T of [R_i, D] each
    """

    kind: Kind
    producer: str
    vision: VisionSpec
    classes: dict[str, int]
    router: dict[str, Any]
    merge: dict[str, Any]
    matrices: tuple[MatrixRows, ...]
    heads: dict[str, NDArray[np.floating[Any]]] | None
    base_norm: float | None
    taps: dict[str, Rows]
    parts: dict[Part, Size]
    provenance: dict[str, Any]


def sum_sizes(sizes: Iterable[Size]) -> Size:
    """Parameters and bytes together."""
    sizes = list(sizes)
    return Size(sum(size.parameters for size in sizes), sum(size.bytes for size in sizes))


def source_from_artifact(path: Path) -> Source:
    """Read an artifact.

    Raises:
        ArtifactError: it is none, or damaged.
    """
    from mass_export.artifact import read_artifact  # noqa: PLC0415 - torch, which bundles do not need

    artifact = read_artifact(path)
    info = artifact.info
    matrices = []
    for name in info.vision.matrix_names():
        factors = [task.matrices[name] for task in artifact.tasks]
        ranks = tuple(f.rank for f in factors)
        rows = ([getattr(f, part).numpy() for f in factors] for part in ("s", "vh"))
        matrices.append(MatrixRows(name, ranks, [f.u.numpy().T for f in factors], *rows))
    taps: dict[str, Rows] = {
        name: [bases[name].numpy() for bases in artifact.router_bases] for name in artifact.router_bases[0]
    }
    return Source(
        kind="artifact",
        producer=str(info.provenance.get("producer", "")),
        vision=info.vision,
        classes={task.name: len(task.classes) for task in info.tasks},
        router=_router(dataclasses.asdict(info.router), {tap.layer for tap in info.taps()}, taps)
        | {"calibration": None if info.calibration is None else dataclasses.asdict(info.calibration)},
        merge=dataclasses.asdict(info.merge),
        matrices=tuple(matrices),
        heads={task.name: h.weight.numpy() for task, h in zip(info.tasks, artifact.heads, strict=True)},
        base_norm=_norm(artifact.base[name].numpy() for name in info.vision.matrix_names()),
        taps=taps,
        parts=_artifact_parts(path),
        provenance=info.provenance,
    )


def source_from_bundle(directory: Path) -> Source:
    """Read a bundle: its manifest, the graphs without their weights, and memory-mapped bases.

    Raises:
        BundleError: it is none, or damaged.
    """
    manifest = read_manifest(directory)
    check_files(directory, manifest.files, verify="size")
    matrices = []
    for matrix in manifest.matrices:
        stored = ((matrix.u_t, matrix.u_scale), (matrix.s, None), (matrix.vh, matrix.vh_scale))
        stacks = (_stack(directory, array, scale) for array, scale in stored)
        rows = ([stack[i, :rank] for i, rank in enumerate(matrix.ranks)] for stack in stacks)
        matrices.append(MatrixRows(matrix.name, matrix.ranks, *rows))
    arrays = _graph_arrays(directory, manifest)
    taps = _taps(directory, len(manifest.tasks), arrays)
    parts = _bundle_parts(directory, manifest, arrays)
    if not (matrices and parts["base"].parameters):
        raise BundleError(f"{directory}: lacks the base tower or bases of matrices. Export the bundle again.")
    vision = {field.name: manifest.model.get(field.name) for field in dataclasses.fields(VisionSpec)}
    return Source(
        kind="bundle",
        producer=manifest.producer,
        vision=VisionSpec.from_json(vision),
        classes={task.name: len(task.classes) for task in manifest.tasks},
        router=_router(dataclasses.asdict(manifest.router), manifest.router.layers, taps),
        merge={
            "base_merge": manifest.model.get("first_pass"),
            "compose": manifest.compose,
            "sum_weights": manifest.router.sum_weights,
            "vectors": manifest.model.get("vectors"),
            "head_choice": manifest.router.head_choice,
        },
        matrices=tuple(matrices),
        heads=_heads(directory, manifest, arrays),
        base_norm=_base_norm(directory, arrays),
        taps=taps,
        parts=parts,
        provenance=manifest.provenance,
    )


def _stack(directory: Path, stored: StoredArray, scale: StoredArray | None) -> NDArray[np.floating[Any]]:
    """Bases or singular values of all tasks; of int8 bases the rows' scales are multiplied in."""
    stack: NDArray[np.floating[Any]] = map_array(directory, stored)
    return stack if scale is None else stack * map_array(directory, scale)[:, :, None]


def _router(settings: Mapping[str, Any], layers: Iterable[int], taps: Iterable[str]) -> dict[str, Any]:
    """The settings as stored, less those of the merge; layers as numbers, and the taps by name."""
    apart = ("head_choice", "sum_weights", "layer", "layers", "rank")
    kept = {key: value for key, value in settings.items() if key not in apart}
    return kept | {"layers": sorted(layers), "taps": sorted(taps)}


def _artifact_parts(path: Path) -> dict[Part, Size]:
    """Sizes by the header of a safetensors file that has been read and found sound."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    del header["__metadata__"]
    arrays: list[tuple[Part, Size]] = []
    for name, entry in header.items():
        prefix = name.split(".")[0]
        if prefix == "tasks":
            prefix = "vectors" if name.endswith(".delta") else "bases"
        start, stop = entry["data_offsets"]
        if prefix in _PARTS_OF_ARRAYS:
            arrays.append((_PARTS_OF_ARRAYS[prefix], Size(math.prod(entry["shape"]), stop - start)))
    return _add_up(arrays, path.stat().st_size)


def _bundle_parts(directory: Path, manifest: Manifest, arrays: Mapping[str, StoredArray]) -> dict[Part, Size]:
    """Sizes of the arrays, each counted once, however many names it has."""
    bases = [("bases", array) for m in manifest.matrices for array in (m.u_t, m.s, m.vh)]
    named = [(name.split(".")[0], array) for name, array in arrays.items()]
    seen: set[tuple[str, int]] = set()
    sizes: list[tuple[Part, Size]] = []
    for prefix, array in bases + named:
        if prefix in _PARTS_OF_ARRAYS and (array.file, array.offset) not in seen:
            seen.add((array.file, array.offset))
            sizes.append((_PARTS_OF_ARRAYS[prefix], Size(math.prod(array.shape), array.nbytes)))
    engines = sum(manifest.files[engine.file].bytes for engine in manifest.engines)
    sizes.append(("engines", Size(0, engines)))
    listed = sum(spec.bytes for spec in manifest.files.values())
    return _add_up(sizes, listed + (directory / MANIFEST_FILE).stat().st_size)


def _add_up(arrays: Sequence[tuple[Part, Size]], total_bytes: int) -> dict[Part, Size]:
    """Sizes by part; bytes that no array takes are the container's."""
    parts = {name: sum_sizes(size for part, size in arrays if part == name) for name in get_args(Part)}
    return parts | {_CONTAINER: Size(0, total_bytes - sum_sizes(parts.values()).bytes)}


def _graph_arrays(directory: Path, manifest: Manifest) -> dict[str, StoredArray]:
    """The initializers of both graphs that lie in files of the bundle, by name."""
    import onnx_ir as ir  # noqa: PLC0415 - artifacts do not need it

    arrays: dict[str, StoredArray] = {}
    for name in (SECOND_PASS, FIRST_PASS):
        path = directory / manifest.passes[name].file
        try:
            initializers = ir.load(path).graph.initializers
        except Exception as error:  # protobuf's errors have no common base
            raise BundleError(f"{path}: not an ONNX graph ({error}). Export the bundle again.") from error
        for key, value in initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in manifest.files:
                shape = tuple(int(size) for size in tensor.shape.numpy())
                dtype = tensor.dtype.numpy().name
                arrays[key] = StoredArray(str(tensor.location), tensor.offset or 0, dtype, shape)
    return arrays


def _taps(directory: Path, tasks: int, arrays: Mapping[str, StoredArray]) -> dict[str, Rows]:
    """The router's bases in the first pass: `router.<matrix>.vh` [T, R, D], or its rows as columns in `.vh.T`."""
    taps: dict[str, Rows] = {}
    for key, stored in arrays.items():
        if not key.startswith("router.transformer.resblocks."):
            continue
        name = key.removeprefix("router.")
        array = map_array(directory, stored)
        if key.endswith(".vh.T"):  # [D, T*R]
            taps[name.removesuffix(".vh.T")] = list(array.T.reshape(tasks, -1, array.shape[0]))
        elif key.endswith(".vh"):
            taps[name.removesuffix(".vh")] = list(array)
    return taps


def _heads(
    directory: Path, manifest: Manifest, arrays: Mapping[str, StoredArray]
) -> dict[str, NDArray[np.floating[Any]]] | None:
    stored = arrays.get("heads.weight.T")
    if stored is None or not stored.dtype.startswith("float") or stored.shape[1] != manifest.tasks[-1].stop:
        return None
    weight = map_array(directory, stored)
    return {task.name: weight[:, task.start : task.stop].T for task in manifest.tasks}


def _base_norm(directory: Path, arrays: Mapping[str, StoredArray]) -> float | None:
    stored = {
        (a.file, a.offset): a for name, a in arrays.items() if name.startswith("base.") and len(a.shape) == 2
    }
    if not all(array.dtype.startswith("float") for array in stored.values()):
        return None
    return _norm(map_array(directory, array) for array in stored.values())


def _norm(arrays: Iterable[NDArray[Any]]) -> float:
    return math.sqrt(sum(float(np.square(array, dtype=np.float64).sum()) for array in arrays))
