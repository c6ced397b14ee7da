"""The rows that MASS is compared with, all with the task given: what needs no router.

- `finetuned`: each task's own model, T models to store; the ceiling.
- `base`: the pretrained model with each task's head; the floor.
- `task_arithmetic`: base + coefficient times the sum of task vectors (Ilharco et al., arXiv 2212.04089).
- `tsvm`: the TSV-M merge alone, rank 1/T of every matrix (Gargiulo et al., arXiv 2412.00081).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mass_export.checkpoints import load_checkpoint
from mass_export.datasets import DEFAULT_SPLIT, LabelledImages, find_images, load_labelled_images
from mass_export.errors import RecipeError
from mass_export.heads import Head, load_head
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.recipe import Recipe
from mass_export.spec import MergeSettings, TaskInfo, VisionSpec
from mass_export.task_factors import load_task_tower
from mass_export.task_vectors import compute_task_vector
from mass_export.vit import encode
from runtime.bundle import Manifest, PreprocessSpec
from runtime.checksums import sha256_of_file

# Without validation images: what arXiv 2212.04089 (section 4) found to do well on eight image tasks.
DEFAULT_COEFFICIENT = 0.3
COEFFICIENTS = tuple(step / 10 for step in range(1, 11))
COEFFICIENT_IMAGES = 50  # validation images per task that the choice looks at

TSVM = MergeSettings(base_merge="tsvm", compose="tsvm", vectors="mean", head_choice="max")
LABELS = {
    "finetuned": "Fine-tuned models, one per task",
    "base": "Pretrained base",
    "task_arithmetic": "Task arithmetic",
    "tsvm": "TSV-M merge alone",
}


@dataclass(frozen=True)
class Baseline:
    """Accuracy of one way to answer when the task is given.

    Attributes:
        name: a key of `LABELS`.
        tasks: accuracy by task.
        settings: what was chosen, and how.
    """

    name: str
    tasks: Mapping[str, float]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """For tables."""
        return LABELS[self.name]

    @property
    def accuracy(self) -> float:
        """Average over tasks."""
        return sum(self.tasks.values()) / len(self.tasks)

    def to_dict(self, finetuned: Baseline) -> dict[str, Any]:
        """Plain data for JSON; normalised by the average of the fine-tuned models."""
        return {
            "label": self.label,
            "known_task_accuracy": self.accuracy,
            "normalized_known_task_accuracy": self.accuracy / finetuned.accuracy
            if finetuned.accuracy
            else None,
            "tasks": dict(self.tasks),
            "settings": dict(self.settings),
        }


@torch.inference_mode()
def head_accuracy(
    params: Mapping[str, Tensor],
    head: Head,
    images: LabelledImages,
    vision: VisionSpec,
    preprocess: PreprocessSpec,
) -> float:
    """Share of images whose class a tower and a head give right."""
    right = 0
    for pixel_values, labels in images.batches(preprocess):
        logits = encode(params, torch.from_numpy(pixel_values), vision) @ head.weight.T
        if head.bias is not None:
            logits = logits + head.bias
        right += int((logits.argmax(dim=1).numpy() == labels).sum())
    return right / len(images)


def evaluate_baselines(
    recipe: Recipe, data: Path, *, split: str = DEFAULT_SPLIT, choose_on: str = "val", progress: Progress
) -> tuple[Baseline, ...]:
    """Accuracy of every baseline on labelled images.

    Args:
        recipe: names the checkpoints and heads.
        data: directory of labelled images, see `mass_export.datasets`.
        split: to report on.
        choose_on: split on which task arithmetic's coefficient is chosen; without such images it is 0.3.
        progress: where to show it.

    Returns:
        the rows, the fine-tuned models first.

    Raises:
        MassExportError: a checkpoint or the images of a task are missing or do not fit.
    """
    infos = [TaskInfo(task.name, task.classes) for task in recipe.tasks]
    heads = [load_head(t.head, t.name, t.classes, recipe.vision.embed_dim) for t in recipe.tasks]
    base = load_checkpoint(recipe.base, recipe.vision, allow_pickle=recipe.allow_pickle)
    delta_sum = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in base.items()}
    own: dict[str, float] = {}
    images = {info.name: load_labelled_images(data, info, split) for info in infos}
    for task, head in zip(progress.track(recipe.tasks, "Fine-tuned models"), heads, strict=True):
        params = load_task_tower(task, recipe, base)
        own[task.name] = head_accuracy(params, head, images[task.name], recipe.vision, recipe.preprocess)
        for name, delta in compute_task_vector(params, base).items():
            delta_sum[name] += delta

    def accuracies(params: Mapping[str, Tensor], chosen: Mapping[str, LabelledImages]) -> dict[str, float]:
        return {
            info.name: head_accuracy(params, head, chosen[info.name], recipe.vision, recipe.preprocess)
            for info, head in zip(infos, heads, strict=True)
        }

    merged = merge(tsvm_recipe(recipe), progress).merged
    coefficient = DEFAULT_COEFFICIENT
    settings: dict[str, Any] = {"coefficient": coefficient, "chosen_on": None}
    if all(find_images(data, info.name, choose_on) for info in infos):
        choice = {
            info.name: load_labelled_images(data, info, choose_on).sample(COEFFICIENT_IMAGES)
            for info in infos
        }
        scored = [
            (sum(accuracies(add_scaled(base, delta_sum, candidate), choice).values()), -candidate)
            for candidate in progress.track(COEFFICIENTS, "Task arithmetic's coefficient")
        ]
        coefficient = -max(scored)[1]
        settings = {"coefficient": coefficient, "chosen_on": choose_on}
    return (
        Baseline("finetuned", own),
        Baseline("base", accuracies(base, images)),
        Baseline("task_arithmetic", accuracies(add_scaled(base, delta_sum, coefficient), images), settings),
        Baseline("tsvm", accuracies(merged, images), {"rank_ratio": 1 / len(recipe.tasks)}),
    )


def find_recipe(manifest: Manifest, data: Path) -> Path | None:
    """The recipe in the data directory that a bundle was merged from, by its sha256; None if there is none."""
    wanted = manifest.provenance.get("recipe", {}).get("sha256")
    candidates = sorted([*data.glob("*.yaml"), *data.glob("*.yml")])
    found = [path for path in candidates if sha256_of_file(path) == wanted]
    return found[0] if found else None


def require_same_tasks(recipe: Recipe, manifest: Manifest) -> None:
    """Refuse to compare a bundle with the models of other tasks.

    Raises:
        RecipeError: names or classes differ.
    """
    in_recipe = {task.name: task.classes for task in recipe.tasks}
    in_bundle = {task.name: task.classes for task in manifest.tasks}
    if in_recipe != in_bundle:
        names = sorted(name for name in in_recipe | in_bundle if in_recipe.get(name) != in_bundle.get(name))
        raise RecipeError(
            f"{recipe.path}: not the recipe of this bundle: the task(s) {', '.join(names)} are missing in one of "
            "them or have other classes there."
        )


def tsvm_recipe(recipe: Recipe) -> Recipe:
    """The recipe with TSV-M's own settings, whatever it says itself."""
    ratio = 1 / len(recipe.tasks)
    tasks = tuple(dataclasses.replace(task, rank_ratio=ratio, rank=None) for task in recipe.tasks)
    return dataclasses.replace(
        recipe, tasks=tasks, rank_ratio=ratio, rank=None, rank_budget=None, merge=TSVM, base_merge_file=None
    )


def add_scaled(
    base: Mapping[str, Tensor], delta_sum: Mapping[str, Tensor], coefficient: float
) -> dict[str, Tensor]:
    """Task arithmetic: base + coefficient * sum of task vectors, float32."""
    return {name: (p.double() + coefficient * delta_sum[name]).float() for name, p in base.items()}


def baselines_to_dict(rows: Sequence[Baseline]) -> dict[str, Any]:
    """Plain data for JSON, by name; the first row is that of the fine-tuned models."""
    return {row.name: row.to_dict(rows[0]) for row in rows}
