"""Does the unknown score find images of no known task? Area under the ROC curve; the table of docs/unknown.md.

    python scripts/study_unknown.py --data examples/zoo --out docs

Each of the ten tasks in turn is left out of the model and its test images are the unknown ones; so are noise, blank
images, real pictures at 5% contrast, and smooth colour gradients. The known ones are the other tasks' test images.
Calibration images come from the validation split.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray
from study_routers import batches, markdown, of_tasks

from mass_export.artifact import Artifact
from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.datasets import load_labelled_images
from mass_export.evaluation import area_under_roc
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.suite import IMAGES_PER_TASK, POOL_IMAGES
from mass_export.synthetic_images import gradient

KNOWN_IMAGES = 200  # of each task, at most
STRANGE_IMAGES = 200
CONTRAST = 0.05
QUIET = Progress(quiet=True)
LEVELS = ("nothing", "nothing, heads not used", "300 images", "40 images a task")


def strange_images(pixel_values: NDArray[np.float32], artifact: Artifact) -> dict[str, NDArray[np.float32]]:
    """Images of nothing, normalised; low contrast ones are made of the given images. [n, 3, H, W] each"""
    rng = np.random.default_rng(0)
    spec, n = artifact.info.preprocess, STRANGE_IMAGES
    H, W = spec.image_size
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    pictures = pixel_values[rng.permutation(len(pixel_values))[:n]] * std + mean
    deviation = pictures - pictures.mean(axis=(1, 2, 3), keepdims=True)
    corners = 0.5 + 0.3 * (rng.random((n, 3, 1, 1)) - 0.5) + 0.1 * (rng.random((n, 3, 2, 2)) - 0.5)
    made = {
        "noise": rng.random((n, 3, H, W)),
        "blank, coloured": np.broadcast_to(rng.random((n, 3, 1, 1)), (n, 3, H, W)),
        "blank, grey": np.broadcast_to(rng.random((n, 1, 1, 1)), (n, 3, H, W)),
        "low contrast": 0.5 + CONTRAST * deviation,
        "smooth": gradient(corners, H, W),
    }
    return {name: ((np.clip(x, 0, 1) - mean) / std).astype(np.float32) for name, x in made.items()}


def scores(artifact: Artifact, pixel_values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The unknown score. [n]"""
    model = MassModel(artifact)
    parts = []
    for batch in batches(pixel_values):
        unknown = model.first_pass(batch)[1]
        assert unknown is not None
        parts.append(unknown)
    found: NDArray[np.float32] = torch.cat(parts).numpy()
    return found


def images_of(artifact: Artifact, data: Path, split: str) -> list[NDArray[np.float32]]:
    """A random sample of each task's images, normalised."""
    rng = np.random.default_rng(0)
    parts = []
    for task in artifact.info.tasks:
        images = load_labelled_images(data, task, split).pixel_values(artifact.info.preprocess)
        parts.append(images[rng.permutation(len(images))[:KNOWN_IMAGES]])
    return parts


def levels(artifact: Artifact, images: list[NDArray[np.float32]]) -> dict[str, Artifact]:
    """The model at every level of what it may know, taught by validation images."""
    everything = np.concatenate(images)
    pool = everything[np.random.default_rng(0).permutation(len(everything))[:POOL_IMAGES]]
    few = {task.name: part[:IMAGES_PER_TASK] for task, part in zip(artifact.info.tasks, images, strict=True)}
    silent = dataclasses.replace(artifact.info.router, evidence=0.0)
    artifacts = (
        artifact,
        dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=silent)),
        calibrate_pool(artifact, pool, progress=QUIET),
        calibrate_task_images(artifact, few, progress=QUIET)[0],
    )
    return dict(zip(LEVELS, artifacts, strict=True))


def measure(data: Path, split: str, progress: Progress) -> list[dict[str, float | str]]:
    """One row for each kind of unknown image, and false alarms of the calibrated thresholds on known ones."""
    whole = merge(load_recipe(data / "hard.yaml"), progress)
    names = [task.name for task in whole.info.tasks]
    seen, taught_by = images_of(whole, data, split), images_of(whole, data, "val")
    strange = strange_images(np.concatenate(seen), whole)
    rows: dict[str, dict[str, list[float]]] = {}
    alarms: dict[str, list[float]] = {}
    for left_out in progress.track(list(range(len(names))), "Tasks left out"):
        kept = [t for t in range(len(names)) if t != left_out]
        known = np.concatenate([seen[t] for t in kept])
        for level, artifact in levels(of_tasks(whole, kept), [taught_by[t] for t in kept]).items():
            usual = scores(artifact, known)
            for kind, images in {f"task {names[left_out]}": seen[left_out], **strange}.items():
                found = area_under_roc(scores(artifact, images), usual)
                rows.setdefault(kind, {}).setdefault(level, []).append(found)
            calibration = artifact.info.calibration
            if calibration is not None and calibration.unknown_threshold is not None:
                alarms.setdefault(level, []).append(float(np.mean(usual > calibration.unknown_threshold)))
    table: list[dict[str, float | str]] = [
        {"kind": kind, **{level: float(np.mean(found)) for level, found in row.items()}}
        for kind, row in sorted(rows.items(), key=lambda item: (not item[0].startswith("task "), item[0]))
    ]
    means: dict[str, float | str] = {level: float(np.mean([row[level] for row in table])) for level in LEVELS}
    least: dict[str, float | str] = {level: min(float(row[level]) for row in table) for level in LEVELS}
    false: dict[str, float | str] = {level: float(np.mean(found)) for level, found in alarms.items()}
    return [
        *table,
        {"kind": "**mean**", **means},
        {"kind": "**smallest**", **least},
        {"kind": "known images called unknown", **false},
    ]


@click.command(help=__doc__)
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=Path("docs"), show_default=True, type=click.Path(path_type=Path))
@click.option("--split", default="test", show_default=True, type=click.Choice(["val", "test"]))
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(data: Path, out: Path, split: str, *, quiet: bool) -> None:
    """Write unknown.md and unknown.json."""
    rows = measure(data, split, Progress(quiet=quiet))
    (out / "unknown.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    text = [
        "# Images of no known task",
        (
            f"Made by `python scripts/study_unknown.py --data {data} --out {out}` on {split} images of the zoo's ten "
            "tasks. Area under the ROC curve of the unknown score, in per cent: 100 separates unknown images from "
            "those of the known tasks, 50 is chance. *task X*: X is left out of the model and shown. The columns say "
            "what the router knows; *heads not used* is a default router whose heads do not tell their task."
        ),
        markdown(rows, {"kind": "images", **{level: level for level in LEVELS}}),
        (
            "Without images the score is the share of the feature at the router's last block that no task's subspace "
            "holds, where heads speak 20 times that less the strongest evidence. It only ranks images: no threshold "
            "comes with it (`Classifier(.., unknown_threshold=..)` sets one). `mass calibrate` replaces it by the "
            "distance to the nearest task's mean in units of the spread within tasks (a whitened feature, its "
            "covariance shrunk as the discriminant's), which grows where dull images made for the purpose are nearer "
            "than any task; the threshold is the 95th percentile of the calibration images' own cross-validated "
            "distances. With 40 images a task most images are read up to an early block only, where unknown tasks are "
            "harder to tell: `mass calibrate --no-early-stops` reads on."
        ),
    ]
    (out / "unknown.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    click.echo(f"Wrote {out / 'unknown.md'}")


if __name__ == "__main__":
    main()
