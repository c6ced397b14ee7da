"""One run on a machine with a GPU that says PASS or FAIL: engines are built, run, compared with the CPU, and timed.

The CPU's answers are those of ONNX Runtime on the fp32 graphs, which the export compares with the eager model. A
backend is compared on everything that a classifier does: routing and both passes for several batch sizes, tasks that
are given, calls from two threads at once, CUDA graphs that are replayed.
"""

from __future__ import annotations

import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.engine_bundle import build_engines
from mass_export.image_input import nearest_bytes
from mass_export.progress import Progress
from mass_export.tables import Table, percent
from mass_export.verify import Parity, combine, compare, enlarged
from runtime.classifier import Classifier, ForwardResult
from runtime.engine_settings import EngineSettings
from runtime.engine_spec import Precision
from runtime.errors import BackendError
from runtime.manifest import read_manifest
from runtime.provider import Provider

FP32_LOGITS = 1e-4  # of the largest logit
FP32_RESIDUALS = 1e-3
FP32_DECISIONS = 0.99  # another order of sums may turn a decision that stands on the edge
REPEATS = 3  # run plainly, recorded, replayed

Open = Callable[[Path, Provider, bool], Classifier]


@dataclass(frozen=True)
class Settings:
    """What is checked.

    Attributes:
        precisions: of the TensorRT engines, each built and compared.
        batches: sizes to compare and to time.
        rounds: timed calls of each size.
        seed: of the images.
    """

    precisions: tuple[Precision, ...] = ("fp32", "fp16")
    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 50
    seed: int = 0


@dataclass(frozen=True)
class Timing:
    """Calls of one batch size, both passes with the images on the host before and the logits there after."""

    batch: int
    latency_ms: float
    p90_ms: float
    images_per_s: float


@dataclass(frozen=True)
class BackendCheck:
    """What one backend did.

    Attributes:
        backend: `tensorrt` with its precision, `cuda` or `cpu`.
        fault: why it did not run, or what differs; None if nothing does.
        ran: whether it ran at all.
        parity: against the CPU; None for the CPU itself, or if it did not run.
        timings: by batch size.
    """

    backend: str
    ran: bool
    fault: str | None
    parity: Parity | None = None
    timings: tuple[Timing, ...] = ()


@dataclass(frozen=True)
class GpuCheck:
    """All backends; `passed` if TensorRT ran in every precision and nothing that ran differs."""

    backends: tuple[BackendCheck, ...]

    @property
    def passed(self) -> bool:
        """PASS or FAIL."""
        tensorrt = [check for check in self.backends if check.backend.startswith("tensorrt")]
        wrong = [check for check in self.backends if check.ran and check.fault]
        return bool(tensorrt) and all(check.ran for check in tensorrt) and not wrong

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"passed": self.passed, "backends": [asdict(check) for check in self.backends]}


def open_classifier(bundle: Path, provider: Provider, cuda_graphs: bool) -> Classifier:  # noqa: FBT001
    """As `check_gpu` opens bundles."""
    return Classifier(bundle, provider, batch_size=1024, cuda_graphs=cuda_graphs, build_engines=False)


def check_gpu(
    bundle: Path, scratch: Path, settings: Settings, *, progress: Progress, opened: Open = open_classifier
) -> GpuCheck:
    """Build, run, compare and time.

    Args:
        bundle: an fp32 bundle; it is not changed.
        scratch: takes a copy of the bundle for each precision.
        settings: what is checked.
        progress: where to show it.
        opened: opens a bundle; for tests.
    """
    images = random_images(bundle, max(settings.batches), settings.seed)
    reference = opened(bundle, "cpu", False)  # noqa: FBT003
    expected = list(answers(reference, images, settings))
    checks = []
    backends: list[tuple[str, Provider, Precision]] = [
        *((f"tensorrt {precision}", "tensorrt", precision) for precision in settings.precisions),
        ("cuda", "cuda", "fp32"),
    ]
    for name, provider, precision in progress.track(backends, "Checking"):
        try:
            directory = bundle
            if provider == "tensorrt":
                directory = _with_engines(bundle, scratch / precision, precision, settings, progress)
            classifier = opened(directory, provider, True)  # noqa: FBT003
        except BackendError as error:
            checks.append(BackendCheck(name, ran=False, fault=str(error)))
            continue
        with classifier:
            checks.append(_checked(name, classifier, precision, expected, images, settings))
    checks.append(
        BackendCheck("cpu", ran=True, fault=None, timings=time_batches(reference, images, settings))
    )
    reference.close()
    return GpuCheck(tuple(checks))


