"""The plain CLIP pass that times are compared with: the base tower and every head, in one graph.

All tokens go through all blocks, as in open_clip. `trimmed`, its last block runs for the CLS token alone, as in both of
our passes: the most that an exporter can do without changing the numbers.

It is read back out of a bundle: the second pass' dense weights lie in the weights file under the base's names, and the
vector parameters, which only differ in value, are those of the first task's model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

import mass_export
from mass_export.errors import DataError
from mass_export.graph import Graph
from mass_export.heads import Head
from mass_export.second_pass import CONV1, add_heads, vector_sizes
from mass_export.spec import VisionSpec
from mass_export.vit_graph import Layers, block, cls_row, embed, encode, pool
from mass_export.weights_file import WeightsFile
from runtime.bundle import SECOND_PASS, Manifest
from runtime.manifest import read_manifest
from runtime.mapped_files import map_array

BASE, HEADS = "base.", "heads."


def write_plain_pass(bundle: Path, directory: Path, *, trimmed: bool = False) -> Path:
    """Write `plain.onnx` (`trimmed.onnx`) and its weights.

    Args:
        bundle: in any precision; the plain pass is always fp32, of random weights where the bundle has int8.
        directory: where to; exists.
        trimmed: run the last block for the CLS token alone.

    Raises:
        DataError: the bundle's graphs are not of this version.
    """
    manifest = read_manifest(bundle)
    spec = vision_spec_of(manifest)
    stored = {
        str(value.name): value.const_value
        for value in ir.load(bundle / manifest.passes[SECOND_PASS].file).graph.initializers.values()
    }
    params = _base_parameters(bundle, manifest, spec, stored)
    weight = torch.from_numpy(_array(stored, f"{HEADS}weight.T").T.copy())
    bias = torch.from_numpy(_array(stored, f"{HEADS}bias").copy()) if f"{HEADS}bias" in stored else None
    name = "trimmed" if trimmed else "plain"
    with WeightsFile(directory / f"{name}.bin") as weights:
        graph = Graph(name, weights)
        return save_plain(graph, Layers(graph, spec, params, BASE), [Head(weight, bias)], directory, trimmed)


def save_plain(graph: Graph, layers: Layers, heads: list[Head], directory: Path, trimmed: bool) -> Path:  # noqa: FBT001
    """Write the graph: pixel_values -> logits."""
    spec = layers.spec
    images = graph.input("pixel_values", ir.DataType.FLOAT, ["B", 3, *spec.image_size])
    if trimmed:
        feature = encode(layers, images)
    else:
        x = embed(layers, images)
        for index in range(spec.layers):
            x = block(layers, index, x)
        feature = pool(layers, cls_row(layers, x))
    logits = add_heads(graph, feature, heads)
    path = directory / f"{graph.name}.onnx"
    classes = sum(head.weight.shape[0] for head in heads)
    graph.save(path, {"logits": (logits, ["B", classes])}, mass_export.__version__)
    return path


def vision_spec_of(manifest: Manifest) -> VisionSpec:
    """The tower that a manifest describes."""
    names = VisionSpec.__dataclass_fields__
    return VisionSpec.from_json({name: value for name, value in manifest.model.items() if name in names})


def _base_parameters(
    bundle: Path, manifest: Manifest, spec: VisionSpec, stored: dict[str, Any]
) -> dict[str, Tensor]:
    params: dict[str, np.ndarray[Any, Any]] = {}
    shapes = spec.parameter_shapes()
    for name in spec.matrix_names():
        if f"{BASE}{name}.T" in stored:
            params[name] = _array(stored, f"{BASE}{name}.T").T
        elif f"{BASE}{name}" in stored:
            params[name] = _array(stored, f"{BASE}{name}")
    if manifest.one_task is not None and manifest.one_task.tables is not None:
        tables = manifest.one_task.tables
        row, start = map_array(bundle, tables.vectors)[0], 0
        for name, size in vector_sizes(spec).items():
            params[name] = row[start : start + size]
            start += size
        if tables.conv1 is not None:
            params[CONV1] = map_array(bundle, tables.conv1)[0].T.reshape(shapes[CONV1])
        elif f"{BASE}{CONV1}.T" in stored:
            params[CONV1] = _array(stored, f"{BASE}{CONV1}.T").T.reshape(shapes[CONV1])
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():  # of an int8 bundle; equal weights would be stored, and read, once
        if name not in params:
            params[name] = 0.02 * rng.standard_normal(shape, np.float32)
    return {name: torch.from_numpy(np.array(array, dtype=np.float32)) for name, array in params.items()}


def _array(stored: dict[str, Any], name: str) -> Any:
    if name not in stored:
        raise DataError(f"{SECOND_PASS}: no weight {name}; export the bundle again with this version.")
    return stored[name].numpy()
