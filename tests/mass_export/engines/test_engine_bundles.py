"""Engines of a bundle and of the cache: keys, staleness, and that nothing is left half done."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mass_export import engine_bundle
from mass_export.cli import main
from mass_export.engine_bundle import build_engines
from mass_export.progress import Progress
from runtime.backends import open_sessions
from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.checksums import check_files
from runtime.engine_cache import cached_engines
from runtime.engine_settings import EngineSettings
from runtime.engine_spec import Precision
from runtime.errors import BackendError, EngineError
from runtime.manifest import read_manifest

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

QUIET = Progress(quiet=True)
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


def test_int8_bundles_get_no_engines_and_do_not_run_on_a_gpu(bundle: Path, fake_builds: list[Path]) -> None:
    path = bundle / "manifest.json"
    path.write_text(path.read_text().replace('"precision": "fp32"', '"precision": "int8"'))
    with pytest.raises(EngineError, match="int8, for CPUs"):
        build_engines(bundle, SMALL, progress=QUIET)
    for provider in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match=f"'{provider}': int8 bundles are for CPUs"):
            open_sessions(bundle, read_manifest(bundle), provider, None)  # type: ignore[arg-type]
    assert not fake_builds


def test_stripped_engines_need_the_graphs_in_their_precision(bundle: Path) -> None:
    settings = EngineSettings("tensorrt_rtx", precision="fp16", weight_stripped=True)
    with pytest.raises(EngineError, match="export the bundle with --precision fp16 first"):
        build_engines(bundle, settings, progress=QUIET)


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
