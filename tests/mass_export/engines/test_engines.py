"""Engines, built for real with TensorRT-RTX, which needs no GPU, and their settings."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.cuda_device import compute_capability
from runtime.engine_build import build_engine
from runtime.engine_monitor import make_monitor, run_cancellably
from runtime.engine_settings import EngineSettings, default_slots, find_tensorrt
from runtime.engine_spec import profile_for, shape_with
from runtime.errors import BackendError, EngineError
from runtime.manifest import read_manifest

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

SMALL = EngineSettings("tensorrt_rtx", batch=(1, 2, 4), slots=(1, 1, 2))


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


@pytest.fixture
def ctrl_c_raises() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background and it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_raises")
def test_ctrl_c_stops_a_build_at_its_next_step() -> None:
    monitor = make_monitor(rtx, lambda *_: None)
    steps = []

    def build() -> None:
        monitor.phase_start("phase", None, 1000)
        while monitor.step_complete("phase", len(steps)) and len(steps) < 1000:
            steps.append(1)
            if len(steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(KeyboardInterrupt):
        run_cancellably(build, monitor)
    assert 3 <= len(steps) < 1000


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
