"""May the first pass stop at the first block that is sure? Blocks run against routing accuracy.

    python scripts/study_adaptive.py --data examples/zoo

At every block from the first on the router could answer: with the standardised residuals of the mlp inputs so far
(nothing known), or with the discriminant on them (40 images a task). An image stops at the first block at which its
best task leads by a threshold. For each router the table has every fixed block, and for adaptive stopping the threshold
that runs the fewest blocks on validation images without losing more than 0.2 points there; figures are of test images.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray

from mass_export.artifact import Artifact
from mass_export.calibration_features import tap_features
from mass_export.datasets import load_labelled_images
from mass_export.discriminant import fit_discriminant
from mass_export.layer_choice import macro_average
from mass_export.merge import merge
from mass_export.merging import IllConditionedWarning
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.router_spec import Tap
from mass_export.routing import log_posterior, projection_residuals, standardize_over_tasks
from mass_export.suite import IMAGES_PER_TASK
from runtime.verification import two_best

LOSS = 0.002
Scores = NDArray[np.float64]


def residual_scores(artifact: Artifact, features: dict[Tap, torch.Tensor]) -> Scores:
    """Minus the mean standardised residual of the blocks so far. [L, n, T]"""
    total, scores = torch.zeros(()), []
    for count, (tap, z) in enumerate(sorted(features.items()), 1):
        bases = [task[tap.parameter].double() for task in artifact.routing_bases]
        total = total + standardize_over_tasks(projection_residuals(z, bases, "l2"))
        scores.append((-total / count).numpy())
    return np.stack(scores)


def joined(features: dict[Tap, torch.Tensor], count: int) -> NDArray[np.float64]:
    """Features of the first blocks side by side."""
    return torch.cat([z for _, z in sorted(features.items())[:count]], dim=1).numpy()


def leads(scores: Scores) -> NDArray[np.float64]:
    """Of the best task before the second. [L, n]"""
    return np.stack([two_best(-block)[1] for block in scores])


def stop(scores: Scores, threshold: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Where each image stops, and its task there. [n] each"""
    sure = leads(scores) >= threshold
    sure[-1] = True
    where = sure.argmax(axis=0)
    return where, scores[where, np.arange(scores.shape[1])].argmax(axis=-1)


def study(name: str, val: tuple[Scores, Any], test: tuple[Scores, Any]) -> list[dict[str, Any]]:
    """Rows of one router."""
    rows = []
    for block in range(len(val[0])):
        accuracy = [macro_average(s[block].argmax(axis=-1) == truth, truth) for s, truth in (val, test)]
        rows.append(
            {
                "router": name,
                "stops": f"block {block}",
                "blocks": block + 0.5,
                "val": accuracy[0],
                "test": accuracy[1],
            }
        )
    fixed = max(row["val"] for row in rows)
    margins = np.quantile(leads(val[0]), np.linspace(0, 1, 200))
    trials = []
    for threshold in margins:
        where, task = stop(val[0], threshold)
        trials.append((float(where.mean()) + 0.5, macro_average(task == val[1], val[1]), threshold))
    kept = [trial for trial in trials if trial[1] >= fixed - LOSS] or [
        max(trials, key=lambda trial: trial[1])
    ]
    _, accuracy, threshold = min(kept)
    where, task = stop(test[0], threshold)
    rows.append(
        {
            "router": name,
            "stops": "when sure",
            "blocks": float(where.mean()) + 0.5,
            "val": accuracy,
            "test": macro_average(task == test[1], test[1]),
        }
    )
    return rows


@click.command(help=__doc__)
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--suite", "suites", multiple=True, default=("core", "hard"), show_default=True)
def main(data: Path, suites: tuple[str, ...]) -> None:
    """Print a table."""
    warnings.simplefilter("ignore", IllConditionedWarning)
    progress = Progress(quiet=True)
    click.echo(
        "| zoo | router | stops | blocks, test | routed, test | routed, validation |\n|---|---|---|---|---|---|"
    )
    for suite in suites:
        recipe = load_recipe(data / f"{suite}.yaml")
        artifact = merge(recipe, progress)
        taps = [Tap(layer, "mlp") for layer in range(artifact.info.vision.layers)]
        splits = {}
        for split in ("val", "test"):
            parts = [load_labelled_images(data, task, split) for task in artifact.info.tasks]
            images = np.concatenate([part.pixel_values(recipe.preprocess) for part in parts])
            truth = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            splits[split] = tap_features(artifact, images, taps, progress), truth
        features, truth = splits["val"]
        rng = np.random.default_rng(0)
        shown = np.concatenate(
            [rng.permutation(np.flatnonzero(truth == t))[:IMAGES_PER_TASK] for t in np.unique(truth)]
        )
        held = np.setdiff1d(np.arange(len(truth)), shown)
        learnt: dict[str, list[Scores]] = {"val": [], "test": []}
        for count in range(1, len(taps) + 1):
            x = joined(features, count)
            fitted = [torch.from_numpy(part) for part in fit_discriminant(x[shown], truth[shown])]
            for split, (z, _) in splits.items():
                learnt[split].append(log_posterior(torch.from_numpy(joined(z, count)), *fitted).numpy())
        residuals = {split: residual_scores(artifact, z) for split, (z, _) in splits.items()}
        rows = study("residuals", (residuals["val"], truth), (residuals["test"], splits["test"][1]))
        val = np.stack(learnt["val"])[:, held]
        rows += study("discriminant", (val, truth[held]), (np.stack(learnt["test"]), splits["test"][1]))
        for row in rows:
            click.echo(
                f"| {suite} | {row['router']} | {row['stops']} | {row['blocks']:.1f} | {100 * row['test']:.1f} | "
                f"{100 * row['val']:.1f} |"
            )


if __name__ == "__main__":
    main()
