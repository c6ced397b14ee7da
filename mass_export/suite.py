"""One recipe from checkpoints to figures, for several configurations: merge, export, verify, classify, measure."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.artifact import Artifact, read_artifact, write_artifact
from mass_export.baselines import baselines_to_dict, evaluate_baselines, tsvm_recipe
from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.datasets import DEFAULT_SPLIT, load_labelled_images
from mass_export.evaluation import evaluate_bundle
from mass_export.examples import example_answers
from mass_export.layer_choice import best_layer, score_layers, with_layer
from mass_export.merge import merge
from mass_export.onnx_export import export_bundle
from mass_export.progress import Progress
from mass_export.recipe import Recipe, load_recipe
from mass_export.router_spec import PAPER_ROUTER, RouterSettings
from mass_export.spec import TaskInfo
from mass_export.suite_curves import SAMPLED_PER_TASK, accuracy_by_rank, accuracy_by_tasks, residuals_by_block
from mass_export.verify import verify_bundle
from runtime.classifier import Classifier

POOL_IMAGES = 300
IMAGES_PER_TASK = 40
WIDER = 2.0  # where routes are as good as with images of every task, the tasks' rank is what limits accuracy
VERIFIED_IMAGES = 512
TIMED_IMAGES = 128
TIMED_REPEATS = 3
TIMED_BATCHES = (1, 32)
CURVE_BATCHES = (1, 2, 4, 8, 16, 32)  # of the default alone


@dataclass(frozen=True)
class Configuration:
    """A way to build an artifact from a recipe and, where it may look at any, validation images.

    Attributes:
        name: key in the report.
        description: one sentence for the report.
        build: recipe, data directory, progress -> artifact, and details to report.
    """

    name: str
    description: str
    build: Callable[[Recipe, Path, Progress], tuple[Artifact, dict[str, Any]]]


def build_paper(recipe: Recipe, data: Path, progress: Progress) -> tuple[Artifact, dict[str, Any]]:
    """The paper's settings; its routing layer and gates (top-k sets or top-1) are chosen on validation images."""
    recipe = dataclasses.replace(tsvm_recipe(recipe), router=PAPER_ROUTER)
    scores = score_layers(recipe, data, split="val", progress=progress)
    artifact = merge(with_layer(recipe, best_layer(scores)), progress)
    return artifact, {"layer_choice": [score.to_dict() for score in scores]}


def build_default(recipe: Recipe, data: Path, progress: Progress) -> tuple[Artifact, dict[str, Any]]:
    """The recipe as it stands; no image is looked at."""
    del data
    return merge(recipe, progress), {}


def build_pool(recipe: Recipe, data: Path, progress: Progress) -> tuple[Artifact, dict[str, Any]]:
    """The recipe's own settings, calibrated on validation images whose task and class nobody says."""
    images = np.concatenate(list(_validation_images(recipe, data).values()))
    rows = np.random.default_rng(0).permutation(len(images))[:POOL_IMAGES]
    artifact = calibrate_pool(merge(recipe, progress), images[rows], source="validation", progress=progress)
    return artifact, {"calibration_images": len(rows)}


def build_task_images(recipe: Recipe, data: Path, progress: Progress) -> tuple[Artifact, dict[str, Any]]:
    """The recipe at twice its rank, calibrated on a few validation images of each task."""
    tasks = tuple(
        task
        if task.rank_ratio is None
        else dataclasses.replace(task, rank_ratio=min(1.0, WIDER * task.rank_ratio))
        for task in recipe.tasks
    )
    recipe = dataclasses.replace(recipe, tasks=tasks)
    images = {
        name: array[np.random.default_rng(0).permutation(len(array))[:IMAGES_PER_TASK]]
        for name, array in _validation_images(recipe, data).items()
    }
    artifact, trials = calibrate_task_images(merge(recipe, progress), images, progress=progress)
    return artifact, {
        "calibration_images": {name: len(array) for name, array in images.items()},
        "trials": [{"layer": trial.tap.layer, "routing_accuracy": trial.accuracy} for trial in trials],
    }


