"""What fp16, bf16 and int8 change, measured on a CPU: decisions against the eager fp32 model, and the largest values.

    python scripts/precision_table.py --recipe examples/zoo/core.yaml --data examples/zoo
    python scripts/precision_table.py --bundle build/engines/ViT-B-32-8/bundle --images 2

With a recipe: it is merged and exported, and its half-precision graphs answer images of every task, as typed graphs
in ONNX Runtime (fp16 alone) and emulated (`mass_export.precision_emulation`), and so do the graphs of int8 engines,
with scales set on random images, and on images of the split `--calibration`. With a bundle: the largest values only,
on random images.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import torch
from numpy.typing import NDArray

from mass_export.artifact import Artifact, write_artifact
from mass_export.bundle_precision import convert_bundle
from mass_export.datasets import load_labelled_images
from mass_export.engine_int8 import CALIBRATION_IMAGES, quantise_bundle
from mass_export.gpu_check import random_images
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.onnx_export import export_bundle
from mass_export.precision_check import check_decisions, measure_extremes
from mass_export.precision_emulation import emulate_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.report_files import write_json
from mass_export.verify import sample_images
from runtime.bundle import GateMode
from runtime.classifier import ForwardResult
from runtime.engine_spec import Precision
from runtime.manifest import read_manifest

HALVES: tuple[Precision, ...] = ("fp16", "bf16")
RANDOM, REAL = "int8, random images", "int8, real images"
FORMS = ("fp32", "typed fp16", *(f"emulated {half}" for half in HALVES), RANDOM, REAL)


class Remembered:
    """The eager model, which answers each batch once."""

    def __init__(self, artifact: Artifact) -> None:
        self._model = MassModel(artifact)
        self._known: dict[bytes, ForwardResult] = {}

    def __call__(self, images: NDArray[np.float32]) -> ForwardResult:
        """As the model's `forward`."""
        key = images.tobytes()
        if key not in self._known:
            self._known[key] = self._model.forward(torch.from_numpy(images))
        return self._known[key]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is measured of a recipe: images of `split`, so many a task; `mode` of the gates if not the recipe's."""

    data: Path
    split: str
    per_task: int
    calibration: str
    mode: GateMode | None
    forms: tuple[str, ...]


def rows_of_recipe(recipe: Path, wanted: Wanted) -> list[dict[str, Any]]:
    """Decisions and largest values of every form of the recipe's bundle."""
    parsed, progress = load_recipe(recipe), Progress()

    def images_of(split: str, count: int) -> NDArray[np.float32]:
        tasks = artifact.info.tasks
        parts = (load_labelled_images(wanted.data, task, split).sample(count) for task in tasks)
        return np.concatenate([part.pixel_values(parsed.preprocess) for part in parts])

    with tempfile.TemporaryDirectory() as scratch:
        artifact, file = merge(parsed, progress), Path(scratch) / "merged.safetensors"
        if wanted.mode is not None:
            router = dataclasses.replace(artifact.info.router, mode=wanted.mode)
            artifact = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
        write_artifact(file, artifact)
        bundle = export_bundle(artifact, file, Path(scratch) / "bundle", verify=True, progress=progress)
        images = images_of(wanted.split, wanted.per_task)
        reference, rows = Remembered(artifact), []
        for form in wanted.forms:
            directory = bundle if form == "fp32" else Path(scratch) / form
            directory.mkdir(exist_ok=True)
            extremes = {}
            if form == "typed fp16":
                convert_bundle(bundle, read_manifest(bundle), directory, "fp16")
            elif form == RANDOM:
                quantise_bundle(bundle, directory, sample_images(artifact), progress)
            elif form == REAL:
                per_task = CALIBRATION_IMAGES // len(artifact.info.tasks)
                real = images_of(wanted.calibration, per_task)
                quantise_bundle(bundle, directory, real, progress)
            elif form.startswith("emulated "):
                emulate_bundle(bundle, directory, cast("Precision", form.removeprefix("emulated ")))
                extremes = {
                    key: value.to_dict() for key, value in measure_extremes(directory, images[::16]).items()
                }
            parity = check_decisions(directory, images, reference, progress)
            gates = artifact.info.router.mode
            row = {"recipe": str(recipe), "gates": gates, "graphs": form}
            rows.append({**row, **parity.to_dict(), "largest": extremes})
            click.echo(json.dumps(rows[-1]))
        return rows


def rows_of_bundle(bundle: Path, count: int) -> list[dict[str, Any]]:
    """Largest values of a bundle."""
    rows = []
    for precision in HALVES:
        with tempfile.TemporaryDirectory(dir=bundle.parent) as scratch:
            emulate_bundle(bundle, Path(scratch), precision)
            extremes = measure_extremes(Path(scratch), random_images(bundle, count, 0))
        largest = {name: value.to_dict() for name, value in extremes.items()}
        rows.append({"bundle": str(bundle), "precision": precision, "images": count, "largest": largest})
        click.echo(json.dumps(rows[-1]))
    return rows


@click.command(help=__doc__)
@click.option("--recipe", "recipes", multiple=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True)
@click.option(
    "--mode", type=click.Choice(["topk", "top1", "weighted"]), help="Of the gates, not the recipe's."
)
@click.option("--graphs", type=click.Choice(FORMS), multiple=True, help="Only these forms; by default all.")
@click.option("--calibration", default="val", show_default=True, help="Split of int8's real images.")
@click.option("--per-task", default=100, show_default=True, help="Images of each task, at most.")
@click.option("--bundle", "bundles", multiple=True, type=click.Path(path_type=Path, file_okay=False))
@click.option("--images", default=4, show_default=True, help="Random images for each bundle.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False))
def main(
    recipes: tuple[Path, ...],
    data: Path,
    split: str,
    mode: GateMode | None,
    graphs: tuple[str, ...],
    calibration: str,
    per_task: int,
    bundles: tuple[Path, ...],
    images: int,
    json_path: Path | None,
) -> None:
    """One line of JSON for each row."""
    wanted = Wanted(data, split, per_task, calibration, mode, graphs or FORMS)
    rows = [row for recipe in recipes for row in rows_of_recipe(recipe, wanted)]
    rows += [row for bundle in bundles for row in rows_of_bundle(bundle, images)]
    if json_path is not None:
        write_json(json_path, {"rows": rows})


if __name__ == "__main__":
    main()
