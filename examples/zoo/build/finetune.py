"""Fine-tunes the whole vision tower for one task against a fixed head, as the paper does with CLIP.

The head holds one prototype a class: the normalised mean of the base's unit features over the class's training
images, times a logit scale. It is not centred, so that it carries a component of its task, as the text heads
of CLIP do. Gradient steps and prototypes never see the validation split; nothing here sees test images before
the last line of `finetune`, which only reports.
"""

from __future__ import annotations

import json
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from .arrays import TaskArrays
from .augment import Augmentation, augment
from .pretrain import learning_rate
from .tower import features_of, load_tower, normalise, save_tower

VALIDATION_SHARE = 0.12
GROUPED = frozenset({"animals", "letters", "icons", "sprites", "emoji"})
LOGIT_SCALE = 14.0
CHECKPOINT_EVERY = 200

console = Console(stderr=True)


@dataclass(frozen=True)
class FinetuneSettings:
    """How one tower is fine-tuned.

    Attributes:
        steps: optimizer steps
        batch: images per step
        peak_lr: highest learning rate
        warmup: steps up to the peak
        weight_decay: AdamW's, on matrices only
        ema: decay of the averaged weights, which are what is stored
        smoothing: label smoothing
        augmentation: what keeps the labels
    """

    steps: int = 450
    batch: int = 64
    peak_lr: float = 3e-4
    warmup: int = 50
    weight_decay: float = 0.0
    ema: float = 0.99
    smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)


SETTINGS = {
    "mnist": FinetuneSettings(augmentation=Augmentation(rotate=10, shear=0.12, erase=0, brightness=0.1)),
    "fashion": FinetuneSettings(augmentation=Augmentation(rotate=4, mirror=True, zoom=(0.9, 1.15))),
    "animals": FinetuneSettings(augmentation=Augmentation(rotate=10, mirror=True, zoom=(0.85, 1.25))),
    "letters": FinetuneSettings(augmentation=Augmentation(rotate=8, shear=0.12, erase=0)),
    "icons": FinetuneSettings(augmentation=Augmentation(rotate=6, erase=0.1)),
    "flags": FinetuneSettings(
        augmentation=Augmentation(
            zoom=(0.75, 1.3), stretch=0.25, rotate=10, shear=0.1, shift=0.1, brightness=0.3, saturation=0.3, hue=8
        )
    ),
    "planets": FinetuneSettings(
        augmentation=Augmentation(
            zoom=(0.95, 1.35), rotate=10, mirror=True, flip=True, brightness=0.15, saturation=0.1,
            padding="reflection", shift=0.05, erase=0.1,
        )
    ),
    "sprites": FinetuneSettings(
        augmentation=Augmentation(zoom=(0.8, 1.3), mirror=True, saturation=0.2, hue=6, brightness=0.25)
    ),
    "cards": FinetuneSettings(
        augmentation=Augmentation(
            zoom=(0.85, 1.25), rotate=5, saturation=0.3, hue=15, grey=0.1, brightness=0.25
        )
    ),
    "emoji": FinetuneSettings(augmentation=Augmentation(mirror=True, saturation=0.2, hue=8)),
}  # fmt: skip


@dataclass(frozen=True)
class Split:
    """Indices into a task's training images. Each [n] int64."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]


def split_validation(task: str, arrays: TaskArrays) -> Split:
    """Sets a share of the training images apart, the same in every run.

    Whole groups (a font, a design family, a drawing) go together where a task has many of them, so that
    validation asks for the same generalisation as the test; else every class gives its share at random.
    """
    rng = np.random.default_rng(12)
    labels = arrays.train_labels
    if task in GROUPED and arrays.train_groups is not None:
        validation = _whole_groups(arrays.train_groups, labels, rng)
    else:
        chosen = []
        for label in range(len(arrays.classes)):
            members = rng.permutation(np.flatnonzero(labels == label))
            # Classes of a few images keep most of them for training; the draw evens the shares out.
            count = int(len(members) * VALIDATION_SHARE + rng.random())
            chosen.append(members[: min(count, len(members) - 1)])
        validation = np.sort(np.concatenate(chosen))
    return Split(np.setdiff1d(np.arange(len(labels)), validation), validation)


def _whole_groups(
    groups: NDArray[np.int64], labels: NDArray[np.int64], rng: np.random.Generator
) -> NDArray[np.int64]:
    wanted = VALIDATION_SHARE * len(groups)
    sizes = np.bincount(labels)
    taken = np.zeros(len(sizes))
    chosen: list[NDArray[np.int64]] = []
    for group in rng.permutation(np.unique(groups)):
        members = np.flatnonzero(groups == group)
        after = taken + np.bincount(labels[members], minlength=len(sizes))
        # No group that is a large part of the validation set, no class that loses much of its training images.
        if len(members) > 0.25 * wanted or (after > 0.25 * sizes).any() or after.sum() > 1.02 * wanted:
            continue
        chosen.append(members)
        taken = after
    return np.sort(np.concatenate(chosen))


def as_pixels(images: NDArray[np.uint8]) -> Tensor:
    """[N, 32, 32] or [N, 32, 32, 3] -> [N, 3, 32, 32] uint8."""
    if images.ndim == 3:
        images = np.repeat(images[..., None], 3, axis=-1)
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).contiguous()


def build_head(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Class prototypes times the logit scale.

    Args:
        features: unit features of the base. [N, D]
        labels: [N] int64
        classes: number of classes

    Returns:
        rows of length `LOGIT_SCALE`. [C, D] float32
    """
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return LOGIT_SCALE * normalize(sums, dim=-1)


