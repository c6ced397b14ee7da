"""Eight bits for TensorRT, spelled out in the graph: Q/DQ around the products with the tower's dense weights.

- Weights: symmetric int8, one scale for each output, stored as steps with a DequantizeLinear behind them.
- Activations: symmetric int8, one scale for a whole tensor: the largest magnitude that both passes show on some
  images, each image on the tasks that the router gives it. Larger values are clipped.
- fp32: all else. Low-rank branches read what was not rounded.

`mass_export.int8` is for CPUs: it finds a scale for each token as the graph runs, which TensorRT cannot.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from mass_export.errors import DataError
from mass_export.image_pool import load_pool
from mass_export.int8 import LARGEST, TINIEST, Int8Conversion, save_int8
from mass_export.progress import Progress
from mass_export.verify import RANDOM_IMAGES, random_pixel_values
from mass_export.weights_file import WeightsFile
from runtime.bundle import FIRST_PASS, MANIFEST_FILE, SECOND_PASS, Manifest
from runtime.checksums import file_specs
from runtime.cores import CoreCache
from runtime.manifest import json_from_manifest, read_manifest
from runtime.onnx_session import OnnxSession
from runtime.routing import gates_from_residuals, select_tasks
from runtime.second_pass import run_second_pass

CALIBRATION_IMAGES = 256
BATCH = 16
PEAK = "peak."

Peaks = dict[str, dict[str, float]]


@dataclass(frozen=True)
class CalibrationImages:
    """Images that the scales are found on.

    Attributes:
        source: name of the folder or file, or `random images`.
        pixel_values: as the bundle takes them. [N, ..]
    """

    source: str
    pixel_values: NDArray[Any]

    def describe(self) -> str:
        """For the engine's key: source, count and content."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixel_values).data).hexdigest()[:12]
        return f"calibration={self.source}:{len(self.pixel_values)}:{digest}"


def calibration_images(manifest: Manifest, place: Path | None) -> CalibrationImages:
    """Up to 256 images of a folder, image or array file; without one, random images.

    Raises:
        DataError: there are no images, or one cannot be read.
    """
    if place is None:
        return CalibrationImages("random images", random_pixel_values(manifest.preprocess, RANDOM_IMAGES))
    images = load_pool(place, manifest.preprocess, CALIBRATION_IMAGES)
    if not np.isfinite(images).all():
        raise DataError(f"{place}: NaN or infinity among the pixel values.")
    return CalibrationImages(place.name or str(place), images)


def find_peaks(bundle: Path, images: NDArray[np.float32], progress: Progress) -> Peaks:
    """Largest magnitude of every activation that is to be rounded, for each pass, by the value's name.

    Args:
        bundle: of fp32 graphs.
        images: normalised. [N, 3, H, W]
        progress: where to show it.
    """
    manifest = read_manifest(bundle)
    router, matrices = manifest.router, manifest.matrices if manifest.compose == "tsvm" else ()
    with tempfile.TemporaryDirectory(prefix="mass-calibration-") as scratch:
        first, second = (
            _Recorded(_write_recording(bundle / manifest.passes[name].file, Path(scratch)))
            for name in (FIRST_PASS, SECOND_PASS)
        )
        cores = CoreCache(bundle, matrices, 64)
        for start in progress.track(range(0, len(images), BATCH), "Calibrating"):
            batch = images[start : start + BATCH]
            residuals = first.run({manifest.preprocess.input_name: batch})["residuals"]
            gates = gates_from_residuals(residuals, router.mode, router.temperature)
            selection = select_tasks(gates, router.mode, router.threshold, router.max_tasks)
            run_second_pass(second, manifest, cores, pixel_values=batch, sets=selection.sets(), gates=gates)
        first.close()
        second.close()
    return {FIRST_PASS: first.peaks, SECOND_PASS: second.peaks}


