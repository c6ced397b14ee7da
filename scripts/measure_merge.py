"""Time, peak memory and sizes of merging, exporting and running synthetic tasks of a full-size model.

    python scripts/make_synthetic_tasks.py --model ViT-B-32 --tasks 20 --out build/b32
    python scripts/measure_merge.py build/b32 --tasks 8 --tasks 20 --json build/measured.json

Every step is a process of its own, as on the command line, so that its peak is its own. Memory that is mapped from a
file counts as well. Processor time stands beside wall time: on a busy machine only the former says much.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from PIL import Image
from safetensors import safe_open

STEPS = ("merge", "export", "run")
GIB = 1 << 30


def measure(command: list[str]) -> dict[str, float]:
    """Run a command: wall and processor time in seconds, peak resident memory in GiB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} failed: {output}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_gib": usage.ru_maxrss * 1024 / GIB}


def parameters(path: Path, prefix: str = "") -> int:
    """Numbers in a safetensors file, in the tensors whose names begin so."""
    with safe_open(path, framework="np") as file:
        slices = [file.get_slice(name) for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return sum(int(np.prod(part.get_shape())) for part in slices)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a directory."""
    return path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())


def measure_count(
    material: Path, tasks: int, settings: dict[str, Any], options: list[str], out: Path
) -> dict[str, Any]:
    """Merge, export and run the first so many tasks of the material."""
    recipe = yaml.safe_load((material / "recipe.yaml").read_text())
    if len(recipe["tasks"]) < tasks:
        raise click.ClickException(f"{material} has {len(recipe['tasks'])} tasks, fewer than {tasks}.")
    path = material / f"recipe-{tasks}.yaml"
    path.write_text(yaml.safe_dump(recipe | settings | {"tasks": recipe["tasks"][:tasks]}, sort_keys=False))
    image, artifact, bundle = out / "image.png", out / "merged.safetensors", out / "bundle"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 224, 3), np.uint8)).save(image)
    mass = [sys.executable, "-m", "mass_export.cli"]
    row: dict[str, Any] = {
        "material": material.name,
        "tasks": tasks,
        "settings": settings,
        "options": options,
    }
    row["merge"] = measure([*mass, "merge", str(path), "--out", str(artifact), "--quiet", *options])
    row["export"] = measure([*mass, "export", "--artifact", str(artifact), "--out", str(bundle), "--quiet"])
    row["run"] = measure([sys.executable, "-m", "runtime", str(bundle), str(image), "--json"])
    checkpoint = 4 * parameters(material / "base.safetensors")
    factors = 4 * (parameters(artifact, "tasks.") + parameters(artifact, "router."))
    row["bytes"] = {
        "checkpoint_float32": checkpoint,
        "factors_float32": factors,
        "artifact": size_of(artifact),
        "bundle": size_of(bundle),
        "weights": size_of(bundle / "weights.bin"),
        "largest_graph": max(file.stat().st_size for file in bundle.glob("*.onnx")),
    }
    row["merge"]["allowed_gib"] = (2 * checkpoint + factors + GIB) / GIB
    artifact.unlink()
    shutil.rmtree(bundle)
    return row


def line(row: dict[str, Any]) -> str:
    """One row of the table."""
    sizes = {name: f"{size / 1e6:.0f}" for name, size in row["bytes"].items()}
    cells = [row["material"], row["tasks"]]
    for step in STEPS:
        cells += [f"{row[step]['wall_s']:.0f}", f"{row[step]['cpu_s']:.0f}", f"{row[step]['peak_gib']:.2f}"]
    cells += [f"{row['merge']['allowed_gib']:.2f}", sizes["artifact"], sizes["bundle"]]
    ratio = row["bytes"]["artifact"] / row["bytes"]["checkpoint_float32"]
    return "| " + " | ".join(map(str, [*cells, f"{ratio:.2f}"])) + " |"


@click.command(help=__doc__)
@click.argument("material", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tasks", "counts", multiple=True, type=click.IntRange(1), default=(8,), show_default=True)
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="A key of the recipe, in YAML.")
@click.option("--option", "options", multiple=True, help="A further word for mass merge.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Append the rows to this list.")
def main(
    material: Path,
    counts: tuple[int, ...],
    settings: tuple[str, ...],
    options: tuple[str, ...],
    json_path: Path | None,
) -> None:
    """Print a row for every number of tasks."""
    parsed = {key: yaml.safe_load(value) for key, _, value in (entry.partition("=") for entry in settings)}
    out = material / "measured"
    out.mkdir(exist_ok=True)
    for tasks in counts:
        row = measure_count(material, tasks, parsed, list(options), out)
        if json_path is not None:
            rows = json.loads(json_path.read_text()) if json_path.is_file() else []
            json_path.write_text(json.dumps([*rows, row], indent=1))
        click.echo(line(row))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
