"""Engines, built for real with TensorRT-RTX, which needs no GPU; and what guards the bundle around them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mass_export import engine_bundle
from mass_export.artifact import write_artifact
from mass_export.cli import main
from mass_export.engine_bundle import build_engines
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.precision import write_converted
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from runtime.bundle import FIRST_PASS, SECOND_PASS, check_files, read_manifest
from runtime.cuda_device import compute_capability
from runtime.engine_build import build_engine
from runtime.engine_cache import cached_engines
from runtime.engine_monitor import make_monitor, run_cancellably
from runtime.engine_network import check_network, layer_precisions, parse_network
from runtime.engine_settings import EngineSettings, default_slots, find_tensorrt
from runtime.engine_spec import Precision, profile_for, shape_with
from runtime.errors import BackendError, EngineError
from runtime.tensorrt_log import make_logger

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

QUIET = Progress(quiet=True)
HALF = {"fp16": "float16", "bf16": "bfloat16"}
SMALL = EngineSettings("tensorrt_rtx", batch=(1, 2, 4), slots=(1, 1, 2))


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def fake_builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Engines are made-up bytes; the list takes the graphs that were built."""
    built: list[Path] = []

    def build(onnx_file: Path, *_args: Any, **_kwargs: Any) -> bytes:
        built.append(onnx_file)
        return f"engine {len(built)}".encode()

    monkeypatch.setattr(engine_bundle, "build_engine", build)
    return built


# The network


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


# Builds


def first_pass_engine(bundle: Path, settings: EngineSettings, show: Any = lambda *_: None) -> bytes:
    manifest = read_manifest(bundle)
    spec = manifest.passes[FIRST_PASS]
    return build_engine(
        bundle / spec.file,
        spec,
        settings.profiles(FIRST_PASS, manifest),
        tensorrt=find_tensorrt("tensorrt_rtx"),
        settings=settings,
        show=show,
    )


def test_builds_take_every_option_that_the_flavour_has(exported: Path) -> None:
    bundle = exported / "bundle"
    settings = EngineSettings(
        batch=(1, 2, 4), compute_capability=("8.6",), workspace_mib=64, optimization_level=1, tf32=True
    )
    assert len(first_pass_engine(bundle, settings)) > 10_000


def test_stripping_weights_without_a_gpu_is_refused_with_the_reason(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpu() -> str:
        raise BackendError("no CUDA-capable device is detected")

    monkeypatch.setattr("runtime.engine_build.compute_capability", no_gpu)
    with pytest.raises(EngineError, match=r"weight_stripped: tensorrt_rtx needs a GPU .*no CUDA-cap"):
        first_pass_engine(exported / "bundle", EngineSettings(weight_stripped=True))


@pytest.mark.gpu
def test_an_engine_without_its_weights_is_smaller(exported: Path) -> None:
    try:
        compute_capability()
    except BackendError as error:
        pytest.skip(f"stripping weights runs kernels: {error}")
    full, stripped = (
        first_pass_engine(exported / "bundle", EngineSettings(batch=(1, 2, 4), weight_stripped=stripped))
        for stripped in (False, True)
    )
    assert len(stripped) < len(full)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"compute_capability": ("9.9",)}, r"'9\.9' is none of 7\.5, 8\.0"),
        ({"hardware_compatible": True}, "always are"),
    ],
)
def test_options_that_the_flavour_lacks_are_errors(
    exported: Path, settings: dict[str, Any], match: str
) -> None:
    with pytest.raises(EngineError, match=match):
        first_pass_engine(exported / "bundle", EngineSettings(**settings))