def accuracy(features: Tensor, head: Tensor, labels: Tensor) -> float:
    """Share of images whose highest logit is their class's."""
    return (features @ head.T).argmax(1).eq(labels).float().mean().item()


def finetune(
    task: str,
    arrays: TaskArrays,
    base: Path,
    out: Path,
    *,
    seed: int = 0,
    settings: FinetuneSettings | None = None,
    log: Path | None = None,
) -> dict[str, object]:
    """Trains one task's tower, writes it in float16 and evaluates what was written.

    Args:
        task: name of the task; chooses the settings
        arrays: its images
        base: the base tower's file
        out: folder for `checkpoints/<task>.safetensors` and `results/<task>.json`
        seed: of batches and augmentation
        settings: other settings than the task's own
        log: file for the training checkpoint, so that a run can go on

    Returns:
        the results: accuracies of the tower and of the base with the same head
    """
    report = out / "results" / f"{task}.json"
    checkpoint = out / "checkpoints" / f"{task}.safetensors"
    if report.is_file() and checkpoint.is_file():
        console.print(f"{task}: {checkpoint} is there")
        return json.loads(report.read_text(encoding="utf-8"))
    settings = settings or SETTINGS[task]
    began = time.time()
    split = split_validation(task, arrays)
    pixels, labels = as_pixels(arrays.train_images), torch.from_numpy(arrays.train_labels.astype(np.int64))
    tower = load_tower(base)
    train = torch.from_numpy(split.train)
    head = build_head(features_of(tower, pixels[train]), labels[train], len(arrays.classes))
    results: dict[str, object] = {"task": task, "seed": seed, "settings": asdict(settings)}
    results |= {f"base_{name}": value for name, value in _evaluate(tower, arrays, split, head).items()}
    state_file = log or out / "state" / f"{task}.pt"
    averaged = _train(task, tower, pixels[train], labels[train], head, settings, seed, state_file)
    save_tower(averaged, checkpoint)
    results |= _evaluate(load_tower(checkpoint), arrays, split, head)
    results["minutes"] = round((time.time() - began) / 60, 2)
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    state_file.unlink(missing_ok=True)
    console.print(
        f"{task}: validation {results['base_validation_accuracy']:.3f} -> {results['validation_accuracy']:.3f}, "
        f"test {results['base_test_accuracy']:.3f} -> {results['test_accuracy']:.3f}, {results['minutes']} min"
    )
    return results


def _train(
    task: str,
    tower: torch.nn.Module,
    pixels: Tensor,
    labels: Tensor,
    head: Tensor,
    settings: FinetuneSettings,
    seed: int,
    state_file: Path,
) -> torch.nn.Module:
    matrices = [value for value in tower.parameters() if value.ndim > 1]
    vectors = [value for value in tower.parameters() if value.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.peak_lr, betas=(0.9, 0.98), fused=True)
    averaged = deepcopy(tower)
    start = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        tower.load_state_dict(state["tower"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    tower.train()
    running = 0.0
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.warmup, settings.peak_lr)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        rows = torch.randint(len(labels), (settings.batch,), generator=generator)
        images = augment(pixels[rows], settings.augmentation, generator)
        features = normalize(tower(normalise(images)), dim=-1)
        loss = cross_entropy(features @ head.T, labels[rows], label_smoothing=settings.smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tower.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for mean, value in zip(averaged.parameters(), tower.parameters(), strict=True):
                mean.lerp_(value, 1 - settings.ema)
        running = loss.item() if step == start else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % CHECKPOINT_EVERY == 0:
            console.print(f"{task}: step {step + 1}/{settings.steps} loss {running:.3f}")
            state = {"tower": tower.state_dict(), "averaged": averaged.state_dict(), "step": step + 1}
            state_file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state | {"optimizer": optimizer.state_dict()}, state_file.with_suffix(".partial"))
            state_file.with_suffix(".partial").replace(state_file)
    return averaged


def _evaluate(tower: torch.nn.Module, arrays: TaskArrays, split: Split, head: Tensor) -> dict[str, float]:
    validation_labels = torch.from_numpy(arrays.train_labels[split.validation].astype(np.int64))
    test_labels = torch.from_numpy(arrays.test_labels.astype(np.int64))
    validation = features_of(tower, as_pixels(arrays.train_images[split.validation]))
    test = features_of(tower, as_pixels(arrays.test_images))
    return {
        "validation_accuracy": accuracy(validation, head, validation_labels),
        "test_accuracy": accuracy(test, head, test_labels),
    }
