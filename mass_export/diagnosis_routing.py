"""Signatures of failure that show when images are routed. Each check takes `Routes` and says what it found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mass_export.datasets import load_labelled_images
from mass_export.diagnosis_report import Finding
from mass_export.diagnosis_weights import several_tasks_merge
from mass_export.image_pool import load_pool
from mass_export.inspection_sources import Source
from mass_export.progress import Progress
from mass_export.spec import TaskInfo
from runtime import Classifier
from runtime.prediction import joined

IMAGES_PER_TASK = 64
POOL_IMAGES = 512
COLLAPSE_SHARE = 0.95
COLLAPSE_SHARE_LABELLED = 0.5
LOST_RECALL = 0.2
CONFUSED_SHARE = 0.25
TIE_MARGIN = 0.02
TIE_SHARE = 0.5
FULL_SETS = 0.95
LOUD_HEAD_SHARE = 0.5
UNKNOWN_SHARE = 0.3
FEWEST_IMAGES = 8


@dataclass(frozen=True)
class Routes:
    """How images were routed.

    Attributes:
        tasks: names.
        truth: the task of each image; None without labels. [N] int64
        winner: the task that answers. [N] int64
        residuals: [N, T] float32
        gates: [N, T] float32
        selected: [N, T] bool
        unknown: verdicts; None where the bundle gives none. [N] bool
    """

    tasks: tuple[str, ...]
    truth: NDArray[np.int64] | None
    winner: NDArray[np.int64]
    residuals: NDArray[np.float32]
    gates: NDArray[np.float32]
    selected: NDArray[np.bool_]
    unknown: NDArray[np.bool_] | None


def routes_of_images(
    bundle: Path, data: Path | None, split: str, images: Path | None, progress: Progress
) -> Routes:
    """Route up to 64 labelled images a task, or up to 512 of a pool.

    Raises:
        DataError: there are none, or they cannot be read.
        BackendError: the bundle does not run, or its outputs are not finite.
    """
    parts, truth = [], []
    with Classifier(bundle, "cpu") as classifier:
        spec = classifier.manifest.preprocess
        if data is not None:
            for index, name in progress.track(tuple(enumerate(classifier.tasks)), "Routing images"):
                labelled = load_labelled_images(data, TaskInfo(name, classifier.classes[name]), split)
                chosen = labelled.sample(IMAGES_PER_TASK).pixel_values(spec)
                parts.append(classifier.forward(chosen))
                truth += [index] * len(chosen)
        else:
            assert images is not None
            parts.append(classifier.forward(load_pool(images, spec, POOL_IMAGES)))
        threshold = classifier.router.unknown_threshold
    result = joined(parts)
    assert result.residuals is not None
    return Routes(
        tasks=classifier.tasks,
        truth=np.array(truth, np.int64) if data is not None else None,
        winner=result.task_index,
        residuals=result.residuals,
        gates=result.gates,
        selected=result.selected,
        unknown=None if result.unknown is None or threshold is None else result.unknown > threshold,
    )


def find_collapse(routes: Routes, source: Source) -> list[Finding]:
    """One task answers (nearly) every image."""
    del source
    T = len(routes.tasks)
    shares = np.bincount(routes.winner, minlength=T) / len(routes.winner)
    top = int(shares.argmax())
    limit = COLLAPSE_SHARE
    if routes.truth is not None and T > 2:
        limit = COLLAPSE_SHARE_LABELLED
    if T < 2 or len(routes.winner) < FEWEST_IMAGES or shares[top] < limit:
        return []
    name = routes.tasks[top]
    seen = f"{name} answers {shares[top]:.0%} of {len(routes.winner)} images"
    if routes.truth is None:
        seen += "; that is right only if nearly all of them are of this task."
        severity = "warning"
    else:
        seen += f", of which {np.mean(routes.truth == top):.0%} are its own."
        severity = "problem"
    advice = (
        "mass calibrate with some images (--pool needs no labels) removes each task's mean residual. Check also that "
        "the task vectors have like lengths and router ranks, and try another routing layer (mass choose-layer)."
    )
    return [Finding("collapse", severity, (name,), seen, advice)]  # type: ignore[arg-type]


def find_lost_tasks(routes: Routes, source: Source) -> list[Finding]:
    """Tasks whose own images go to another task, or often do."""
    del source
    if routes.truth is None or len(routes.tasks) < 2:
        return []
    findings = []
    for index, name in enumerate(routes.tasks):
        went = np.bincount(routes.winner[routes.truth == index], minlength=len(routes.tasks))
        shares = went / max(1, went.sum())
        others = np.where(np.arange(len(shares)) == index, 0, shares)
        to = int(others.argmax())
        if went.sum() < FEWEST_IMAGES or (shares[index] >= LOST_RECALL and others[to] <= CONFUSED_SHARE):
            continue
        lost = shares[index] < LOST_RECALL
        seen = (
            f"Of {went.sum()} images of {name}, {shares[index]:.0%} are routed to it and {others[to]:.0%} to "
            f"{routes.tasks[to]}."
        )
        advice = "mass calibrate --task-images with some images of both tasks"
        advice += "; check that the checkpoint is of this task." if lost else "; or make the two one task."
        severity = "problem" if lost else "warning"
        findings.append(Finding("lost_tasks", severity, (name, routes.tasks[to]), seen, advice))  # type: ignore[arg-type]
    return findings


def find_ties(routes: Routes, source: Source) -> list[Finding]:
    """Routes that are decided by next to nothing."""
    del source
    if len(routes.tasks) < 2:
        return []
    ordered = np.sort(routes.residuals.astype(np.float64), axis=1)
    spread = float(np.median(ordered[:, -1] - ordered[:, 0]))
    ties = ordered[:, 1] - ordered[:, 0] <= TIE_MARGIN * spread
    flat = spread <= 1e-6 * float(np.abs(ordered).mean() + 1e-30)
    share = 1.0 if flat else float(ties.mean())
    if share <= TIE_SHARE:
        return []
    seen = f"In {share:.0%} of the images the two best residuals are (nearly) equal."
    advice = (
        "The routing layer does not see what tells the tasks apart: try another one (mass choose-layer) or router: "
        "default; look for tasks that were given twice; calibrate with images."
    )
    return [Finding("ties", "warning", (), seen, advice)]


def find_set_sizes(routes: Routes, source: Source) -> list[Finding]:
    """Sets that are always as large as they may be."""
    if not several_tasks_merge(source):
        return []
    sizes = routes.selected.sum(axis=1)
    cap = len(routes.tasks)
    if source.router["mode"] == "topk":
        cap = min(cap, int(source.router["max_tasks"]))
    full = float(np.mean(sizes == cap))
    if full < FULL_SETS:
        return []
    seen = f"{full:.0%} of the images get {cap} tasks, as many as they may: the gates hardly differ."
    advice = "Raise the threshold or lower the temperature: each further task of a set costs time and blurs the answer."
    return [Finding("set_sizes", "warning", (), seen, advice)]


def find_loud_heads(routes: Routes, source: Source) -> list[Finding]:
    """In sets of several tasks one head answers whatever the gates say."""
    del source
    several = routes.selected.sum(axis=1) > 1
    against = several & (routes.winner != routes.gates.argmax(axis=1))
    if several.sum() < FEWEST_IMAGES or against.sum() <= LOUD_HEAD_SHARE * several.sum():
        return []
    counts = np.bincount(routes.winner[against], minlength=len(routes.tasks))
    top = int(counts.argmax())
    if counts[top] <= LOUD_HEAD_SHARE * against.sum():
        return []
    name = routes.tasks[top]
    seen = (
        f"In {against.sum()} of {several.sum()} sets of several tasks another task answers than the one with the "
        f"largest gate, in {counts[top]} of them {name}: its head is louder than the others."
    )
    advice = (
        "Scale the heads alike (class vectors of one mean length), or cap sets at one task (max_tasks: 1)."
    )
    return [Finding("loud_heads", "warning", (name,), seen, advice)]


def find_unknown(routes: Routes, source: Source) -> list[Finding]:
    """Many images that no task explains."""
    del source
    if routes.unknown is None or routes.unknown.mean() <= UNKNOWN_SHARE:
        return []
    seen = f"{routes.unknown.mean():.0%} of the images are of no known task, says the calibrated score."
    advice = "They look unlike those of the calibration: calibrate with images as they come in use."
    return [Finding("unknown", "warning", (), seen, advice)]


ROUTING_CHECKS: Mapping[str, Callable[[Routes, Source], list[Finding]]] = {
    "collapse": find_collapse,
    "lost_tasks": find_lost_tasks,
    "ties": find_ties,
    "set_sizes": find_set_sizes,
    "loud_heads": find_loud_heads,
    "unknown": find_unknown,
}
