"""Int8 engines: what is rounded, on which images, what comes out, and that TensorRT-RTX takes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import numpy_helper
from PIL import Image

from mass_export import engine_bundle
from mass_export.artifact import read_artifact
from mass_export.cli import main
from mass_export.engine_bundle import build_engines
from mass_export.engine_int8 import calibration_images, find_peaks, quantise_bundle, write_quantised
from mass_export.errors import DataError
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.verify import compare, sample_images
from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.checksums import check_files
from runtime.classifier import Classifier
from runtime.engine_settings import EngineSettings
from runtime.errors import EngineError
from runtime.manifest import read_manifest

QUIET = Progress(quiet=True)
PASSES = (FIRST_PASS, SECOND_PASS)
INT8 = EngineSettings("tensorrt_rtx", "int8", batch=(1, 2, 4), slots=(1, 1, 2))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed in range(3):
        pixels = np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    return folder


@pytest.fixture
def quantised(exported: Path, tmp_path: Path) -> Path:
    target = tmp_path / "quantised"
    target.mkdir()
    images = sample_images(read_artifact(exported / "merged.safetensors"))
    quantise_bundle(exported / "bundle", target, images, QUIET)
    return target


@pytest.fixture
def fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[onnx.ModelProto]:
    """Engines are made-up bytes; the list takes the graphs that were built."""
    built: list[onnx.ModelProto] = []

    def build(onnx_file: Path, *_args: Any, **_kwargs: Any) -> bytes:
        built.append(onnx.load(onnx_file))
        return f"engine {len(built)}".encode()

    monkeypatch.setattr(engine_bundle, "build_engine", build)
    return built


@pytest.mark.parametrize("name", PASSES)
def test_dense_products_read_eight_bits_and_nothing_else_does(
    exported: Path, quantised: Path, name: str
) -> None:
    path = quantised / f"{name}.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    before, after = (onnx.load(p).graph for p in (exported / "bundle" / f"{name}.onnx", path))
    assert (list(before.input), list(before.output)) == (list(after.input), list(after.output))
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in after.initializer}
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in before.initializer}
    made_by = {output: node for node in after.node for output in node.output}
    products = [
        node
        for node in after.node
        if node.op_type in ("MatMul", "Gemm")
        and all(x in made_by and made_by[x].op_type == "DequantizeLinear" for x in node.input[:2])
    ]
    readers = [node for node in after.node for x in node.input if x in made_by]
    rounded = [
        n for n in readers if any(made_by[x].op_type == "DequantizeLinear" for x in n.input if x in made_by)
    ]
    assert {id(node) for node in rounded} == {id(node) for node in products}
    dense = {n for n in weights if n.startswith(("base.", "merged.")) and n.endswith(".T") and "blocks" in n}
    assert len(products) >= len(dense) >= 4
    for product in products:
        steps, scale = (arrays[x] for x in made_by[product.input[1]].input[:2])
        (axis,) = made_by[product.input[1]].attribute  # ONNX Runtime's fused products do not look at it
        assert (axis.name, axis.i) == ("axis", 1)
        assert steps.dtype == np.int8
        assert np.abs(steps.astype(int)).max() == 127
        assert scale.shape == (steps.shape[1],)
        assert (scale > 0).all()
        rounding = made_by[made_by[product.input[0]].input[0]]
        step, zero = (arrays[x] for x in rounding.input[1:])
        assert (step.shape, zero.dtype, int(zero)) == ((), np.int8, 0)
        source = str(made_by[product.input[1]].input[0]).removesuffix(".int8")
        if source in weights:
            assert np.abs(steps * scale - weights[source]).max() <= 0.5001 * scale.max()
    assert not {name for name in dense if name in arrays}  # the fp32 weights are gone


def test_scales_reach_as_far_as_the_images_do(exported: Path, tmp_path: Path) -> None:
    bundle = exported / "bundle"
    images = sample_images(read_artifact(exported / "merged.safetensors"), 20)
    few, many = (find_peaks(bundle, part, QUIET) for part in (images[:4], images))
    for name in PASSES:
        assert few[name].keys() == many[name].keys()
        assert all(0 < few[name][value] <= many[name][value] for value in few[name])
    path = write_quantised(bundle / f"{FIRST_PASS}.onnx", tmp_path, many[FIRST_PASS])
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
    for value, peak in many[FIRST_PASS].items():
        assert arrays[f"{value}.scale"] == pytest.approx(peak / 127)


def test_the_graphs_of_int8_engines_decide_as_the_eager_model(exported: Path, quantised: Path) -> None:
    artifact = read_artifact(exported / "merged.safetensors")
    images = sample_images(artifact, 32)
    with Classifier(quantised, "cpu") as classifier:
        parity = compare(MassModel(artifact).forward(torch.from_numpy(images)), classifier.forward(images))
    assert 0 < parity.logits_max_abs < 0.05 * parity.largest_logit
    assert 0 < parity.residuals_max_rel < 0.03
    assert min(parity.equal_sets, parity.equal_tasks, parity.equal_classes) >= 0.75


def test_the_key_names_precision_and_images_and_other_images_build_again(
    bundle: Path, photos: Path, fake_builds: list[onnx.ModelProto]
) -> None:
    import dataclasses

    def built(settings: EngineSettings) -> tuple[str, str]:
        engines = build_engines(bundle, settings, progress=QUIET)
        assert {engine.spec.key.precision for engine in engines} == {"int8"}
        ((option,),) = {engine.spec.key.options for engine in engines}
        return engines[0].note, option.rpartition(":")[0]

    with pytest.warns(UserWarning, match="scales are set on random images"):
        assert built(INT8) == ("built", "calibration=random images:16")
    assert built(INT8) == ("up to date", "calibration=random images:16")
    assert len(fake_builds) == 2
    assert all(any(node.op_type == "QuantizeLinear" for node in model.graph.node) for model in fake_builds)
    given = dataclasses.replace(INT8, calibration_images=photos)
    assert built(given) == ("rebuilt, because of another options", "calibration=photos:3")
    assert built(given)[0] == "up to date"
    (photos / "2.png").unlink()
    assert built(given) == ("rebuilt, because of another options", "calibration=photos:2")
    manifest = read_manifest(bundle)
    assert manifest.precision == "fp32"  # of the graphs
    check_files(bundle, manifest.files)
    assert {engine.key.precision for engine in manifest.engines} == {"int8"}


def test_the_command_line_takes_images_and_refuses_what_does_not_fit(
    bundle: Path, exported: Path, photos: Path, fake_builds: list[onnx.ModelProto]
) -> None:
    run = CliRunner().invoke
    arguments = [
        "build-engines",
        str(bundle),
        "--flavour",
        "tensorrt_rtx",
        "--calibration-images",
        str(photos),
    ]
    result = run(main, [*arguments, "--precision", "int8"])
    assert result.exit_code == 0, result.output
    assert "int8, Ampere and later" in result.output
    result = run(main, [*arguments, "--precision", "fp16"])
    assert "calibration_images: goes with precision int8, got fp16" in result.output
    result = run(main, [*arguments, "--precision", "int8", "--weight-stripped"])
    assert "weight_stripped: the weights of int8 engines" in result.output
    export = [
        "export",
        "--artifact",
        str(exported / "merged.safetensors"),
        "--out",
        str(bundle),
        "--no-verify",
    ]
    export += ["--backend", "tensorrt", "--precision", "int8"]
    assert "precise_router: goes with" in run(main, [*export, "--precise-router"]).output
    before = len(fake_builds)
    result = run(main, [*export, "--flavour", "tensorrt_rtx", "--calibration-images", str(photos)])
    assert result.exit_code == 0, result.output
    manifest = read_manifest(bundle)
    assert (manifest.precision, len(fake_builds) - before) == ("fp32", 2)
    assert {engine.key.precision for engine in manifest.engines} == {"int8"}


def test_a_place_without_images_is_an_error(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        calibration_images(read_manifest(bundle), tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images in this folder"):
        calibration_images(read_manifest(bundle), tmp_path / "empty")


def test_stripped_int8_engines_are_refused(bundle: Path) -> None:
    with pytest.raises(EngineError, match="stand in no ONNX file of the bundle"):
        build_engines(bundle, EngineSettings(None, "int8", weight_stripped=True), progress=QUIET)


@pytest.mark.slow
def test_tensorrt_rtx_parses_and_builds_both_passes(bundle: Path, photos: Path) -> None:
    import dataclasses

    rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    from runtime.engine_network import check_network, layer_precisions, parse_network
    from runtime.engine_settings import find_tensorrt
    from runtime.tensorrt_log import make_logger

    manifest = read_manifest(bundle)
    images = calibration_images(manifest, photos)
    peaks = find_peaks(bundle, images.pixel_values, QUIET)
    for name, spec in manifest.passes.items():
        path = write_quantised(bundle / spec.file, photos.parent / name, peaks[name])
        log = make_logger(rtx)
        builder = rtx.Builder(log)
        network, _parser = parse_network(path, builder, find_tensorrt("tensorrt_rtx"), log)
        check_network(network, spec, path)
        layers = layer_precisions(network)
        assert layers["QUANTIZE"] == {"int8": len(peaks[name])}
        assert layers["DEQUANTIZE"]["float32"] >= 2 * len(peaks[name])
    settings = dataclasses.replace(INT8, batch=(1, 1, 1), calibration_images=photos)
    assert [engine.note for engine in build_engines(bundle, settings, progress=QUIET)] == ["built", "built"]
    check_files(bundle, read_manifest(bundle).files)
