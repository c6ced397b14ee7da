"""Writes the zoo's committed files from what training left in the cache.

Towers, heads and results come from `finetune`; the test and validation samples are drawn here, stratified and
with a fixed seed, and the accuracy on the committed test sample is measured on the committed files themselves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from .arrays import TaskArrays
from .finetune import accuracy, as_pixels, build_head, split_validation
from .tower import CONFIG, features_of, load_tower

CORE = ("mnist", "fashion", "animals", "flags", "planets", "sprites", "cards", "icons")
HARD = (*CORE, "letters", "emoji")
TEST_IMAGES, VALIDATION_IMAGES = 600, 300


def package_zoo(arrays: Mapping[str, TaskArrays], base_file: Path, trained: Path, zoo: Path) -> None:
    """Writes heads, checkpoints, classes, samples, recipes and accuracies.

    Args:
        arrays: each task's images
        base_file: the base tower
        trained: folder with `checkpoints/` and `results/`
        zoo: the folder to write
    """
    zoo.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(base_file, zoo / "base.safetensors")
    if not (zoo / CONFIG.name).is_file():
        shutil.copyfile(CONFIG, zoo / CONFIG.name)
    base = load_tower(zoo / "base.safetensors")
    heads, report = {}, {}
    for task in arrays:
        images = arrays[task]
        split = split_validation(task, images)
        train = torch.from_numpy(split.train)
        features = features_of(base, as_pixels(images.train_images)[train])
        head = build_head(features, torch.from_numpy(images.train_labels)[train], len(images.classes))
        heads[f"{task}.weight"] = head.contiguous()
        (zoo / "classes").mkdir(exist_ok=True)
        (zoo / "classes" / f"{task}.txt").write_text("\n".join(images.classes) + "\n", encoding="utf-8")
        test = stratified_sample(images.test_labels, TEST_IMAGES)
        chosen = stratified_sample(images.train_labels[split.validation], VALIDATION_IMAGES)
        validation = split.validation[chosen]
        write_sample(zoo / "data" / task / "test.npz", images.test_images[test], images.test_labels[test])
        write_sample(
            zoo / "data" / task / "val.npz", images.train_images[validation], images.train_labels[validation]
        )
        results = trained / "results" / f"{task}.json"
        if not results.is_file():
            continue
        checkpoint = zoo / "checkpoints" / f"{task}.safetensors"
        checkpoint.parent.mkdir(exist_ok=True)
        shutil.copyfile(trained / "checkpoints" / f"{task}.safetensors", checkpoint)
        report[task] = _accuracies(json.loads(results.read_text(encoding="utf-8")), images)
        report[task] |= _sample_accuracies(zoo, task, checkpoint, head)
    save_file(heads, zoo / "heads.safetensors", metadata={"format": "pt"})
    (zoo / "heads.safetensors").chmod(0o644)
    (zoo / "accuracy.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for name, tasks in (("core", CORE), ("hard", HARD)):
        (zoo / f"{name}.yaml").write_text(recipe(tasks), encoding="utf-8")


def stratified_sample(labels: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Indices of `size` images (or all) with each class's share kept as nearly as whole images allow."""
    if len(labels) <= size:
        return np.arange(len(labels))
    rng = np.random.default_rng(600)
    order = rng.permutation(len(labels))
    # Position within the class, scaled to 0 .. 1: sorting by it interleaves the classes evenly.
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = order[labels[order] == label]
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.sort(np.argsort(place)[:size])


def write_sample(path: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Writes images and labels as a compressed npz without pickles; the same input gives the same bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=images, labels=labels.astype(np.int64))


def recipe(tasks: tuple[str, ...]) -> str:
    """A merge recipe for some of the tasks."""
    fields = {
        "model": "model_config.json",
        "base": "base.safetensors",
        "rank_ratio": 0.125,
        "compose": "tsvm",
        "router": "default",
        "tasks": [
            {
                "name": task,
                "checkpoint": f"checkpoints/{task}.safetensors",
                "head": {"file": "heads.safetensors", "tensor": f"{task}.weight"},
                "classes": f"classes/{task}.txt",
            }
            for task in tasks
        ],
    }
    return yaml.safe_dump(fields, sort_keys=False)


def _accuracies(results: Mapping[str, object], images: TaskArrays) -> dict[str, object]:
    return {
        "classes": len(images.classes),
        "train_images": len(images.train_labels),
        "test_images": len(images.test_labels),
        "test_accuracy": round(float(results["test_accuracy"]), 4),
        "base_test_accuracy": round(float(results["base_test_accuracy"]), 4),
        "validation_accuracy": round(float(results["validation_accuracy"]), 4),
        "base_validation_accuracy": round(float(results["base_validation_accuracy"]), 4),
        "steps": results["settings"]["steps"],
        "seed": results["seed"],
    }


def _sample_accuracies(zoo: Path, task: str, checkpoint: Path, head: torch.Tensor) -> dict[str, float]:
    with np.load(zoo / "data" / task / "test.npz", allow_pickle=False) as file:
        images, labels = as_pixels(file["images"]), torch.from_numpy(file["labels"])
    towers = {"test_sample_accuracy": checkpoint, "base_test_sample_accuracy": zoo / "base.safetensors"}
    return {
        name: round(accuracy(features_of(load_tower(path), images), head, labels), 4)
        for name, path in towers.items()
    }


def committed_bytes(zoo: Path) -> int:
    """Size of all committed arrays and weights."""
    return sum(
        path.stat().st_size for pattern in ("**/*.safetensors", "**/*.npz") for path in zoo.glob(pattern)
    )


def committed_head(zoo: Path, task: str) -> torch.Tensor:
    """One task's committed head. [C, D] float32."""
    return load_file(zoo / "heads.safetensors")[f"{task}.weight"]