def _checked(
    name: str,
    classifier: Classifier,
    precision: Precision,
    expected: Sequence[ForwardResult],
    images: NDArray[np.float32],
    settings: Settings,
) -> BackendCheck:
    try:
        found = answers(classifier, images, settings)
        parity = combine([compare(*pair) for pair in zip(expected, found, strict=True)])
        timings = time_batches(classifier, images, settings)
    except BackendError as error:
        return BackendCheck(name, ran=True, fault=str(error))
    return BackendCheck(name, ran=True, fault=fault_of(parity, precision), parity=parity, timings=timings)


def random_images(bundle: Path, count: int, seed: int) -> NDArray[Any]:
    """Noise of several scales, roughly normalised, or as bytes if the bundle takes them. [count, ..]"""
    spec = read_manifest(bundle).preprocess
    H, W = spec.image_size
    rng = np.random.default_rng(seed)
    images = np.empty((count, 3, H, W), np.float32)
    for index in range(count):
        cells = 2 ** (1 + index % 5)
        images[index] = enlarged(rng.normal(size=(3, cells, cells)).astype(np.float32), H, W)
    return images if spec.dtype == "float32" else nearest_bytes(images, spec)


def answers(
    classifier: Classifier, images: NDArray[np.float32], settings: Settings
) -> Iterator[ForwardResult]:
    """Results in a fixed order: batch sizes, tasks that are given, a batch that comes again, two threads."""
    for batch in (*settings.batches, min(7, len(images))):
        yield classifier.forward(images[:batch])
    for tasks in _allowed(classifier.tasks):
        yield classifier.forward(images[: settings.batches[-1]], tasks=tasks)
    for _ in range(REPEATS):
        yield classifier.forward(images[:2])
    with ThreadPoolExecutor(2) as pool:
        yield from pool.map(classifier.forward, [images, images[::-1]] * REPEATS)


def fault_of(parity: Parity, precision: Precision) -> str | None:
    """What is out of tolerance."""
    if precision != "fp32":
        fine = parity.within_tolerance(precision)
    else:
        decisions = min(parity.equal_sets, parity.equal_tasks, parity.equal_classes)
        fine = (
            parity.logits_max_abs <= FP32_LOGITS * parity.largest_logit
            and parity.residuals_max_rel <= FP32_RESIDUALS
            and decisions >= FP32_DECISIONS
        )
    if fine:
        return None
    return (
        f"differs from the CPU: logits by {parity.logits_max_abs:.2e} (the largest is {parity.largest_logit:.3g}), "
        f"residuals by {parity.residuals_max_rel:.2e} relative, equal sets {parity.equal_sets:.1%}, tasks "
        f"{parity.equal_tasks:.1%}, classes {parity.equal_classes:.1%}"
    )


def time_batches(
    classifier: Classifier, images: NDArray[np.float32], settings: Settings
) -> tuple[Timing, ...]:
    """Median and 90th percentile of a call, for each batch size."""
    timings = []
    for batch in settings.batches:
        part = images[:batch]
        for _ in range(REPEATS):
            classifier.forward(part)
        taken_ms = []
        for _ in range(settings.rounds):
            start = time.perf_counter()
            classifier.forward(part)
            taken_ms.append(1e3 * (time.perf_counter() - start))
        median = statistics.median(taken_ms)
        p90 = float(np.quantile(taken_ms, 0.9))
        timings.append(Timing(batch, median, p90, 1e3 * batch / median))
    return tuple(timings)


def tables(check: GpuCheck) -> tuple[Table, Table]:
    """What was compared, and what took how long."""
    compared = []
    for backend in check.backends:
        parity = backend.parity
        if parity is None:
            continue
        compared.append(
            (
                backend.backend,
                str(parity.images),
                f"{parity.residuals_max_rel:.1e}",
                f"{parity.logits_max_abs:.1e}",
                *(percent(share) for share in (parity.equal_sets, parity.equal_tasks, parity.equal_classes)),
            )
        )
    timed = [
        (backend.backend, str(t.batch), f"{t.latency_ms:.2f}", f"{t.p90_ms:.2f}", f"{t.images_per_s:.0f}")
        for backend in check.backends
        for t in backend.timings
    ]
    return (
        Table(
            "Against ONNX Runtime on the CPU",
            ("backend", "images", "residuals, rel.", "logits, abs.", "equal sets", "tasks", "classes"),
            tuple(compared),
        ),
        Table(
            "Both passes, from host to host",
            ("backend", "batch", "median ms", "p90 ms", "images/s"),
            tuple(timed),
        ),
    )


def _allowed(tasks: Sequence[str]) -> list[list[str]]:
    """One task, the last one, two of them."""
    return [[tasks[0]], [tasks[-1]], [tasks[0], tasks[-1]][: len(tasks)]]


def _with_engines(
    bundle: Path, copy: Path, precision: Precision, settings: Settings, progress: Progress
) -> Path:
    shutil.copytree(bundle, copy)
    largest = max(settings.batches)
    build_engines(
        copy, EngineSettings(precision=precision, batch=(1, min(8, largest), largest)), progress=progress
    )
    return copy
