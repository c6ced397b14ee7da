"""A whole bundle in eight bits: the graphs, their weights, and the arrays that the runtime reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.graph import tensor_spec
from mass_export.int8 import Int8Conversion, int8_rows, save_int8
from mass_export.one_task_layers import LEFT, RIGHT
from mass_export.stacked_bases import BASES, SIDES, Side, moved, place_in
from mass_export.weights_file import WeightsFile
from runtime.bundle import (
    FIRST_PASS,
    MANIFEST_FILE,
    Manifest,
    MatrixBases,
    PassSpec,
    StoredArray,
    VectorTables,
    all_matrices,
)
from runtime.checksums import file_specs
from runtime.manifest import json_from_manifest
from runtime.mapped_files import map_array

ROUTER_WEIGHTS = "router.bin"
# Most of what rounding does to a routing feature comes from these; see docs/speed.md.
PRECISE_ROUTER = (".attn.", "conv1.")


def convert_bundle_int8(
    source: Path, manifest: Manifest, target: Path, *, precise_router: bool = False
) -> Manifest:
    """Write a copy of an fp32 bundle in eight bits; see `mass_export.int8`.

    Args:
        source: bundle directory.
        manifest: its manifest.
        target: empty directory.
        precise_router: keep attention and the patch convolution of the first pass in fp32.
    """
    weights_file = next(iter(manifest.matrices)).u_t.file
    passes, one_task = {}, manifest.one_task
    with WeightsFile(target / weights_file) as weights:
        bases = _Bases(source, manifest, weights)
        conv1 = None
        tables = None if one_task is None else one_task.tables
        if tables is not None and tables.conv1_bases is not None:
            vectors = weights.add(np.asarray(map_array(source, tables.vectors)))
            tables = VectorTables(vectors, conv1_bases=bases.matrices[tables.conv1_bases.name])
        elif tables is not None and tables.conv1 is not None:
            conv1 = _Convolutions(source, tables.vectors, tables.conv1)
            tables = conv1.store(weights)
        for name, spec in manifest.passes.items():
            kept = PRECISE_ROUTER if precise_router and name == FIRST_PASS else ()
            passes[name] = _convert_pass(source / spec.file, spec, target, weights, bases.steps, conv1, kept)
        if one_task is not None:
            if precise_router:  # then the first pass shares no weights
                one_task = dataclasses.replace(one_task, routers=())
            for file in one_task.files:
                _convert_part(source / file, target / file, weights, conv1)
            one_task = dataclasses.replace(one_task, tables=tables, bases=bases.tables)
        matrices = tuple(bases.matrices[matrix.name] for matrix in manifest.matrices)
    files = file_specs(target)
    converted = dataclasses.replace(
        manifest,
        passes=passes,
        matrices=matrices,
        one_task=one_task,
        files=files,
        precision="int8",
        engines=(),
    )
    (target / MANIFEST_FILE).write_text(json_from_manifest(converted), encoding="utf-8")
    return converted


def round_first_pass(onnx_file: Path, spec: PassSpec, target: Path) -> PassSpec:
    """Write the first pass of an fp32 bundle in eight bits, with a weights file of its own.

    Args:
        onnx_file: in fp32.
        spec: of it.
        target: bundle directory.
    """
    with WeightsFile(target / ROUTER_WEIGHTS) as weights:
        return _convert_pass(onnx_file, spec, target, weights, {}, None, ())


class _Bases:
    """All bases, rounded; one scale for each direction of each task.

    Attributes:
        matrices: as they are stored, by parameter.
        tables: as they are stored.
        steps: of the second pass' initializers by name, and scaled singular values.
    """

    def __init__(self, source: Path, manifest: Manifest, weights: WeightsFile) -> None:
        self._source, self._weights = source, weights
        self._old = () if manifest.one_task is None else manifest.one_task.bases
        self._new = [np.zeros(table.shape, np.int8) for table in self._old]
        self.steps: dict[str, NDArray[Any]] = {f"{BASES}{i}": table for i, table in enumerate(self._new)}
        sides = {
            (matrix.name, side): self._rounded(matrix, side)
            for matrix in all_matrices(manifest)
            for side in SIDES
        }
        self.tables = tuple(weights.add(table) for table in self._new)
        self.matrices = {matrix.name: self._stored(matrix, sides) for matrix in all_matrices(manifest)}

    def _rounded(self, matrix: MatrixBases, side: Side) -> NDArray[np.float32]:
        """Put the steps of a side where they belong; returns their scales. [T, R]"""
        array = getattr(matrix, side)
        steps, scale = int8_rows(map_array(self._source, array))
        place = place_in(self._old, array)
        if place is None:
            self.steps[f"{BASES}{matrix.name}.{side}"] = steps
        else:
            table = self._new[place.table].reshape(len(steps), -1, self._new[place.table].shape[1])
            rows = slice(place.first, place.first + place.rows)
            table[:, rows] = steps.reshape(table[:, rows].shape)
        return scale

    def _stored(
        self, matrix: MatrixBases, scales: Mapping[tuple[str, Side], NDArray[np.float32]]
    ) -> MatrixBases:
        s: NDArray[np.float32] = np.asarray(map_array(self._source, matrix.s))
        u_scale, vh_scale = (scales[matrix.name, side] for side in SIDES)
        self.steps[f"{BASES}{matrix.name}.s"] = s * u_scale * vh_scale
        return dataclasses.replace(
            matrix,
            u_t=self._stored_side(matrix, "u_t"),
            s=self._weights.add(s),
            vh=self._stored_side(matrix, "vh"),
            u_scale=self._weights.add(u_scale),
            vh_scale=self._weights.add(vh_scale),
        )

    def _stored_side(self, matrix: MatrixBases, side: Side) -> StoredArray:
        array = getattr(matrix, side)
        if array.stride is not None:
            return moved(array, self._old, self.tables)
        return self._weights.add(self.steps[f"{BASES}{matrix.name}.{side}"])


class _Convolutions:
    """The tasks' patch convolutions, rounded; one scale for each output of each task."""

    def __init__(self, source: Path, vectors: StoredArray, conv1: StoredArray) -> None:
        steps, self.scale = int8_rows(map_array(source, conv1).transpose(0, 2, 1))
        self.steps: NDArray[np.int8] = np.ascontiguousarray(steps.transpose(0, 2, 1))  # [T, 3*P*P, D]
        self._vectors: NDArray[Any] = np.asarray(map_array(source, vectors))

    def store(self, weights: WeightsFile) -> VectorTables:
        return VectorTables(weights.add(self._vectors), weights.add(self.steps), weights.add(self.scale))


def _convert_part(source: Path, target: Path, weights: WeightsFile, conv1: _Convolutions | None) -> None:
    """A graph of `mass_export.one_task`."""
    model = ir.load(source)
    conversion = Int8Conversion(model.graph, fused=True)
    conversion.run()
    conversion.widen_inputs((BASES, LEFT, RIGHT))
    if conv1 is not None:
        conversion.round_product_of("conv1", "conv1_scale", conv1.scale.shape[1])
    save_int8(model, target, weights)


def _convert_pass(
    onnx_file: Path,
    spec: PassSpec,
    target: Path,
    weights: WeightsFile,
    tables: Mapping[str, NDArray[Any]],
    conv1: _Convolutions | None,
    kept: tuple[str, ...],
) -> PassSpec:
    model = ir.load(onnx_file)
    conversion = Int8Conversion(model.graph, kept)
    conversion.run()
    for name, table in tables.items():
        conversion.replace_table(name, table)
    if conv1 is not None:
        conversion.replace_convolutions("vectors.conv1.weight.T", conv1.steps, conv1.scale)
    save_int8(model, target / onnx_file.name, weights)
    return dataclasses.replace(spec, inputs=tuple(tensor_spec(value) for value in model.graph.inputs))