def _validation_images(recipe: Recipe, data: Path) -> dict[str, NDArray[np.float32]]:
    """Normalised validation images by task."""
    return {
        task.name: load_labelled_images(data, TaskInfo(task.name, task.classes), "val").pixel_values(
            recipe.preprocess
        )
        for task in recipe.tasks
    }


CONFIGURATIONS = (
    Configuration("paper", "The paper's settings, routing layer chosen on validation images.", build_paper),
    Configuration("default", "The recipe's own settings; no image is looked at.", build_default),
    Configuration("pool", "Calibrated on 300 unlabelled validation images.", build_pool),
    Configuration(
        "task_images",
        "Calibrated on 40 validation images of each task; task vectors of twice the recipe's rank.",
        build_task_images,
    ),
)


def run_suite(
    recipe_path: Path,
    data: Path,
    out: Path,
    *,
    configurations: Sequence[Configuration] = CONFIGURATIONS,
    split: str = DEFAULT_SPLIT,
    progress: Progress,
) -> dict[str, Any]:
    """Run every configuration of a recipe and its baselines; artifacts and bundles are left in `out`.

    Args:
        recipe_path: the recipe.
        data: directory of labelled images, see `mass_export.datasets`.
        out: directory for artifacts and bundles.
        configurations: what to compare.
        split: to report on; validation images (`val`) make all choices.
        progress: where to show it.

    Returns:
        Plain data for JSON: `baselines`, and under its name each configuration's scores, parity, sizes, times.

    Raises:
        MassExportError: an input is missing or does not fit, or a bundle differs from the eager model.
    """
    recipe = load_recipe(recipe_path)
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    baselines = evaluate_baselines(recipe, data, split=split, progress=progress)
    report: dict[str, Any] = {
        "recipe": str(recipe_path),
        "split": split,
        "tasks": {task.name: len(task.classes) for task in recipe.tasks},
        "baselines": baselines_to_dict(baselines),
        "baselines_time_s": time.perf_counter() - start,
        "configurations": [configuration.name for configuration in configurations],
    }
    for configuration in configurations:
        report[configuration.name] = _run(
            configuration, recipe, data, out, split, baselines[0].tasks, progress
        )
    start = time.perf_counter()
    report["curves"] = _curves(recipe, data, split, baselines[0].tasks, out, report, progress)
    report["curves_time_s"] = time.perf_counter() - start
    return report


