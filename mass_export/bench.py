"""How long a bundle takes, as multiples of one plain CLIP pass.

Everything that is compared runs in one process and in turns, so that what else the machine does hits all alike; the
first rounds are not counted. Figures are medians with the 10th and 90th percentile. The plain pass is the base tower
with every head, written by the same exporter for the same runtime, all tokens through all blocks: what a CLIP without
any merging would cost. `plain_trimmed` runs its last block for the CLS token alone, as ours do.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from mass_export.bench_plain import write_plain_pass
from mass_export.bench_start import bench_start, random_images
from mass_export.errors import DataError
from mass_export.image_input import normalised
from mass_export.machine import describe_machine
from mass_export.progress import Progress
from mass_export.tables import Table
from runtime.classifier import Classifier
from runtime.machine import processors
from runtime.onnx_session import OnnxSession
from runtime.second_pass import TaskSet

PLAIN, TRIMMED = "plain", "plain_trimmed"
Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """One row.

    Attributes:
        what: the thing that ran.
        batch: images in one call.
        tasks: T of the bundle.
        precision: of the graphs.
        ms_median, ms_p10, ms_p90: of one call.
        ratio_to_plain_fp32: median of the ratios to the plain fp32 pass of the same round.
        count: calls that were timed.
        threads: within an operator.
    """

    what: str
    batch: int
    tasks: int
    precision: str
    ms_median: float
    ms_p10: float
    ms_p90: float
    ratio_to_plain_fp32: float
    count: int
    threads: int


@dataclass(frozen=True)
class BenchSettings:
    """What is timed.

    Attributes:
        batches: images in one call.
        rounds: timed calls of each thing.
        warmup: calls before.
        longest_s: a thing that has taken as much is not called again.
        threads: within an operator; None takes every processor.
        seed: of the images.
        starts: processes of each kind that are timed until they are ready.
        clock: `wall`, or `cpu` for the calling thread's processor time, which other programs on a busy machine
            disturb little; it needs `threads` 1, as what other threads do is not counted.
    """

    batches: tuple[int, ...] = (1, 8, 32)
    rounds: int = 15
    warmup: int = 2
    longest_s: float = 60.0
    threads: int | None = None
    seed: int = 0
    starts: int = 3
    clock: Literal["wall", "cpu"] = "wall"

    def __post_init__(self) -> None:
        """Refuse a clock that would miss most of the work."""
        if self.clock == "cpu" and self.threads != 1:
            raise DataError("clock: cpu counts one thread alone; ask for 1 thread.")


def bench_bundle(
    bundle: Path, artifact: Path | None, settings: BenchSettings, progress: Progress
) -> dict[str, Any]:
    """Time a bundle on the CPU.

    Args:
        bundle: what `mass export` wrote.
        artifact: what it was exported from; then the eager model and the reference's way are timed as well.
        settings: what is timed.
        progress: where to show it.

    Returns:
        `machine`, `start` (seconds and memory, see `bench_start`) and `rows`, see `Timing`.
    """
    threads = settings.threads or processors()
    with tempfile.TemporaryDirectory() as scratch:
        plain_file = write_plain_pass(bundle, Path(scratch))
        started = bench_start(bundle, plain_file, threads=threads, rounds=settings.starts, progress=progress)
        plain = OnnxSession(plain_file, "cpu", threads)
        trimmed = OnnxSession(write_plain_pass(bundle, Path(scratch), trimmed=True), "cpu", threads)
        with Classifier(bundle, "cpu", num_threads=threads, verify="size", mode="top1") as classifier:
            things = _eager_things(artifact, threads) if artifact is not None else {}
            rows: list[Timing] = []
            for batch in progress.track(settings.batches, "Timing"):
                images = random_images(classifier.manifest, batch, settings.seed)
                spec, pixel_values = classifier.manifest.preprocess, images
                if spec.dtype == "uint8":
                    pixel_values = normalised(images, spec)
                feeds = {"pixel_values": pixel_values}
                calls: dict[str, Call] = {
                    PLAIN: partial(plain.run, feeds),
                    TRIMMED: partial(trimmed.run, feeds),
                }
                calls |= bundle_calls(classifier, images)
                calls |= {name: partial(make, pixel_values) for name, make in things.items()}
                rows += _rows(calls, classifier, batch, threads, settings)
    return {"machine": describe_machine(), "start": started, "rows": [asdict(row) for row in rows]}


def bundle_calls(classifier: Classifier, images: NDArray[Any]) -> dict[str, Call]:
    """What a bundle can be asked for, by name. Sets are given, as a router would have chosen them."""
    T, B = len(classifier.tasks), len(images)
    mixed = [(row % T,) for row in range(B)]
    calls: dict[str, Call] = {
        "two_pass_top1_mixed": partial(two_passes, classifier, images, mixed),
        "two_pass_top1_one_task": partial(two_passes, classifier, images, [(0,)] * B),
        "known_task": partial(classifier.forward, images, tasks=[classifier.tasks[0]]),
    }
    for size in (2, 3):
        if size <= T:
            sets = [tuple(sorted((row + k) % T for k in range(size))) for row in range(B)]
            calls[f"two_pass_set{size}"] = partial(two_passes, classifier, images, sets)
    return calls


def two_passes(classifier: Classifier, images: NDArray[Any], sets: Sequence[TaskSet]) -> Any:
    """`forward` with the router's choice replaced: both passes run in full."""
    with _routed(classifier, sets):
        return classifier.forward(images)


