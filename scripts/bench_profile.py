"""Where the time goes: ONNX Runtime's own profile of a bundle's passes for one task each, beside the plain pass.

    python scripts/bench_profile.py build/t20/bundle --batch 1

Each operator's time is the median over the calls, so that the first, which reads the files, does not count. Profiling
itself costs a few microseconds an operator.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np

from mass_export.bench import random_images
from mass_export.bench_plain import write_plain_pass
from mass_export.bench_profile import operator_runs, profiled
from runtime.bundle import Manifest
from runtime.manifest import read_manifest
from runtime.one_task import OneTaskPass
from runtime.onnx_session import OnnxSession

FOLDER = click.Path(path_type=Path, file_okay=False, exists=True)
PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "MatMulIntegerToFloat")
KINDS = (
    "products, base's weights",
    "products, low rank",
    "products, attention",
    "gathering",
    "layout",
    "other",
)
LAYOUT = ("Reshape", "Transpose", "Split", "Squeeze", "Unsqueeze", "Concat", "Pad", "Slice", "Shape")


def kind_of(event: dict[str, Any]) -> str:
    """Of `KINDS`; a weight that was rearranged when the graph was loaded is no longer among a product's inputs."""
    name, shapes = event["args"]["op_name"], event["args"].get("input_type_shape", [])
    if name in PRODUCTS:
        ranks = [len(dims) for shape in shapes for dims in shape.values()]
        if ranks[0] == 4:
            return "products, attention"
        # Else it is a task's patch convolution, which is fed whole.
        is_dense = len(ranks) == 1 or name == "MatMulIntegerToFloat" or ranks[1] == 2
        return "products, base's weights" if is_dense else "products, low rank"
    if name == "Gather":
        return "gathering"
    return "layout" if name in LAYOUT else "other"


def times_of(session: OnnxSession) -> dict[str, float]:
    """Milliseconds of a call by kind, medians of each operator."""
    taken: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in operator_runs(session):
        taken[event["name"], kind_of(event)].append(event["dur"] / 1e3)
    found = dict.fromkeys(KINDS, 0.0)
    for (_, kind), ms in taken.items():
        found[kind] += float(np.median(ms))
    return found


def added(parts: list[dict[str, float]]) -> dict[str, float]:
    """Sums by kind."""
    return {kind: sum(part[kind] for part in parts) for kind in KINDS}


def passes_of(
    bundle: Path, manifest: Manifest, images: Any, threads: int, calls: int
) -> dict[str, dict[str, float]]:
    """Profiles of the first pass, where it shares the base, and of the second for one task and for one an image."""
    runs: dict[str, Callable[[OneTaskPass], Any]] = {"second, one task": lambda model: model.run(images, [0])}
    if manifest.one_task is not None and manifest.one_task.routers:
        runs = {"first": lambda model: model.first_pass(images)} | runs
    if 1 < len(images) <= len(manifest.tasks):
        runs["second, a task each"] = lambda model: model.run(images, range(len(images)))
    found = {}
    for name, run in runs.items():
        model = OneTaskPass(bundle, manifest, threads)
        for _ in range(calls):
            run(model)
        parts = (model._patches, *model._segments, *model._routers)  # noqa: SLF001
        found[name] = added([times_of(part.session) for part in parts])
        model.close()
    return found


@click.command(help=__doc__)
@click.argument("bundle", type=FOLDER)
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1))
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--calls", default=15, show_default=True, type=click.IntRange(3))
def main(bundle: Path, batch: int, threads: int, calls: int) -> None:
    """Profile and print."""
    manifest = read_manifest(bundle)
    if manifest.one_task is None:
        raise click.ClickException(f"{bundle}: has no one-task graphs; export it as fp32 or int8.")
    images = random_images(manifest, batch, seed=0)
    with tempfile.TemporaryDirectory() as scratch, profiled(Path(scratch)):
        plain = OnnxSession(write_plain_pass(bundle, Path(scratch)), "cpu", threads)
        run = partial(plain.run, {"pixel_values": images})
        for _ in range(calls):
            run()
        found = {"plain": times_of(plain)} | passes_of(bundle, manifest, images, threads, calls)
    whole = sum(found["plain"].values())
    click.echo(f"{'ms':26}" + "".join(f"{name:>22}" for name in found))
    for kind in KINDS:
        click.echo(f"{kind:26}" + "".join(f"{times[kind]:22.2f}" for times in found.values()))
    click.echo(
        f"{'all, of plain':26}" + "".join(f"{sum(times.values()) / whole:22.2f}" for times in found.values())
    )


if __name__ == "__main__":
    main()
