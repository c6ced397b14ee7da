"""Networks that TensorRT-RTX parses: what the manifest says, and only the types of the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mass_export.artifact import write_artifact
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.precision import write_converted
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.engine_network import check_network, layer_precisions, parse_network
from runtime.engine_settings import find_tensorrt
from runtime.engine_spec import Precision
from runtime.errors import EngineError
from runtime.manifest import read_manifest
from runtime.tensorrt_log import make_logger

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

QUIET = Progress(quiet=True)
HALF = {"fp16": "float16", "bf16": "bfloat16"}


def parsed(onnx_file: Path) -> tuple[Any, ...]:
    tensorrt = find_tensorrt("tensorrt_rtx")
    log = make_logger(rtx)
    builder = rtx.Builder(log)
    return (*parse_network(onnx_file, builder, tensorrt, log), builder, log)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", [FIRST_PASS, SECOND_PASS])
def test_the_parsed_network_has_the_manifests_tensors_and_only_the_graphs_types(
    exported: Path, tmp_path: Path, name: str, precision: Precision
) -> None:
    spec = read_manifest(exported / "bundle").passes[name]
    onnx_file = exported / "bundle" / spec.file
    if precision != "fp32":
        onnx_file = write_converted(onnx_file, tmp_path, precision)
    network, *_keep = parsed(onnx_file)
    assert network.get_flag(rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    check_network(network, spec, onnx_file)
    dims = [list(network.get_input(i).shape) for i in range(network.num_inputs)]
    assert dims[0] == [-1, 3, 16, 16]
    layers = layer_precisions(network)
    floats = {dtype for counts in layers.values() for dtype in counts if "float" in dtype}
    if precision == "fp32":
        assert floats == {"float32"}
        return
    half = HALF[precision]
    assert floats == {"float32", half}
    products = layers["MATRIX_MULTIPLY"]
    assert products[half] > 9 * products.get("float32", 0) or name == FIRST_PASS
    assert products[half] >= 10
    assert set(layers["NORMALIZATION"]) | set(layers["SOFTMAX"]) | set(layers["REDUCE"]) == {"float32"}


@pytest.mark.parametrize(
    "keys",
    [
        {"router": {"layer": 0, "site": "attn", "token": "mean", "norm": "l1"}},
        {"router": {"layers": [0, 2], "site": "both", "standardize": "tasks", "evidence": 0.5}},
        {"router": {"norm": "mahalanobis", "mode": "weighted"}, "base_merge": "zeroshot"},
        {"router": "default"},
        {"compose": "sum", "sum_weights": "gates", "vectors": "base"},
        {"compose": "sum", "head_choice": "mean"},
    ],
    ids=str,
)
def test_the_parser_takes_every_kind_of_router_and_merge_in_half_precision(
    pico_files: Callable[..., Path], tmp_path: Path, keys: dict[str, Any]
) -> None:
    artifact = merge(load_recipe(pico_files(tasks=3, **keys)), QUIET)
    write_artifact(tmp_path / "merged.safetensors", artifact)
    bundle = export_bundle(
        artifact, tmp_path / "merged.safetensors", tmp_path / "bundle", verify=False, progress=QUIET
    )
    for name, spec in read_manifest(bundle).passes.items():
        onnx_file = write_converted(bundle / spec.file, tmp_path / name, "fp16")
        network, *_keep = parsed(onnx_file)
        check_network(network, spec, onnx_file)
        products = layer_precisions(network)["MATRIX_MULTIPLY"]
        assert products["float16"] >= 1


def test_another_graph_than_the_manifest_describes_is_refused(exported: Path) -> None:
    passes = read_manifest(exported / "bundle").passes
    onnx_file = exported / "bundle" / passes[FIRST_PASS].file
    network, *_keep = parsed(onnx_file)
    with pytest.raises(EngineError, match=r"input cores\.proj is only in one of them"):
        check_network(network, passes[SECOND_PASS], onnx_file)


def test_a_graph_with_an_unknown_operator_names_it(exported: Path, tmp_path: Path) -> None:
    import onnx

    model = onnx.load(exported / "bundle" / "first_pass.onnx")
    model.graph.node[3].op_type = "Mystery"
    onnx.save(model, tmp_path / "first_pass.onnx")
    with pytest.raises(EngineError, match=r"first_pass\.onnx: tensorrt_rtx cannot read the graph: .*Mystery"):
        parsed(tmp_path / "first_pass.onnx")
