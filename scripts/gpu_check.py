"""Check this machine's GPU: see `scripts/gpu_check`, which sets up what this needs, and `mass_export.gpu_check`."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import cast

import click
from rich.console import Console

from mass_export.artifact import write_artifact
from mass_export.gpu_check import Settings, check_gpu, tables
from mass_export.machine import describe_machine
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.report_files import write_json
from runtime.engine_spec import Precision

RECIPE = Path("examples/zoo/core.yaml")
PRECISION = click.Choice(["fp32", "fp16", "bf16"])
QUERY = ["--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


def describe_gpu() -> str:
    """Name, driver and memory, as nvidia-smi says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    return subprocess.run([program, *QUERY], capture_output=True, text=True, check=False).stdout.strip()


def export_recipe(recipe: Path, directory: Path) -> Path:
    """Merge and export, compared with the eager model; routed to several tasks, so that such sets are checked, too."""
    artifact = merge(load_recipe(recipe), Progress())
    router = dataclasses.replace(artifact.info.router, mode="topk")
    artifact = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
    write_artifact(directory / "merged.safetensors", artifact)
    file = directory / "merged.safetensors"
    return export_bundle(artifact, file, directory / "bundle", verify=True, progress=Progress())


@click.command()
@click.option(
    "--bundle", type=click.Path(path_type=Path, file_okay=False), help="fp32; by default that of RECIPE."
)
@click.option("--recipe", default=RECIPE, show_default=True, type=click.Path(path_type=Path))
@click.option("--precision", "precisions", multiple=True, default=("fp32", "fp16"), type=PRECISION)
@click.option("--batch", "batches", multiple=True, default=(1, 8, 32), type=click.IntRange(1))
@click.option("--rounds", default=50, show_default=True, type=click.IntRange(1), help="Timed calls of each.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Figures.")
def main(
    bundle: Path | None,
    recipe: Path,
    precisions: tuple[str, ...],
    batches: tuple[int, ...],
    rounds: int,
    json_path: Path | None,
) -> None:
    """Build TensorRT engines, compare them and CUDA with the CPU, time all, and say PASS or FAIL."""
    gpu, console = describe_gpu(), Console()
    console.print(f"GPU: {gpu}", highlight=False)
    settings = Settings(cast("tuple[Precision, ...]", precisions), tuple(sorted(batches)), rounds)
    with tempfile.TemporaryDirectory() as scratch:
        if bundle is None:
            bundle = export_recipe(recipe, Path(scratch))
        check = check_gpu(bundle, Path(scratch) / "engines", settings, progress=Progress())
    for table in tables(check):
        console.print(table.to_rich())
    for backend in check.backends:
        if backend.fault is not None:
            verb = "" if backend.ran else "did not run: "
            console.print(f"{backend.backend}: {verb}{backend.fault}", markup=False, highlight=False)
    if json_path is not None:
        write_json(json_path, {"gpu": gpu, "machine": describe_machine(), **check.to_dict()})
    console.print("PASS" if check.passed else "FAIL", style="bold green" if check.passed else "bold red")
    sys.exit(not check.passed)


if __name__ == "__main__":
    main()
