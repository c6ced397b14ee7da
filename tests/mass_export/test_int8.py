"""Bundles in eight bits: what is rounded, what is stored, and what comes out."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_export.bundle_int8 import convert_bundle_int8
from mass_export.cli import main
from mass_export.errors import ExportError
from mass_export.int8 import int8_rows
from runtime.classifier import Classifier
from runtime.cores import CoreCache
from runtime.errors import BackendError
from runtime.manifest import read_manifest
from runtime.mapped_files import map_array

SETS = [(0,), (1,), (0, 1), (1, 2), (0, 1, 2), (2,)]


def images(count=6):
    return np.random.default_rng(3).normal(size=(count, 3, 16, 16)).astype(np.float32)


@pytest.fixture
def both(pico_bundle, tmp_path):
    """`both(**recipe keys)`: an fp32 bundle and its int8 copy."""

    def make(**keys):
        _, _, bundle = pico_bundle(**{"router": {"layer": 1}} | keys)
        target = tmp_path / "int8"
        target.mkdir()
        convert_bundle_int8(bundle, read_manifest(bundle), target)
        return bundle, target

    return make


@given(st.integers(0, 1000), st.floats(1e-6, 1e6))
@settings(max_examples=25, deadline=None)
def test_rows_are_rounded_to_half_a_step_of_their_own_scale(seed, size):
    array = (size * np.random.default_rng(seed).normal(size=(3, 4, 9))).astype(np.float32)
    array[1, 2] = 0
    steps, scale = int8_rows(array)
    assert steps.dtype == np.int8
    assert scale[1, 2] == 0
    error = np.abs(steps * scale[..., None] - array)
    assert (error <= (0.5 + 1e-4) * scale[..., None]).all()


def test_a_weight_that_is_not_finite_is_refused():
    with pytest.raises(ExportError, match="NaN"):
        int8_rows(np.array([[1.0, np.nan]]))


def test_dense_products_are_integers_and_the_rest_is_float(both):
    _, target = both()
    for name, dense in (("first_pass", 8), ("one_task_0", 12), ("second_pass", 13)):
        graph = onnx.load(target / f"{name}.onnx", load_external_data=False).graph
        ops = [node.op_type for node in graph.node]
        assert ops.count("MatMulInteger") + ops.count("MatMulIntegerToFloat") >= dense - 4
        # The two passes are plain ONNX; the others are for ONNX Runtime alone.
        assert name.startswith("one_task") or "MatMulIntegerToFloat" not in ops
        kept = {
            t.name for t in graph.initializer if t.data_type == onnx.TensorProto.FLOAT and len(t.dims) == 2
        }
        assert not any(
            "attn" in name or "mlp.c_" in name for name in kept if name.startswith(("base.", "merged."))
        )
        onnx.checker.check_model(str(target / f"{name}.onnx"), full_check=True)


@pytest.mark.parametrize("keys", [{}, {"compose": "sum"}, {"vectors": "base"}, {"base_merge": "zeroshot"}])
def test_sets_of_every_size_come_close_to_fp32(both, keys):
    bundle, target = both(**keys)
    gates = np.full((len(SETS), 3), 1 / 3, np.float32)
    with Classifier(bundle, "cpu", num_threads=1) as full, Classifier(target, "cpu", num_threads=1) as narrow:
        assert narrow.manifest.precision == "int8"
        expected, actual = (c._second_pass(images(), SETS, gates) for c in (full, narrow))
        routed, rounded = (c.forward(images()).residuals for c in (full, narrow))
    assert np.abs(actual - expected).max() <= 0.05 * np.abs(expected).max()
    assert np.abs(actual - expected).max() > 0
    np.testing.assert_allclose(rounded, routed, rtol=0.03)


def test_a_samples_result_does_not_depend_on_its_batch(both):
    _, target = both(router={"layer": 1, "mode": "top1"})
    loud = np.concatenate([images(1), 50 * images(4)[1:]])
    with Classifier(target, "cpu", num_threads=1) as classifier:
        alone, together = classifier.forward(images(1)), classifier.forward(loud)
    np.testing.assert_allclose(together.residuals[0], alone.residuals[0], rtol=1e-5)


def test_cores_carry_the_scales_of_int8_bases(both):
    bundle, target = both()
    plain, narrow = (read_manifest(path) for path in (bundle, target))
    full, scaled = (CoreCache(path, m.matrices, 4) for path, m in ((bundle, plain), (target, narrow)))
    for tasks in ((1,), (0, 2)):
        for wide, small in zip(plain.matrices, narrow.matrices, strict=True):
            deltas = []
            for path, matrix, cores in ((bundle, wide, full), (target, small, scaled)):
                u_t, vh = (map_array(path, array).astype(np.float64) for array in (matrix.u_t, matrix.vh))
                left, right = (np.concatenate([part[i] for i in tasks]) for part in (u_t, vh))
                deltas.append(left.T @ cores.get(tasks)[matrix.core] @ right)
            assert np.abs(deltas[1] - deltas[0]).max() <= 0.04 * np.abs(deltas[0]).max()


def test_an_int8_bundle_is_a_fraction_of_the_fp32_one(both):
    sizes = [sum(file.stat().st_size for file in path.glob("*.bin")) for path in both()]
    assert sizes[1] < 0.5 * sizes[0]


def test_export_writes_int8_and_a_precise_router_is_its_alone(pico_bundle, tmp_path):
    pico_bundle(router={"layer": 1})
    arguments = [
        "export",
        "--artifact",
        str(tmp_path / "merged.safetensors"),
        "--out",
        str(tmp_path / "out"),
        "-q",
    ]
    done = CliRunner().invoke(main, [*arguments, "--precision", "int8"])
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "out").precision == "int8"
    wrong = CliRunner().invoke(main, [*arguments, "--precise-router"])
    assert "goes with --precision int8" in wrong.stderr


def test_a_precise_router_keeps_attention_and_is_closer_to_fp32(pico_bundle, tmp_path):
    _, _, bundle = pico_bundle(router={"layer": 2})
    errors = []
    for precise in (False, True):
        target = tmp_path / str(precise)
        target.mkdir()
        convert_bundle_int8(bundle, read_manifest(bundle), target, precise_router=precise)
        with (
            Classifier(bundle, "cpu", num_threads=1) as full,
            Classifier(target, "cpu", num_threads=1) as narrow,
        ):
            expected, actual = (c.forward(images(32)).residuals for c in (full, narrow))
        errors.append(np.sqrt(np.mean((actual / expected - 1) ** 2)))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("base_merge", ["zeroshot", "tsvm"])
def test_a_router_in_int8_leaves_classes_in_fp32(pico_bundle, tmp_path, base_merge):
    _, _, bundle = pico_bundle(router={"layer": 2, "mode": "top1"}, base_merge=base_merge)
    artifact, out = str(tmp_path / "merged.safetensors"), tmp_path / "out"
    done = CliRunner().invoke(
        main, ["export", "--artifact", artifact, "--out", str(out), "-q", "--router-precision", "int8"]
    )
    assert done.exit_code == 0, done.output
    manifest = read_manifest(out)
    assert (manifest.precision, manifest.router_precision) == ("fp32", "int8")
    first = onnx.load(out / "first_pass.onnx", load_external_data=False).graph
    assert "MatMulInteger" in {node.op_type for node in first.node}
    with Classifier(bundle, "cpu", num_threads=1) as full, Classifier(out, "cpu", num_threads=1) as mixed:
        expected, actual = (c.forward(images(16)) for c in (full, mixed))
        given, same = (c.forward(images(16), tasks=[full.tasks[1]]).logits for c in (full, mixed))
        with pytest.raises(BackendError, match="for CPUs"):
            Classifier(out, "cuda")
    np.testing.assert_allclose(actual.residuals, expected.residuals, rtol=0.03)
    assert not np.array_equal(actual.residuals, expected.residuals)
    np.testing.assert_allclose(same, given, atol=1e-4)
    sizes = [(path / "weights.bin").stat().st_size for path in (bundle, out)]
    assert sizes[1] < sizes[0] if base_merge == "tsvm" else sizes[1] <= sizes[0]


@pytest.mark.parametrize(
    "more", [["--precision", "int8"], ["--precision", "fp16"], ["--backend", "tensorrt"]]
)
def test_a_router_in_int8_goes_with_fp32_graphs_alone(pico_bundle, tmp_path, more):
    pico_bundle(router={"layer": 1})
    artifact = str(tmp_path / "merged.safetensors")
    arguments = [
        "export",
        "--artifact",
        artifact,
        "--out",
        str(tmp_path / "out"),
        "--router-precision",
        "int8",
    ]
    refused = CliRunner().invoke(main, [*arguments, *more])
    assert refused.exit_code == 1
    assert "router_precision: expected int8, with --precision fp32" in refused.stderr
    assert not (tmp_path / "out").exists()


def test_vnni_is_what_linux_says(tmp_path):
    from runtime.onnx_session import has_vnni

    for flags, expected in (("avx2 avx512_vnni", True), ("avx2 avx_vnni", True), ("avx2 fma", False)):
        file = tmp_path / flags.replace(" ", "_")
        file.write_text(f"flags : {flags}")
        assert has_vnni(file) is expected
    assert not has_vnni(tmp_path / "absent")
