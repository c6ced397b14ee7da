"""Builds full-size engines and prints what that takes: time, processor time, size, peak memory, layers.

Material is random (`bench_material.py`) and is kept in OUT for the next run. Each engine is built in a process of its
own, whose peak of resident memory is shown. TensorRT-RTX needs no GPU for this.

    python scripts/build_engines_table.py --out build/engines
    python scripts/build_engines_table.py --out build/engines --row ViT-B-32:8 --precision bf16 --batch 1 1 1
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import click

from mass_export.machine import describe_machine
from mass_export.precision import write_converted
from mass_export.progress import Progress
from mass_export.report_files import write_json
from runtime.engine_build import build_engine
from runtime.engine_monitor import terminal_bar
from runtime.engine_network import layer_precisions, parse_network
from runtime.engine_settings import EngineSettings, find_tensorrt
from runtime.engine_spec import Precision
from runtime.manifest import read_manifest
from runtime.tensorrt_log import make_logger

ROWS = ("ViT-B-32:8", "ViT-B-32:20", "ViT-L-14:8")
COLUMNS = (
    "model",
    "T",
    "pass",
    "precision",
    "time_s",
    "cpu_s",
    "engine_mb",
    "graph_mb",
    "peak_rss_mb",
    "layers",
)


def make_bundle(model: str, tasks: int, out: Path) -> Path:
    """The bundle of random tasks, made if it is not there."""
    directory = out / f"{Path(model).stem}-{tasks}"
    if not (directory / "bundle" / "manifest.json").is_file():
        script = Path(__file__).with_name("bench_material.py")
        command = ["--model", model, "--tasks", str(tasks), "--base-merge", "tsvm", "--out", str(directory)]
        subprocess.run([sys.executable, str(script), *command], check=True)
    return directory / "bundle"


def build_pass(bundle: Path, name: str, settings: EngineSettings) -> dict[str, Any]:
    """Convert and build one pass; what it took."""
    manifest, tensorrt = read_manifest(bundle), find_tensorrt(settings.flavour)
    spec, precision = manifest.passes[name], cast("Precision", settings.precision)
    with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
        onnx_file = bundle / spec.file
        if precision != manifest.precision:
            onnx_file = write_converted(onnx_file, Path(scratch), precision)
        start, cpu_start = time.perf_counter(), time.process_time()
        with terminal_bar(f"Building {bundle.parent.name} {name}") as show:
            profiles = settings.profiles(name, manifest)
            plan = build_engine(onnx_file, spec, profiles, tensorrt=tensorrt, settings=settings, show=show)
        elapsed_s, cpu_s = time.perf_counter() - start, time.process_time() - cpu_start
        graph_mb = sum(file.stat().st_size for file in Path(scratch).iterdir()) / 1e6
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
        log = make_logger(tensorrt.module)
        network, _parser = parse_network(onnx_file, tensorrt.module.Builder(log), tensorrt, log)
        return {
            "pass": name,
            "precision": precision,
            "time_s": round(elapsed_s, 1),
            "cpu_s": round(cpu_s, 1),
            "engine_mb": round(len(plan) / 1e6, 1),
            "graph_mb": round(graph_mb, 1),
            "peak_rss_mb": round(peak),
            "layers": network.num_layers,
            "layer_precisions": layer_precisions(network),
            "tensorrt": f"{tensorrt.flavour} {tensorrt.version}",
        }


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *[[row[name] for name in COLUMNS] for row in rows]]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


@click.command(help=__doc__)
@click.option("--out", required=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--row", "rows", multiple=True, default=ROWS, show_default=True, help="MODEL:TASKS")
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "bf16"]))
@click.option("--batch", default=(1, 8, 32), show_default=True, type=(int, int, int))
@click.option("--compute-capability", multiple=True, help="GPUs to build for; Ampere and later by default.")
def main(
    out: Path,
    rows: tuple[str, ...],
    precision: Precision,
    batch: tuple[int, int, int],
    compute_capability: tuple[str, ...],
) -> None:
    """Build and print the table; OUT/table.json has the layers of every network too."""
    settings = EngineSettings(precision=precision, batch=batch, compute_capability=compute_capability)
    found: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    for row in Progress().track(rows, "Models"):
        model, _, tasks = row.rpartition(":")
        bundle = make_bundle(model, int(tasks), out)
        for name in read_manifest(bundle).passes:
            with context.Pool(1) as pool:
                built = pool.apply(build_pass, (bundle, name, settings))
            found.append({"model": model, "T": int(tasks), **built})
            click.echo(
                json.dumps({key: value for key, value in found[-1].items() if key != "layer_precisions"})
            )
    write_json(
        out / "table.json",
        {"machine": describe_machine(), "batch": batch, "precision": precision, "rows": found},
    )
    click.echo(markdown(found))


if __name__ == "__main__":
    main()
