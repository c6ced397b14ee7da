"""What eight bits change on the zoo: answers of int8 bundles beside those of fp32, on test images.

python scripts/int8_agreement.py --data examples/zoo
"""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import click
import numpy as np

from mass_export.artifact import Artifact, write_artifact
from mass_export.datasets import load_labelled_images
from mass_export.layer_choice import macro_average
from mass_export.merging import IllConditionedWarning
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import load_recipe
from mass_export.suite import CONFIGURATIONS
from runtime.classifier import Classifier, ForwardResult

FORMS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "fp32, int8 router": {"router_precision": "int8"},
    "int8, precise router": {"precision": "int8", "precise_router": True},
}


def answers(artifact: Artifact, images: np.ndarray[Any, Any], work: Path) -> dict[str, ForwardResult]:
    """Of every form of the bundle."""
    path, found = work / "merged.safetensors", {}
    write_artifact(path, artifact)
    for form, options in FORMS.items():
        out = work / form.replace(", ", "-").replace(" ", "-")
        export_bundle(artifact, path, out, verify=False, progress=Progress(quiet=True), **options)
        with Classifier(out, "cpu") as classifier:
            found[form] = classifier.forward(images)
    return found


@click.command(help=__doc__)
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--suite", "suites", multiple=True, default=("core", "hard"), show_default=True)
@click.option("--split", default="test", show_default=True)
def main(data: Path, suites: tuple[str, ...], split: str) -> None:
    """Print a table."""
    warnings.simplefilter("ignore", IllConditionedWarning)
    progress = Progress(quiet=True)
    click.echo(
        "| zoo | router | form | joint accuracy | against fp32, points | same task | same task and class |"
    )
    click.echo("|---|---|---|---|---|---|---|")
    for suite in suites:
        recipe = load_recipe(data / f"{suite}.yaml")
        for configuration in CONFIGURATIONS:
            artifact, _ = configuration.build(recipe, data, progress)
            parts = [load_labelled_images(data, task, split) for task in artifact.info.tasks]
            images = np.concatenate([part.pixel_values(recipe.preprocess) for part in parts])
            task = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
            label = np.concatenate([part.labels for part in parts])
            with tempfile.TemporaryDirectory() as work:
                found = answers(artifact, images, Path(work))
            expected = found["fp32"]
            joint = {
                form: 100 * macro_average((r.task_index == task) & (r.class_index == label), task)
                for form, r in found.items()
            }
            for form, result in found.items():
                same = result.task_index == expected.task_index
                both = same & (result.class_index == expected.class_index)
                click.echo(
                    f"| {suite} | {configuration.name} | {form} | {joint[form]:.2f}% | "
                    f"{joint[form] - joint['fp32']:+.2f} | {100 * same.mean():.2f}% | {100 * both.mean():.2f}% |"
                )


if __name__ == "__main__":
    main()
