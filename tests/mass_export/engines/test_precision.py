"""Half precision: what is computed in which type, what is stored, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from safetensors.torch import load_file, save_file

from mass_export.artifact import read_artifact, write_artifact
from mass_export.bundle_precision import convert_bundle
from mass_export.errors import ExportError
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.precision import HALVES, half_array, write_converted
from mass_export.precision_check import LARGEST_FP16, check_decisions, measure_extremes
from mass_export.precision_emulation import emulate_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.verify import compare, sample_images
from runtime.bundle import PassSpec
from runtime.classifier import Classifier
from runtime.engine_spec import Precision, shape_with
from runtime.manifest import read_manifest
from runtime.mapped_files import map_array

PASSES = ("first_pass", "second_pass")
HALF_TYPES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
FLOAT = onnx.TensorProto.FLOAT
QUIET = Progress(quiet=True)


def feeds_for(spec: PassSpec, images: np.ndarray) -> dict[str, np.ndarray]:
    rng, dims = np.random.default_rng(1), {"S": 1, "K": 2}
    slots, weights = np.array([[0, 2]]), np.full((1, 2), 0.5, np.float32)
    feeds = {"pixel_values": images, "slots": slots, "weights": weights}
    for tensor in spec.inputs:
        if tensor.name.startswith("cores."):
            core = 0.1 * rng.normal(size=shape_with(tensor.shape, dims))
            feeds[tensor.name] = core.astype(np.float32)
    return {tensor.name: feeds[tensor.name] for tensor in spec.inputs}


def typed_nodes(path: Path) -> list[tuple[onnx.NodeProto, list[int], int]]:
    """Each node with the types of its inputs and of its output, from strict shape inference."""
    model = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, check_type=True)
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return [(n, [types[name] for name in n.input if name], types[n.output[0]]) for n in model.graph.node]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", PASSES)
def test_products_are_half_and_norms_softmax_reductions_and_the_stream_are_fp32(
    exported: Path, tmp_path: Path, name: str, precision: str
) -> None:
    path = write_converted(exported / "bundle" / f"{name}.onnx", tmp_path, precision)
    onnx.checker.check_model(str(path), full_check=True)
    nodes, half = typed_nodes(path), HALF_TYPES[precision]
    full = {"LayerNormalization", "Softmax", "ReduceSumSquare", "ReduceL2", "Sqrt", "Div", "Sub", "Max"}
    for node, inputs, output in nodes:
        if node.op_type in full:
            assert set(inputs) - {onnx.TensorProto.INT64} == {FLOAT} == {output}, node.op_type
    kept = ("router.", "heads.")
    views = {
        node.output[0]: node.input[0] for node, *_ in nodes if node.op_type in ("Gather", "Slice", "Reshape")
    }
    products = [(node, inputs) for node, inputs, _ in nodes if node.op_type == "MatMul"]
    for node, inputs in products:
        sources = [views.get(operand, operand) for operand in node.input]
        expected = FLOAT if any(s.startswith(kept) or s == "vectors" for s in sources) else half
        assert set(inputs) == {expected}, node.input
    assert sum(half in inputs for _, inputs in products) > 0.9 * len(products)
    normed = {node.input[0] for node, *_ in nodes if node.op_type == "LayerNormalization"}
    normed |= {views[name] for name in normed if name in views}
    stream = [inputs for node, inputs, _ in nodes if node.op_type == "Add" and node.output[0] in normed]
    assert len(stream) >= 4
    assert all(set(inputs) == {FLOAT} for inputs in stream)


@pytest.mark.parametrize("name", PASSES)
def test_inputs_and_outputs_keep_their_types_and_weights_take_half_the_space(
    exported: Path, tmp_path: Path, name: str
) -> None:
    source = exported / "bundle" / f"{name}.onnx"
    path = write_converted(source, tmp_path, "fp16")
    before, after = (onnx.load(p, load_external_data=False).graph for p in (source, path))
    assert list(before.input) == list(after.input)
    assert list(before.output) == list(after.output)
    sizes = [
        sum(
            np.prod(t.dims) * (2 if t.data_type == onnx.TensorProto.FLOAT16 else 4) for t in graph.initializer
        )
        for graph in (before, after)
    ]
    assert sizes[1] < 0.65 * sizes[0]


def test_an_fp16_bundle_runs_in_onnx_runtime_and_agrees_with_the_eager_model(
    exported: Path, tmp_path: Path
) -> None:
    artifact = read_artifact(exported / "merged.safetensors")
    bundle = export_bundle(
        artifact,
        exported / "merged.safetensors",
        tmp_path / "half",
        verify=True,
        progress=QUIET,
        precision="fp16",
    )
    manifest = read_manifest(bundle)
    assert manifest.precision == "fp16"
    full = read_manifest(exported / "bundle")
    assert (bundle / "weights.bin").stat().st_size < 0.65 * full.files["weights.bin"].bytes
    images = sample_images(artifact, 32)
    with Classifier(bundle, "cpu") as classifier:
        parity = compare(MassModel(artifact).forward(torch.from_numpy(images)), classifier.forward(images))
    assert parity.residuals_max_rel < 5e-3
    assert parity.logits_max_abs < 0.01 * parity.largest_logit
    assert min(parity.equal_sets, parity.equal_tasks, parity.equal_classes) > 0.9


def test_the_runtimes_bases_are_those_of_the_graph(exported: Path, tmp_path: Path) -> None:
    source, target = exported / "bundle", tmp_path / "half"
    target.mkdir()
    full = read_manifest(source)
    half = convert_bundle(source, full, target, "fp16")
    graph = onnx.load(target / "second_pass.onnx", load_external_data=False).graph
    stored = {t.name: {e.key: e.value for e in t.external_data} for t in graph.initializer if t.external_data}
    for ours, theirs in zip(half.matrices, full.matrices, strict=True):
        assert (ours.u_t.dtype, ours.s.dtype, ours.vh.dtype) == ("float16", "float32", "float16")
        np.testing.assert_array_equal(map_array(target, ours.s), map_array(source, theirs.s))
        for side in ("u_t", "vh"):
            found, wanted = map_array(target, getattr(ours, side)), map_array(source, getattr(theirs, side))
            np.testing.assert_allclose(found, wanted, atol=5e-4)
            side_of, own = getattr(ours, side), f"bases.{ours.name}.{side}"
            tensor = stored["bases.0" if side_of.stride is not None else own]
            start = int(tensor["offset"])
            assert start <= side_of.offset < side_of.end <= start + int(tensor["length"])


def test_bf16_graphs_agree_with_fp32_in_the_reference_evaluator(exported: Path, tmp_path: Path) -> None:
    source = exported / "bundle"
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    for name, spec in read_manifest(source).passes.items():
        feeds = feeds_for(spec, images)
        in_full = onnxruntime.InferenceSession(source / spec.file).run(None, feeds)
        path = write_converted(source / spec.file, tmp_path / name, "bf16")
        in_half = ReferenceEvaluator(str(path)).run(None, feeds)
        for half, full in zip(in_half, in_full, strict=True):
            assert half.dtype == np.float32
            np.testing.assert_allclose(half, full, rtol=0, atol=0.03 * np.abs(full).max())
            assert not np.array_equal(half, full)


def test_bf16_is_refused_for_bundles_that_onnx_runtime_is_to_run(exported: Path, tmp_path: Path) -> None:
    artifact = read_artifact(exported / "merged.safetensors")
    with pytest.raises(ExportError, match=r"build-engines --precision bf16"):
        export_bundle(
            artifact,
            exported / "merged.safetensors",
            tmp_path / "b",
            verify=False,
            progress=QUIET,
            precision="bf16",
        )
    assert not (tmp_path / "b").exists()


def test_a_weight_beyond_the_range_is_an_error_for_fp16_alone() -> None:
    weight = np.array([1.0, 1e5], dtype=np.float32)
    with pytest.raises(ExportError, match=r"1e\+05 is beyond the range of float16"):
        half_array(weight, HALVES["fp16"], "w")
    assert np.isfinite(half_array(weight, HALVES["bf16"], "w").astype(np.float32)).all()


# Emulated half precision


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_emulation_rounds_where_the_typed_graph_does(
    exported: Path, tmp_path: Path, precision: Precision
) -> None:
    source, emulated = exported / "bundle", tmp_path / "emulated"
    emulated.mkdir()
    manifest = emulate_bundle(source, emulated, precision)
    images = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    for name, spec in manifest.passes.items():
        feeds = feeds_for(spec, images)
        typed = write_converted(source / spec.file, tmp_path / name, precision)
        expected = ReferenceEvaluator(str(typed)).run(None, feeds)[0]
        session = onnxruntime.InferenceSession(emulated / spec.file)
        actual, *_, half, stream = session.run(None, feeds)
        full = onnxruntime.InferenceSession(source / spec.file).run(None, feeds)[0]
        step = np.abs(actual - full).max()
        assert 0 < np.abs(actual - expected).max() < step  # nearer to the typed graph than fp32 is
        assert 0.1 < half < LARGEST_FP16
        assert 0.1 < stream < 100


def test_the_largest_values_are_those_of_the_pass(exported: Path, tmp_path: Path) -> None:
    emulate_bundle(exported / "bundle", tmp_path, "bf16")
    images = sample_images(read_artifact(exported / "merged.safetensors"), 4)
    extremes = measure_extremes(tmp_path, images)
    assert extremes.keys() == set(PASSES)
    twice = measure_extremes(tmp_path, np.concatenate([images, 100 * images]))
    assert twice["first_pass"].half > 50 * images.max()
    assert twice["first_pass"].half > extremes["first_pass"].half


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_emulated_bundles_decide_as_the_eager_model(
    exported: Path, tmp_path: Path, precision: Precision
) -> None:
    artifact = read_artifact(exported / "merged.safetensors")
    emulate_bundle(exported / "bundle", tmp_path, precision)
    model = MassModel(artifact)
    parity = check_decisions(
        tmp_path, sample_images(artifact, 40), lambda batch: model.forward(torch.from_numpy(batch)), QUIET
    )
    assert parity.images == 40
    assert 0 < parity.logits_max_abs < 0.1 * parity.largest_logit
    assert min(parity.equal_sets, parity.equal_tasks, parity.equal_classes) >= 0.8


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_residual_stream_beyond_the_range_of_fp16_survives_because_it_is_fp32(
    pico_files: Callable[..., Path], tmp_path: Path, precision: Precision
) -> None:
    tasks = load_recipe(pico_files(tasks=2, router={"layer": 2}))
    for path in (tasks.base, *(task.checkpoint for task in tasks.tasks)):
        tower = load_file(path)
        for index in range(3):  # each block adds 40000 to one channel: in range by itself, beyond it in all
            tower[f"visual.transformer.resblocks.{index}.mlp.c_proj.bias"][7] = 40000.0
        save_file(tower, path)
    artifact = merge(tasks, QUIET)
    write_artifact(tmp_path / "merged.safetensors", artifact)
    full = export_bundle(
        artifact, tmp_path / "merged.safetensors", tmp_path / "full", verify=False, progress=QUIET
    )
    (tmp_path / "half").mkdir()
    emulate_bundle(full, tmp_path / "half", precision)
    images = sample_images(artifact, 8)
    for extremes in measure_extremes(tmp_path / "half", images).values():
        assert extremes.half < LARGEST_FP16 < extremes.stream
    with Classifier(full, "cpu") as classifier:
        parity = check_decisions(tmp_path / "half", images, classifier.forward, QUIET)
    assert parity.equal_classes >= 0.75
