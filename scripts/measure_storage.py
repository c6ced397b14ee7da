"""What each way of storing costs in accuracy and saves in bytes, on the zoo.

    python scripts/measure_storage.py examples/zoo/core.yaml --data examples/zoo --json build/storage.json

Every setting is merged, written, read back, exported and scored as `mass` does it. Prints a table.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import click

from mass_export.artifact import read_artifact, write_artifact
from mass_export.evaluation import evaluate_bundle
from mass_export.factor_storage import FactorDtype
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import Recipe, load_recipe

SETTINGS: dict[str, tuple[dict[str, Any], FactorDtype]] = {
    "as the recipe says": ({}, "float32"),
    "float16": ({}, "float16"),
    "bfloat16": ({}, "bfloat16"),
    "int8": ({}, "int8"),
    "patch_embed low_rank": ({"patch_embed": "low_rank"}, "float32"),
    "float16, patch_embed low_rank": ({"patch_embed": "low_rank"}, "float16"),
    "int8, patch_embed low_rank": ({"patch_embed": "low_rank"}, "int8"),
    "rank_budget 1/T": ({"rank_budget": 1.0}, "float32"),
    "rank_ratio 0.5/T": ({"rank_ratio": 0.5}, "float32"),
    "rank_budget 0.5/T": ({"rank_budget": 0.5}, "float32"),
    "rank_ratio 0.25/T": ({"rank_ratio": 0.25}, "float32"),
    "rank_budget 0.25/T": ({"rank_budget": 0.25}, "float32"),
    "float16, low_rank, rank_budget 0.5/T": ({"patch_embed": "low_rank", "rank_budget": 0.5}, "float16"),
    "int8, low_rank, rank_budget 0.5/T": ({"patch_embed": "low_rank", "rank_budget": 0.5}, "int8"),
}


def changed(recipe: Recipe, settings: dict[str, Any]) -> Recipe:
    """The recipe with these keys; ratios are given as shares of 1/T."""
    settings, count = dict(settings), len(recipe.tasks)
    for key in ("rank_budget", "rank_ratio"):
        if key in settings:
            settings[key] /= count
            ratio = settings[key]
            tasks = tuple(dataclasses.replace(task, rank_ratio=ratio, rank=None) for task in recipe.tasks)
            settings |= {"tasks": tasks, "rank": None}
    return dataclasses.replace(recipe, **settings)


def score(recipe: Recipe, dtype: FactorDtype, data: Path, split: str, work: Path) -> dict[str, float]:
    """Bytes of the artifact, and accuracies of its bundle."""
    quiet = Progress(quiet=True)
    path = work / "merged.safetensors"
    write_artifact(path, merge(recipe, quiet, factor_dtype=dtype))
    bundle = export_bundle(read_artifact(path), path, work / "bundle", verify=False, progress=quiet)
    average = evaluate_bundle(bundle, data, split=split, provider="cpu", progress=quiet).average
    return {
        "bytes": path.stat().st_size,
        "joint_accuracy": average.joint_accuracy,
        "known_task_accuracy": average.known_task_accuracy,
        "routing_accuracy": average.routing_accuracy,
    }


@click.command(help=__doc__)
@click.argument("recipe", type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--split", default="test", show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="Write the numbers here, too.")
def main(recipe: Path, data: Path, split: str, json_path: Path | None) -> None:
    """Print a row for every setting."""
    parsed = load_recipe(recipe)
    base = 4 * sum(math.prod(shape) for shape in parsed.vision.parameter_shapes().values())
    rows: dict[str, dict[str, float]] = {}
    for name, (settings, dtype) in SETTINGS.items():
        with tempfile.TemporaryDirectory() as work:
            row = rows[name] = score(changed(parsed, settings), dtype, data, split, Path(work))
        accuracies = (f"{100 * row[key]:.2f}" for key in row if key.endswith("accuracy"))
        click.echo(f"| {name} | {row['bytes'] / base:.2f} | {' | '.join(accuracies)} |")
        if json_path is not None:
            json_path.write_text(json.dumps({"recipe": str(recipe), "split": split, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
