"""A half-precision pass that any CPU runs: products in fp32, every half value rounded to its type in between.

That is what tensor cores do: they add up in fp32 and round the result. ONNX Runtime lacks bf16 kernels on a CPU, and
with fp16 it keeps intermediate values in fp32, which hides what rounding and overflow would do on a GPU.

The graphs also give `largest.half`, the largest magnitude before it is rounded to half, and `largest.stream`, that of
the residual stream, which is fp32.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import onnx_ir as ir

from mass_export.precision import HALVES, MOVES, convert_file, is_residual_stream
from mass_export.weights_file import WeightsFile
from runtime.bundle import MANIFEST_FILE, Manifest
from runtime.checksums import file_specs
from runtime.engine_spec import Precision
from runtime.manifest import json_from_manifest, read_manifest

LARGEST_HALF, LARGEST_STREAM = "largest.half", "largest.stream"
HALF_WEIGHTS_FILE = "half.bin"


def emulate_bundle(source: Path, target: Path, precision: Precision) -> Manifest:
    """Write a copy of an fp32 bundle whose passes emulate another precision.

    The cores stay those of the fp32 bases, as with half engines of an fp32 bundle.

    Args:
        source: fp32 bundle.
        target: empty directory.
        precision: `fp16` or `bf16`.
    """
    manifest = read_manifest(source)
    for name in {array.file for m in manifest.matrices for array in (m.u_t, m.s, m.vh)}:
        shutil.copyfile(source / name, target / name)
    with WeightsFile(target / HALF_WEIGHTS_FILE) as weights:
        for spec in manifest.passes.values():
            model = ir.load(convert_file(source / spec.file, target, weights, precision))
            _emulate(model.graph, HALVES[precision])
            ir.save(model, target / spec.file)
    files = file_specs(target)
    emulated = dataclasses.replace(manifest, files=files, engines=(), one_task=None)
    (target / MANIFEST_FILE).write_text(json_from_manifest(emulated), encoding="utf-8")
    return emulated


def _emulate(graph: ir.Graph, half: ir.DataType) -> None:
    nodes, halves, stream = list(graph), set[ir.Value](), []
    for value in list(graph.initializers.values()):
        if value.dtype == half:
            halves.add(_full(graph, value, nodes[0]))
    largest = []
    for node in nodes:
        if node.op_type in MOVES:
            if node.inputs[0] in halves:
                halves |= set(node.outputs)
            continue
        if is_residual_stream(node):
            stream.append(node.outputs[0])
        if node.op_type == "Cast" and node.attributes["to"].as_int() == half:
            source = node.inputs[0]
            assert source is not None
            largest.append(source)
            halves.add(_replaced_by_casts(graph, node, [ir.DataType.FLOAT]))
        elif node.op_type != "Cast" and any(value in halves for value in node.inputs):
            largest.append(node.outputs[0])
            halves.add(_replaced_by_casts(graph, node, [half, ir.DataType.FLOAT]))
    _add_largest(graph, LARGEST_HALF, largest)
    _add_largest(graph, LARGEST_STREAM, stream)


def _full(graph: ir.Graph, value: ir.Value, before: ir.Node) -> ir.Value:
    """An initializer as fp32, for all who read it."""
    cast = ir.node("Cast", [value], {"to": int(ir.DataType.FLOAT)})
    graph.insert_before(before, cast)
    _hand_over(value, cast.outputs[0], cast)
    return cast.outputs[0]


def _replaced_by_casts(graph: ir.Graph, node: ir.Node, types: list[ir.DataType]) -> ir.Value:
    """Casts behind a node, whose output all its readers take instead."""
    value, last = node.outputs[0], node
    casts = []
    for dtype in types:
        cast = ir.node("Cast", [last.outputs[0]], {"to": int(dtype)})
        graph.insert_after(last, cast)
        casts.append(cast)
        last = cast
    _hand_over(value, last.outputs[0], casts[0])
    return last.outputs[0]


def _hand_over(value: ir.Value, to: ir.Value, but: ir.Node) -> None:
    for user, index in list(value.uses()):
        if user is not but:
            user.replace_input_with(index, to)


def _add_largest(graph: ir.Graph, name: str, values: list[ir.Value]) -> None:
    magnitudes = []
    for value in dict.fromkeys(values):
        magnitude = ir.node("Abs", [value])
        graph.append(magnitude)
        peak = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0})
        graph.append(peak)
        magnitudes.append(peak.outputs[0])
    joined = ir.node("Max", magnitudes)
    graph.append(joined)
    output = joined.outputs[0]
    output.name, output.type, output.shape = name, ir.TensorType(ir.DataType.FLOAT), ir.Shape(())
    graph.outputs.append(output)