def write_quantised(onnx_file: Path, directory: Path, peaks: Mapping[str, float]) -> Path:
    """Write a copy of one fp32 pass with Q/DQ, with a weights file of its own.

    Args:
        onnx_file: fp32 graph.
        directory: created; takes the graph under its own name.
        peaks: of this pass, see `find_peaks`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with WeightsFile(directory / f"{onnx_file.stem}.bin") as weights:
        model = ir.load(onnx_file)
        _QdqConversion(model.graph, peaks).run()
        save_int8(model, directory / onnx_file.name, weights)
    return directory / onnx_file.name


def quantise_bundle(source: Path, target: Path, images: NDArray[np.float32], progress: Progress) -> Manifest:
    """Write a copy of an fp32 bundle with the graphs of int8 engines, to run them on a CPU.

    Args:
        source: bundle directory.
        target: empty directory.
        images: to calibrate on. [N, 3, H, W]
        progress: where to show it.
    """
    manifest, peaks = read_manifest(source), find_peaks(source, images, progress)
    for name in {array.file for m in manifest.matrices for array in (m.u_t, m.s, m.vh)}:
        shutil.copyfile(source / name, target / name)
    for name, spec in manifest.passes.items():
        write_quantised(source / spec.file, target, peaks[name])
    files = file_specs(target)
    quantised = dataclasses.replace(manifest, files=files, engines=(), one_task=None)
    (target / MANIFEST_FILE).write_text(json_from_manifest(quantised), encoding="utf-8")
    return quantised


class _QdqConversion(Int8Conversion):
    """One graph under conversion: operands of dense products go through eight bits."""

    smallest_scale = TINIEST  # TensorRT wants positive scales

    def __init__(self, graph: ir.Graph, peaks: Mapping[str, float]) -> None:
        super().__init__(graph)
        self._peaks = peaks
        self._widened: dict[ir.Value, ir.Value] = {}

    def _convert_dense(self, node: ir.Node, x: ir.Value, weight: ir.Value) -> None:
        if x not in self._widened:
            self._widened[x] = self._through_eight_bits(x, node)
        if weight not in self._widened:
            dense = self._rounded_weight(weight)
            self._widened[weight] = self._add(node, "DequantizeLinear", dense.steps, dense.scale, axis=1)
        node.replace_input_with(0, self._widened[x])
        node.replace_input_with(1, self._widened[weight])

    def _through_eight_bits(self, x: ir.Value, before: ir.Node) -> ir.Value:
        step = np.float32(max(self._peaks[str(x.name)], TINIEST) / LARGEST)
        scale = self._initializer(f"{x.name}.scale", np.asarray(step))
        zero = self._inline("zero", np.int8(0))
        steps = self._add(before, "QuantizeLinear", x, scale, zero)
        return self._add(before, "DequantizeLinear", steps, scale, zero)


class _Recording(Int8Conversion):
    """One graph that also gives the peak of each operand that `_QdqConversion` rounds."""

    def _convert_dense(self, node: ir.Node, x: ir.Value, _weight: ir.Value) -> None:
        name = f"{PEAK}{x.name}"
        if any(output.name == name for output in self._graph.outputs):
            return
        peak = self._add(node, "ReduceMax", self._add(node, "Abs", x), keepdims=0)
        peak.name, peak.type, peak.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
        self._graph.outputs.append(peak)


def _write_recording(onnx_file: Path, directory: Path) -> Path:
    with WeightsFile(directory / f"{onnx_file.stem}.bin") as weights:
        model = ir.load(onnx_file)
        _Recording(model.graph).run()
        save_int8(model, directory / onnx_file.name, weights)
    return directory / onnx_file.name


class _Recorded(OnnxSession):
    """Keeps the largest of each peak."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.peaks: dict[str, float] = {}

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        outputs = super().run(feeds)
        for name in [name for name in outputs if name.startswith(PEAK)]:
            value = name.removeprefix(PEAK)
            self.peaks[value] = max(self.peaks.get(value, 0.0), float(outputs.pop(name)))
        return outputs
