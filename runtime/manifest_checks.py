"""Does what a manifest says of a bundle fit together?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import PurePosixPath

from runtime.bundle import (
    FIRST_PASS,
    MANIFEST_FILE,
    PIECE_BYTES,
    SECOND_PASS,
    STORED_DTYPES,
    Manifest,
    MatrixBases,
    OneTaskSpec,
    RouterSpec,
    StoredArray,
    TaskSpec,
    all_matrices,
)
from runtime.errors import BundleError


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


def check_manifest(manifest: Manifest, where: str) -> None:
    """Refuse what cannot be right.

    Raises:
        BundleError: naming the place.
    """
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
    for index, array in enumerate(one_task.bases):
        here = f"{where}: bases[{index}]"
        _check_array(array, manifest, here)
        if len(array.shape) != 2 or min(array.shape) < 1 or array.shape[0] % len(manifest.tasks):
            raise BundleError(f"{here}: shape {list(array.shape)} does not fit {len(manifest.tasks)} tasks.")
    for key, array in _table_arrays(one_task).items():
        _check_array(array, manifest, f"{where}: {key}")
        rows = len(manifest.tasks) + one_task.has_base
        if len(array.shape) != (3 if key == "conv1" else 2) or array.shape[0] != rows:
            raise BundleError(f"{where}: {key}: shape {list(array.shape)} does not fit.")


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
    if array.stride is not None and array.stride < max(1, array.entry_nbytes):
        raise BundleError(
            f"{here}: stride must be at least the {array.entry_nbytes} bytes of an entry, got {array.stride}."
        )
    size, end = manifest.files[array.file].bytes, array.end
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
        used |= {
            array.file for array in (*_table_arrays(manifest.one_task).values(), *manifest.one_task.bases)
        }
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