def _curves(
    recipe: Recipe,
    data: Path,
    split: str,
    finetuned: Mapping[str, float],
    out: Path,
    report: Mapping[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """What the configurations that were run do at other ranks and with fewer tasks; the paper's layer stays."""
    builds: dict[str, Callable[[Recipe], Artifact]] = {}
    blocks, latency = {}, {}
    if "paper" in report:
        router = RouterSettings(**report["paper"]["settings"]["router"])
        builds["paper"] = lambda r: merge(dataclasses.replace(tsvm_recipe(r), router=router), progress)
    if "default" in report:
        builds["default"] = lambda r: merge(r, progress)
        artifact = read_artifact(out / "default.safetensors")
        if artifact.info.router.site != "both":
            blocks = residuals_by_block(recipe, artifact, data, split, progress)
        images = real_images(recipe, data, split, TIMED_IMAGES)
        latency = latency_ms(out / "default", images, recipe.tasks[0].name, CURVE_BATCHES)
    return {
        "ranks": accuracy_by_rank(recipe, data, split, finetuned, progress) if "default" in report else [],
        "tasks": accuracy_by_tasks(recipe, data, split, finetuned, builds, progress),
        "residuals": blocks,
        "latency_ms": latency,
        "images_per_task": SAMPLED_PER_TASK,
    }


def _run(
    configuration: Configuration,
    recipe: Recipe,
    data: Path,
    out: Path,
    split: str,
    finetuned: Mapping[str, float],
    progress: Progress,
) -> dict[str, Any]:
    artifact_path, bundle = out / f"{configuration.name}.safetensors", out / configuration.name
    clock = _Clock()
    artifact, details = configuration.build(recipe, data, progress)
    clock.lap("choose_and_merge_s")
    write_artifact(artifact_path, artifact)
    export_bundle(artifact, artifact_path, bundle, verify=False, progress=progress)
    clock.lap("export_s")
    images = real_images(recipe, data, split, VERIFIED_IMAGES)
    parity = verify_bundle(artifact, bundle, images, progress=progress)
    clock.lap("verify_s")
    evaluation = evaluate_bundle(bundle, data, split=split, finetuned=finetuned, progress=progress)
    clock.lap("classify_s")
    return {
        "description": configuration.description,
        **evaluation.to_dict(),
        "settings": {
            "router": dataclasses.asdict(artifact.info.router),
            "merge": dataclasses.asdict(artifact.info.merge),
            "rank_ratios": list(artifact.info.rank_ratios),
        },
        **details,
        "parity": {"real_images": len(images), **parity.to_dict()},
        "sizes": sizes(artifact, artifact_path, bundle),
        "times": {
            **clock.laps,
            "latency_ms": latency_ms(bundle, images[:TIMED_IMAGES], recipe.tasks[0].name),
        },
        "examples": example_answers(bundle, data, split),
        "commands": {
            "scores": f"mass eval --bundle {bundle} --data {data} --recipe {recipe.path} --split {split}",
            "layer_choice": f"mass choose-layer {recipe.path} --data {data} --split val",
            "export": f"mass export --artifact {artifact_path} --out {bundle}",
        },
    }


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now


def real_images(recipe: Recipe, data: Path, split: str, count: int) -> NDArray[np.float32]:
    """The same number of images of every task, `count` together if there are so many. [B, 3, H, W]"""
    infos = [TaskInfo(task.name, task.classes) for task in recipe.tasks]
    each = -(-count // len(infos))
    parts = [
        load_labelled_images(data, info, split).sample(each).pixel_values(recipe.preprocess) for info in infos
    ]
    return np.concatenate(parts)[:count]


def sizes(artifact: Artifact, artifact_path: Path, bundle: Path) -> dict[str, int]:
    """Bytes: one tower and T towers in float32, the artifact, and the bundle that serves all tasks."""
    one = sum(4 * parameter.numel() for parameter in artifact.base.values())
    return {
        "one_model_bytes": one,
        "all_models_bytes": one * len(artifact.tasks),
        "artifact_bytes": artifact_path.stat().st_size,
        "bundle_bytes": sum(file.stat().st_size for file in bundle.iterdir()),
    }


def latency_ms(
    bundle: Path, pixel_values: NDArray[np.float32], task: str, batches: Sequence[int] = TIMED_BATCHES
) -> dict[str, dict[str, float]]:
    """Milliseconds per image on the CPU, by batch size, with the task unknown and given; best of three runs."""
    latencies: dict[str, dict[str, float]] = {}
    with Classifier(bundle, provider="cpu") as classifier:
        for batch in batches:
            runs = {"unknown": None, "given": [task]}
            latencies[str(batch)] = {
                known: min(_seconds(classifier, pixel_values, batch, tasks) for _ in range(TIMED_REPEATS))
                * 1000
                / len(pixel_values)
                for known, tasks in runs.items()
            }
    return latencies


def _seconds(
    classifier: Classifier, pixel_values: NDArray[np.float32], batch: int, tasks: list[str] | None
) -> float:
    start = time.perf_counter()
    for first in range(0, len(pixel_values), batch):
        classifier.forward(pixel_values[first : first + batch], tasks=tasks)
    return time.perf_counter() - start
