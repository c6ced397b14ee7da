"""How long a bundle takes to be ready, and how much memory it holds, beside a plain CLIP pass.

Each measurement is a process of its own that imports the runtime alone; they take turns. Files are in the page cache.
`python -m mass_export.bench_start plain|bundle PATH BATCH HEIGHT WIDTH THREADS` is such a process: it prints JSON.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.progress import Progress
from runtime.bundle import Manifest, all_matrices
from runtime.classifier import Classifier
from runtime.errors import MassRuntimeError
from runtime.manifest import read_manifest
from runtime.onnx_session import OnnxSession

MIB = 1 << 20


def bench_start(
    bundle: Path, plain: Path, *, threads: int, rounds: int, progress: Progress, batch: int = 1
) -> dict[str, Any]:
    """Open and run once, in processes that take turns.

    Args:
        bundle: what `mass export` wrote.
        plain: ONNX file of the plain pass.
        threads: within an operator.
        rounds: processes of each.
        progress: where to show it.
        batch: images of the first batch.

    Returns:
        `plain` and `bundle`: medians of `open_s`, `first_batch_s`, and in MiB of resident memory after the first batch
        beyond that of the imported runtime: `rss_mib`, of which `anonymous_mib` is this process' own and the rest
        mapped from files; `weights_mib`, the parameters that were used; `ratio_open` and `rss_over_weights`.
    """
    size = read_manifest(bundle).preprocess.image_size
    found: dict[str, list[dict[str, float]]] = {"plain": [], "bundle": []}
    for _ in progress.track(range(rounds), "Opening in fresh processes"):
        for kind, path in (("plain", plain), ("bundle", bundle)):
            found[kind].append(_measured(kind, path, batch, *size, threads))
    result: dict[str, Any] = {
        kind: {key: float(np.median([run[key] for run in runs])) for key in runs[0]}
        for kind, runs in found.items()
    }
    result["ratio_open"] = result["bundle"]["open_s"] / result["plain"]["open_s"]
    for kind in ("plain", "bundle"):
        result[kind]["rss_over_weights"] = result[kind]["rss_mib"] / result[kind]["weights_mib"]
    return result | {"batch": batch, "rounds": rounds}


def _measured(kind: str, path: Path, *numbers: int) -> dict[str, float]:
    command = [sys.executable, "-m", "mass_export.bench_start", kind, str(path), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - ourselves
    if done.returncode:
        raise MassRuntimeError(f"{path}: the process that was to open it failed: {done.stderr.strip()}")
    measured: dict[str, float] = json.loads(done.stdout)
    return measured


def resident_mib() -> tuple[float, float]:
    """Resident memory of this process on Linux: all, and what is its own. [MiB]"""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    kib = {
        line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "RssAnon"))
    }
    return kib["VmRSS"] / 1024, kib["RssAnon"] / 1024


def random_images(manifest: Manifest, count: int, seed: int) -> NDArray[Any]:
    """Noise as the bundle takes it; times do not depend on what is seen. [count, ..]"""
    rng = np.random.default_rng(seed)
    if manifest.preprocess.dtype == "uint8":
        return rng.integers(0, 256, (count, *manifest.preprocess.input_shape), np.uint8)
    return rng.standard_normal((count, 3, *manifest.preprocess.image_size), dtype=np.float32)


def used_mib(manifest: Manifest, tasks: int) -> float:
    """Size of what one batch of `tasks` different tasks reads: the base, a first pass of its own, rows of the tasks."""
    whole = sum(spec.bytes for name, spec in manifest.files.items() if name.endswith(".bin"))
    stacks = [array for matrix in all_matrices(manifest) for array in (matrix.u_t, matrix.s, matrix.vh)]
    if manifest.one_task is not None and (tables := manifest.one_task.tables) is not None:
        stacks += [array for array in (tables.vectors, tables.conv1) if array is not None]
    unread = sum(array.nbytes * (1 - tasks / array.shape[0]) for array in stacks)
    return (whole - unread) / MIB


def _plain(path: Path, threads: int) -> tuple[Callable[[Any], Any], float]:
    session = OnnxSession(path, "cpu", threads)
    return lambda images: session.run({"pixel_values": images}), path.with_suffix(".bin").stat().st_size / MIB


def main(kind: str, path: Path, batch: int, height: int, width: int, threads: int) -> None:
    """Open, run once, print."""
    importlib.import_module("onnxruntime")  # its own memory is not counted
    if kind == "bundle":
        images = random_images(read_manifest(path), batch, seed=0)
    else:
        images = np.random.default_rng(0).standard_normal((batch, 3, height, width), dtype=np.float32)
    before, own_before = resident_mib()
    start = time.perf_counter()
    if kind == "plain":
        run, weights = _plain(path, threads)
    else:
        classifier = Classifier(path, "cpu", num_threads=threads)
        run, weights = classifier.forward, 0.0
    opened = time.perf_counter()
    answer = run(images)
    ran = time.perf_counter()
    after, own_after = resident_mib()
    if kind == "bundle":
        tasks = int(answer.selected.any(axis=0).sum())
        weights = used_mib(read_manifest(path), tasks)
    figures = {
        "open_s": opened - start,
        "first_batch_s": ran - opened,
        "rss_mib": after - before,
        "anonymous_mib": own_after - own_before,
        "weights_mib": weights,
    }
    sys.stdout.write(json.dumps(figures) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