@contextmanager
def _routed(classifier: Classifier, sets: Sequence[TaskSet]) -> Iterator[None]:
    """Replace what `forward` calls for the second pass, so that the sets are those given."""
    original = classifier._second_pass  # noqa: SLF001 - the seam that times need

    def replaced(pixel_values: Any, chosen: Sequence[TaskSet], gates: NDArray[np.float32]) -> Any:
        del chosen
        return original(pixel_values, sets, gates)

    setattr(classifier, "_second_pass", replaced)  # noqa: B010 - mypy takes no assignment to a method
    try:
        yield
    finally:
        setattr(classifier, "_second_pass", original)  # noqa: B010


def interleave(
    calls: dict[str, Call],
    rounds: int,
    warmup: int,
    longest_s: float = 60.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, NDArray[np.float64]]:
    """Milliseconds of every call, taking turns: `rounds` of each, fewer of what takes `longest_s` in all."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    spent_s = dict.fromkeys(calls, 0.0)
    for number in range(warmup + rounds):
        for name, call in calls.items():
            if spent_s[name] > longest_s and taken[name]:
                continue
            start = clock()
            call()
            elapsed_s = clock() - start
            spent_s[name] += elapsed_s
            if number >= warmup:
                taken[name].append(elapsed_s * 1e3)
    return {name: np.array(times) for name, times in taken.items()}


def _rows(
    calls: dict[str, Call], classifier: Classifier, batch: int, threads: int, settings: BenchSettings
) -> list[Timing]:
    clock = time.thread_time if settings.clock == "cpu" else time.perf_counter
    times = interleave(calls, settings.rounds, settings.warmup, settings.longest_s, clock)
    eager = ("eager", "reference_cached", "reference_uncached")
    return [
        Timing(
            what=name,
            batch=batch,
            tasks=len(classifier.tasks),
            precision="fp32" if name in (PLAIN, TRIMMED, *eager) else str(classifier.manifest.precision),
            ms_median=float(np.median(ms)),
            ms_p10=float(np.percentile(ms, 10)),
            ms_p90=float(np.percentile(ms, 90)),
            ratio_to_plain_fp32=float(np.median(ms / times[PLAIN][: len(ms)])),
            count=len(ms),
            threads=threads,
        )
        for name, ms in times.items()
    ]


def _eager_things(artifact: Path, threads: int) -> dict[str, Callable[[NDArray[np.float32]], Any]]:
    from mass_export.bench_reference import eager_things  # noqa: PLC0415 - torch models of gigabytes

    return eager_things(artifact, threads)


def json_from_bench(result: dict[str, Any]) -> str:
    """Stable layout, numbers to three places."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 3)
        if isinstance(value, dict):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, list) else value

    return json.dumps(rounded(result), indent=1) + "\n"


def start_table(result: dict[str, Any]) -> Table:
    """Opening and memory as text."""
    start = result["start"]
    rows = tuple(
        (
            {"plain": "plain fp32", "bundle": "bundle"}[kind],
            f"{start[kind]['open_s']:.2f}",
            f"{start[kind]['first_batch_s']:.2f}",
            f"{start[kind]['rss_mib']:.0f}",
            f"{start[kind]['anonymous_mib']:.0f}",
            f"{start[kind]['weights_mib']:.0f}",
        )
        for kind in ("plain", "bundle")
    )
    title = f"Fresh processes, {start['rounds']} of each, first batch of one image; opening checks the bundle's files"
    columns = (
        "What",
        "s to open",
        "s first image",
        "MiB resident",
        "of these its own",
        "MiB of weights used",
    )
    return Table(title, columns, rows)


def bench_table(result: dict[str, Any]) -> Table:
    """The rows as text."""
    machine = result["machine"]
    rows = tuple(
        (
            row["what"],
            str(row["batch"]),
            f"{row['ms_median']:.1f}",
            f"{row['ms_p10']:.1f} to {row['ms_p90']:.1f}",
            f"{row['ms_median'] / row['batch']:.1f}",
            f"{row['ratio_to_plain_fp32']:.2f}",
        )
        for row in result["rows"]
    )
    first = result["rows"][0]
    title = f"{machine['processor']}, {first['threads']} threads, T = {first['tasks']}, {first['count']} calls of each"
    columns = ("What", "Batch", "ms", "p10 to p90", "ms per image", "x plain fp32")
    return Table(title, columns, rows)
