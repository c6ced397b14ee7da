"""A whole bundle in half precision: both graphs, their weights, and the bases that the runtime reads."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from mass_export.errors import ExportError
from mass_export.precision import HALVES, convert_file, half_array
from mass_export.stacked_bases import BASES, moved
from mass_export.weights_file import WeightsFile
from runtime.bundle import MANIFEST_FILE, Manifest, MatrixBases, StoredArray
from runtime.checksums import file_specs
from runtime.engine_spec import Precision
from runtime.manifest import json_from_manifest
from runtime.mapped_files import map_array


def require_graph_precision(precision: Precision) -> None:
    """Refuse what ONNX Runtime could not run.

    Raises:
        ExportError: bf16; ONNX Runtime has next to no kernels for it.
    """
    if precision == "bf16":
        raise ExportError(
            "precision: ONNX Runtime does not run bf16 graphs; export fp32 and build bf16 engines with `mass "
            "build-engines --precision bf16`, or export with --backend tensorrt."
        )


def convert_bundle(source: Path, manifest: Manifest, target: Path, precision: Precision) -> Manifest:
    """Write a copy of an fp32 bundle in another precision.

    Args:
        source: bundle directory.
        manifest: its manifest.
        target: empty directory.
        precision: `fp16`; see `require_graph_precision`.
    """
    require_graph_precision(precision)
    weights_file = next(iter(manifest.matrices)).u_t.file
    with WeightsFile(target / weights_file) as weights:
        for spec in manifest.passes.values():
            convert_file(source / spec.file, target, weights, precision)
        matrices = _half_bases(source, manifest, weights, precision)
    files = file_specs(target)
    converted = dataclasses.replace(
        manifest, matrices=matrices, files=files, precision=precision, engines=(), one_task=None
    )
    (target / MANIFEST_FILE).write_text(json_from_manifest(converted), encoding="utf-8")
    return converted


def _half_bases(
    source: Path, manifest: Manifest, weights: WeightsFile, precision: Precision
) -> tuple[MatrixBases, ...]:
    """The graph has stored the bases already; equal bytes are stored once. The singular values stay fp32."""

    def half(array: StoredArray, name: str) -> StoredArray:
        return weights.add(half_array(map_array(source, array), HALVES[precision], name))

    old = () if manifest.one_task is None else manifest.one_task.bases
    new = [half(table, f"{BASES}{index}") for index, table in enumerate(old)]

    def half_side(side: StoredArray, name: str) -> StoredArray:
        return half(side, name) if side.stride is None else moved(side, old, new)

    return tuple(
        dataclasses.replace(
            matrix,
            u_t=half_side(matrix.u_t, matrix.name),
            s=weights.add(np.asarray(map_array(source, matrix.s))),
            vh=half_side(matrix.vh, matrix.name),
        )
        for matrix in manifest.matrices
    )