def test_a_build_reports_its_steps(exported: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    first_pass_engine(exported / "bundle", SMALL, lambda *step: seen.append(step))
    assert len({phase for phase, _, _ in seen}) > 3
    assert all(0 <= step <= steps for _, step, steps in seen)


def test_ctrl_c_stops_a_build_at_its_next_step() -> None:
    monitor = make_monitor(rtx, lambda *_: None)
    steps = []

    def build() -> None:
        monitor.phase_start("phase", None, 1000)
        while monitor.step_complete("phase", len(steps)):
            steps.append(1)
            if len(steps) == 3:
                signal.raise_signal(
                    signal.SIGINT
                ) if threading.current_thread() is threading.main_thread() else (
                    os.kill(os.getpid(), signal.SIGINT)
                )
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run_cancellably(build, monitor)
    assert 3 <= len(steps) < 1000


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_both_passes_build_and_are_listed(bundle: Path, precision: Precision) -> None:
    import dataclasses

    before = content(bundle)
    built = build_engines(bundle, dataclasses.replace(SMALL, precision=precision), progress=QUIET)
    assert [engine.note for engine in built] == ["built", "built"]
    manifest = read_manifest(bundle)
    check_files(bundle, manifest.files)
    assert [engine.pass_name for engine in manifest.engines] == [FIRST_PASS, SECOND_PASS]
    assert {engine.key.precision for engine in manifest.engines} == {precision}
    assert {name: data for name, data in content(bundle).items() if name in before} | {
        "manifest.json": before["manifest.json"]
    } == before
    assert len(list(bundle.parent.iterdir())) == 1  # nothing is left beside it


@pytest.mark.slow
def test_engines_of_the_cache_are_built_for_the_gpu_at_hand_and_found_again(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASS_CACHE", str(tmp_path / "cache"))
    bundle, before = exported / "bundle", content(exported / "bundle")
    manifest = read_manifest(bundle)
    built = cached_engines(bundle, manifest, "8.6", 4)
    assert [engine.pass_name for engine in built] == [FIRST_PASS, SECOND_PASS]
    assert all(Path(engine.file).parent == tmp_path / "cache/engines" for engine in built)
    assert {engine.key.compute_capability for engine in built} == {("8.6",)}
    monkeypatch.setattr("runtime.engine_cache.build_engine", None)
    assert cached_engines(bundle, manifest, "8.6", 4) == built
    assert content(bundle) == before


# Keys, staleness, atomicity


def test_equal_keys_are_up_to_date_and_any_difference_is_rebuilt_with_the_reason(
    bundle: Path, fake_builds: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import dataclasses

    def notes(settings: EngineSettings) -> set[str]:
        return {engine.note for engine in build_engines(bundle, settings, progress=QUIET)}

    assert notes(SMALL) == {"built"}
    assert notes(SMALL) == {"up to date"}
    assert len(fake_builds) == 2
    assert notes(dataclasses.replace(SMALL, precision="fp16")) == {"rebuilt, because of another precision"}
    assert notes(dataclasses.replace(SMALL, batch=(1, 1, 1))) == {
        "rebuilt, because of another precision, profiles"
    }
    monkeypatch.setattr(rtx, "__version__", "9.0")
    assert notes(dataclasses.replace(SMALL, batch=(1, 1, 1))) == {"rebuilt, because of another version"}
    assert notes(dataclasses.replace(SMALL, compute_capability=("8.6",))) == {
        "built"
    }  # beside the portable ones
    manifest = read_manifest(bundle)
    assert len(manifest.engines) == 4
    check_files(bundle, manifest.files)
    assert len(list(bundle.glob("*.engine"))) == 4  # stale files are gone


def test_a_damaged_or_missing_engine_is_built_again(bundle: Path, fake_builds: list[Path]) -> None:
    first, second = (engine.spec.file for engine in build_engines(bundle, SMALL, progress=QUIET))
    (bundle / first).write_bytes(b"?")
    (bundle / second).unlink()
    built = build_engines(bundle, SMALL, progress=QUIET)
    assert {engine.note for engine in built} == {"rebuilt, because the file was missing or damaged"}
    check_files(bundle, read_manifest(bundle).files)
    assert len(fake_builds) == 4


def test_a_failure_in_the_second_pass_leaves_the_bundle_as_it_was(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = content(bundle)

    def build(onnx_file: Path, *_args: Any, **_kwargs: Any) -> bytes:
        if onnx_file.stem == SECOND_PASS:
            raise KeyboardInterrupt
        return b"engine"

    monkeypatch.setattr(engine_bundle, "build_engine", build)
    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, SMALL, progress=QUIET)
    assert content(bundle) == before
    assert len(list(bundle.parent.iterdir())) == 1


def test_killed_half_way_the_bundle_is_as_it_was(bundle: Path) -> None:
    before = content(bundle)
    code = (
        "import sys; from mass_export import engine_bundle, cli\n"
        "def build(f, *a, **k):\n"
        "    print(f.stem, flush=True)\n"
        "    return b'engine' if f.stem == 'first_pass' else __import__('time').sleep(600)\n"
        "engine_bundle.build_engine = build\n"
        "cli.main(['build-engines', sys.argv[1], '--flavour', 'tensorrt_rtx'])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(bundle)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["first_pass", "second_pass"]
        process.kill()
    assert content(bundle) == before


def test_half_bundles_build_only_their_own_precision(
    bundle: Path, fake_builds: list[Path], tmp_path: Path
) -> None:
    from mass_export.bundle_precision import convert_bundle

    half = tmp_path / "half"
    half.mkdir()
    convert_bundle(bundle, read_manifest(bundle), half, "fp16")
    build_engines(half, SMALL, progress=QUIET)
    assert [path.parent for path in fake_builds] == [half, half]
    assert {engine.key.precision for engine in read_manifest(half).engines} == {"fp16"}
    with pytest.raises(EngineError, match="export it as fp32 to build bf16"):
        build_engines(half, EngineSettings("tensorrt_rtx", precision="bf16"), progress=QUIET)


def test_stripped_engines_need_the_graphs_in_their_precision(bundle: Path) -> None:
    settings = EngineSettings("tensorrt_rtx", precision="fp16", weight_stripped=True)
    with pytest.raises(EngineError, match="export the bundle with --precision fp16 first"):
        build_engines(bundle, settings, progress=QUIET)


# Settings


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"batch": (0, 1, 2)}, "batch: expected 1 <= min <= opt <= max, got 0, 1, 2"),
        ({"slots": (2, 1, 3)}, "slots: expected"),
        ({"workspace_mib": 0}, "workspace_mib"),
        ({"optimization_level": 6}, "optimization_level"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, Any], match: str) -> None:
    with pytest.raises(EngineError, match=match):
        EngineSettings(**values)


def test_profiles_cover_one_set_for_the_batch_and_one_for_each_sample(exported: Path) -> None:
    import dataclasses

    manifest = read_manifest(exported / "bundle")
    settings = EngineSettings(batch=(1, 8, 32))
    profiles = settings.profiles(SECOND_PASS, manifest)
    assert default_slots(manifest) == (1, 1, 3)
    assert profile_for(profiles, {"B": 32, "S": 1, "K": 3}) == 0
    assert profile_for(profiles, {"B": 32, "S": 32, "K": 1}) == 1
    assert profile_for(profiles, {"B": 33, "S": 1, "K": 1}) is None
    assert profile_for(profiles, {"B": 1, "S": 1, "K": 4}) is None
    assert settings.profiles(FIRST_PASS, manifest) == ({"B": (1, 8, 32)},)
    router = dataclasses.replace(manifest.router, mode="top1")
    assert default_slots(dataclasses.replace(manifest, router=router)) == (1, 1, 1)
    assert shape_with(("S", "K*8", 3), {"S": 2, "K": 3}) == (2, 24, 3)
    with pytest.raises(EngineError, match="at most 4 tasks"):
        EngineSettings(slots=(1, 2, 5)).profiles(SECOND_PASS, manifest)


def test_without_tensorrt_the_error_names_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(
        EngineError, match=r"pip install tensorrt`.*pip install tensorrt-rtx-cu12`.*without one"
    ):
        find_tensorrt(None)


# The command line


def test_the_command_line_builds_describes_and_refuses(bundle: Path, fake_builds: list[Path]) -> None:
    run = CliRunner().invoke
    arguments = ["build-engines", str(bundle), "--flavour", "tensorrt_rtx", "--batch", "1", "2", "4"]
    result = run(main, [*arguments, "--compute-capability", "8.6", "--precision", "fp16"])
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert [line.partition(":")[0] for line in lines] == [FIRST_PASS, SECOND_PASS]
    assert f"(tensorrt_rtx {rtx.__version__}, fp16, 8.6)" in lines[0]
    key = read_manifest(bundle).engines[0].key
    assert (key.compute_capability, key.profiles) == (("8.6",), ({"B": (1, 2, 4)},))
    assert len(fake_builds) == 2
    result = run(main, ["build-engines", str(bundle), "--batch", "3", "2", "1"])
    assert (result.exit_code, result.output.count("\n")) == (1, 1)
    result = run(main, ["export", "--artifact", "x", "--out", "y", "--tf32"])
    assert result.exit_code == 2
    assert "--tf32: only with --backend tensorrt" in result.output
