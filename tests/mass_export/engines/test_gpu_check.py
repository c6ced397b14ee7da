"""The check that a user runs on a GPU: its logic, with CPU sessions in place of the GPU's; engines are made up."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mass_export import gpu_check
from mass_export.gpu_check import GpuCheck, Settings, check_gpu, fault_of, tables
from mass_export.progress import Progress
from mass_export.verify import Parity
from runtime.classifier import Classifier
from runtime.errors import BackendError, EngineError
from runtime.manifest import read_manifest

QUIET = Progress(quiet=True)
QUICK = Settings(precisions=("fp32", "fp16"), batches=(1, 4), rounds=2)
SAME = Parity(10, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, largest_logit=10.0)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """Takes (copy of the bundle, precision) instead of building."""
    builds: list[tuple[Path, str]] = []

    def build(copy: Path, settings: Any, **_kwargs: Any) -> None:
        assert settings.batch == (1, 4, 4)
        builds.append((copy, settings.precision))

    monkeypatch.setattr(gpu_check, "build_engines", build)
    return builds


def on_the_cpu(
    refuse: tuple[str, ...] = (), damage: Callable[[Classifier], None] | None = None
) -> gpu_check.Open:
    """Opens every bundle on the CPU; `refuse` are providers that do not start, `damage` changes the GPU's."""

    def opened(bundle: Path, provider: str, cuda_graphs: bool) -> Classifier:  # noqa: FBT001
        assert cuda_graphs == (provider != "cpu")
        if provider in refuse:
            raise BackendError(f"no {provider} here")
        classifier = Classifier(bundle, "cpu", num_threads=1)
        if provider == "tensorrt" and damage is not None:
            damage(classifier)
        return classifier

    return opened


def named(check: GpuCheck) -> dict[str, gpu_check.BackendCheck]:
    return {backend.backend: backend for backend in check.backends}


def test_equal_backends_pass_with_figures_for_all_of_them(
    exported: Path, tmp_path: Path, built: list[tuple[Path, str]]
) -> None:
    bundle = exported / "bundle"
    before = {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()}
    check = check_gpu(bundle, tmp_path, QUICK, progress=QUIET, opened=on_the_cpu())
    assert check.passed
    assert [precision for _, precision in built] == ["fp32", "fp16"]
    assert all(copy != bundle and read_manifest(copy) == read_manifest(bundle) for copy, _ in built)
    assert {path.name: path.stat().st_mtime_ns for path in bundle.iterdir()} == before
    assert list(named(check)) == ["tensorrt fp32", "tensorrt fp16", "cuda", "cpu"]
    for name, backend in named(check).items():
        assert [timing.batch for timing in backend.timings] == [1, 4]
        assert all(t.images_per_s == pytest.approx(1e3 * t.batch / t.latency_ms) for t in backend.timings)
        if name != "cpu":
            assert backend.parity is not None
            assert backend.parity.images > 4 * 6
    compared, timed = tables(check)
    assert len(compared.rows) == 3
    assert len(timed.rows) == 8
    assert json.loads(json.dumps(check.to_dict()))["passed"] is True


def test_cuda_may_be_missing_but_tensorrt_may_not(
    exported: Path, tmp_path: Path, built: list[tuple[Path, str]]
) -> None:
    settings = dataclasses.replace(QUICK, precisions=("fp32",))
    for refused, passed in (("cuda", True), ("tensorrt", False)):
        opened = on_the_cpu(refuse=(refused,))
        check = check_gpu(exported / "bundle", tmp_path / refused, settings, progress=QUIET, opened=opened)
        assert check.passed is passed
        (backend,) = [b for b in check.backends if not b.ran]
        assert backend.fault == f"no {refused} here"
    assert len(built) == 2


def test_an_engine_that_cannot_be_built_fails_and_the_rest_is_still_checked(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(_copy: Path, settings: Any, **_kwargs: Any) -> None:
        if settings.precision == "fp16":
            raise EngineError("no fp16 on this GPU")

    monkeypatch.setattr(gpu_check, "build_engines", build)
    check = check_gpu(exported / "bundle", tmp_path, QUICK, progress=QUIET, opened=on_the_cpu())
    assert not check.passed
    found = named(check)
    assert found["tensorrt fp16"].fault == "no fp16 on this GPU"
    assert found["tensorrt fp32"].fault is None
    assert found["cuda"].ran


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("which", ["first", "second", "lost"])
def test_wrong_numbers_in_either_pass_and_failing_runs_are_failures(
    exported: Path, tmp_path: Path, which: str
) -> None:
    def damage(classifier: Classifier) -> None:
        session = classifier._second if which == "second" else classifier._first
        run = session.run

        def wrong(feeds: Any) -> Any:
            if which == "lost":
                raise BackendError("the kernel was lost")
            return {name: value * np.float32(1.01) for name, value in run(feeds).items()}

        session.run = wrong  # type: ignore[method-assign]
        if which == "second":
            classifier._one_task = None

    check = check_gpu(exported / "bundle", tmp_path, QUICK, progress=QUIET, opened=on_the_cpu(damage=damage))
    assert not check.passed
    backend = named(check)["tensorrt fp32"]
    assert backend.ran
    assert backend.fault is not None
    assert ("the kernel was lost" if which == "lost" else "differs from the CPU") in backend.fault
    assert named(check)["cuda"].fault is None


@pytest.mark.parametrize(
    ("changes", "precision", "fine"),
    [
        ({}, "fp32", True),
        ({"logits_max_abs": 2e-3}, "fp32", False),
        ({"residuals_max_rel": 2e-3}, "fp32", False),
        ({"equal_sets": 0.98}, "fp32", False),
        ({"logits_max_abs": 0.1}, "fp16", True),
        ({"logits_max_abs": 0.3}, "fp16", False),
        ({"equal_classes": 0.8}, "bf16", False),
    ],
)
def test_tolerances_are_those_of_the_precision(changes: dict[str, float], precision: Any, fine: bool) -> None:  # noqa: FBT001
    assert (fault_of(dataclasses.replace(SAME, **changes), precision) is None) is fine


def test_nothing_of_tensorrt_is_no_pass() -> None:
    assert not GpuCheck(()).passed


def test_the_script_says_fail_where_there_is_no_gpu(exported: Path, tmp_path: Path, built: list[Any]) -> None:
    from click.testing import CliRunner

    path = Path(__file__).parents[3] / "scripts/gpu_check.py"
    import importlib.util

    spec = importlib.util.spec_from_file_location("gpu_check_script", path)
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    bundle = shutil.copytree(exported / "bundle", tmp_path / "bundle")
    arguments = ["--bundle", str(bundle), "--batch", "1", "--batch", "4", "--rounds", "1"]
    result = CliRunner().invoke(script.main, [*arguments, "--json", str(tmp_path / "check.json")])
    assert result.exit_code == 1, result.output
    assert result.output.splitlines()[-1] == "FAIL"
    assert "tensorrt fp32: did not run: " in result.output
    data = json.loads((tmp_path / "check.json").read_text())
    assert data["passed"] is False
    assert [backend["ran"] for backend in data["backends"]] == [False, False, False, True]
    assert len(built) == 2
