"""Teaching the router with a few images a task, no class labels, without gradients.

A linear discriminant with shrunk covariance names the task. It reads all mlp inputs up to a block that is early enough
for the first pass to get shorter, and where that saves more, image by image up to the first block that is sure
(`mass_export.early_stops`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, Calibration
from mass_export.calibration_features import joined, residual_statistics, tap_features
from mass_export.discriminant import (
    cross_validated_posterior,
    fit_confidence_scale,
    fit_discriminant,
    macro_accuracy,
    with_absent_tasks,
)
from mass_export.early_stops import choose_stops, no_stops
from mass_export.errors import DataError
from mass_export.known_images import dull_features, known_images, with_known_images
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Tap
from runtime.verification import two_best

# A shorter first pass is worth this much routing accuracy in cross-validation.
LAYER_TOLERANCE = 0.005
# The share of calibration images whose margin counts as unsure, and the prior's weight against the heads' confidence.
UNSURE_SHARE = 0.05
VERIFY_PRIOR = 0.1


@dataclass(frozen=True)
class LayerTrial:
    """Cross-validated routing accuracy of the discriminant that reads the mlp inputs up to a tap."""

    tap: Tap
    accuracy: float


def calibrate_task_images(
    artifact: Artifact,
    images: Mapping[str, NDArray[np.float32]],
    *,
    tap: Tap | None = None,
    verify: bool = True,
    stop_early: bool = True,
    residual_weight: float = 0.0,
    sources: Mapping[str, str] | None = None,
    progress: Progress,
) -> tuple[Artifact, tuple[LayerTrial, ...]]:
    """Fit the linear discriminant on a few images a task.

    It reads the mlp inputs up to a block: the earliest whose cross-validated routing accuracy comes within half a
    point of the best, unless `tap` says which. Tasks without images keep the residuals on a common scale: their
    discriminant is that of an average task, and the residual score decides between them and the rest.

    Args:
        artifact: to calibrate; an older calibration is replaced.
        images: normalised images by task, at least two each. [n_i, 3, H, W]
        tap: the last one that the discriminant reads.
        verify: run the two best tasks where the margin is below that of 5% of the images, as cross-validation sees
            them; the heads' confidence then counts ten times as much as the posterior.
        stop_early: let images stop at earlier blocks that are sure of them, where all tasks have images.
        residual_weight: weight of the calibrated residuals beside the discriminant.
        sources: where the images come from, for the record.
        progress: where to show it.

    Returns:
        the calibrated artifact, and the trial of every tap.
    """
    names = [task.name for task in artifact.info.tasks]
    _require_task_images(names, images)
    artifact = artifact.without_calibration()
    given = [name for name in names if name in images]
    labels = np.repeat(np.arange(len(given)), [len(images[name]) for name in given])
    pixel_values = np.concatenate([images[name] for name in given])
    depth = artifact.info.vision.layers if tap is None else tap.layer + 1
    taps = tuple(Tap(i, "mlp") for i in range(depth))
    features = tap_features(artifact, pixel_values, sorted({*taps, *artifact.info.taps()}), progress)
    posteriors = {
        last: cross_validated_posterior(joined(features, taps[: last.layer + 1]), labels)
        for last in (taps if tap is None else taps[-1:])
    }
    trials = tuple(LayerTrial(last, macro_accuracy(p, labels)) for last, p in posteriors.items())
    best = max(trial.accuracy for trial in trials)
    chosen = next(trial.tap for trial in trials if trial.accuracy >= best - LAYER_TOLERANCE)
    incomplete = len(given) < len(names)
    early = no_stops(posteriors[chosen], chosen)
    if stop_early and not incomplete and residual_weight == 0:
        early = choose_stops(posteriors, labels, chosen)
    chosen, read = early.last, taps[: early.last.layer + 1]
    rows = np.array([names.index(name) for name in given])

    def discriminant(last: int) -> tuple[Tensor, Tensor]:
        fitted = fit_discriminant(joined(features, taps[: last + 1]), labels)
        return with_absent_tasks(*fitted, rows, len(names))

    weight, bias = discriminant(chosen.layer)
    offset, scale = residual_statistics(artifact, features)
    info = CalibrationInfo(
        level="task_images",
        images={name: len(images[name]) for name in given},
        discriminant=read,
        residual_weight=max(residual_weight, 1.0) if incomplete else residual_weight,
        discriminant_weight=1.0,
        sources=dict(sources) if sources else None,
        router=artifact.info.router,
        stops=early.stops,
        stop_margin=early.margin,
        confidence_scale=None
        if incomplete or residual_weight
        else fit_confidence_scale(early.scores, labels),
    )
    router = artifact.info.router
    if not incomplete:  # the discriminant knows better, and needs no whole tower
        router = dataclasses.replace(router, evidence=0.0)
    if verify and router.mode == "top1" and not incomplete:
        _, margins = two_best(-early.scores)
        margin = float(np.quantile(margins, UNSURE_SHARE))
        router = dataclasses.replace(router, verify_margin=margin, verify_prior=VERIFY_PRIOR)
    artifact = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
    artifact = artifact.with_calibration(info, Calibration(offset, scale, weight, bias))
    if not incomplete:  # else images of the other tasks would be unknown
        stopped = [taps[stop] for stop in early.stops]
        dull = dull_features(artifact, pixel_values, [*stopped, chosen])
        artifact = with_known_images(artifact, chosen, features[chosen].numpy(), labels, dull[chosen])
        if early.stops:
            fitted = [discriminant(stop) for stop in early.stops]
            at_stops = [(features[tap].numpy(), dull[tap]) for tap in stopped]
            artifact = _with_early_stops(artifact, fitted, at_stops, labels)
    return artifact, trials


def _with_early_stops(
    artifact: Artifact,
    discriminants: Sequence[tuple[Tensor, Tensor]],
    features: Sequence[tuple[NDArray[np.float64], Tensor]],
    labels: NDArray[np.int64],
) -> Artifact:
    """The artifact with what its early stops know: discriminants [T, m*D], [T], features there [n, D], dull [M, D]."""
    info, calibration = artifact.info.calibration, artifact.calibration
    assert info is not None
    assert info.unknown_threshold is not None
    assert calibration is not None
    assert calibration.weight is not None
    whole = calibration.weight.shape[1]
    weights = [torch.nn.functional.pad(weight, (0, whole - weight.shape[1])) for weight, _ in discriminants]
    known = []
    for at_stop, dull in features:
        threshold, *parts = known_images(at_stop, labels, dull)
        known.append([info.unknown_threshold / threshold * part for part in parts])
    calibration = dataclasses.replace(
        calibration,
        stop_weight=torch.stack(weights),
        stop_bias=torch.stack([bias for _, bias in discriminants]),
        stop_whiten=torch.stack([whiten for whiten, _, _ in known]).float(),
        stop_centres=torch.stack([centres for _, centres, _ in known]).float(),
        stop_nothing=torch.stack([nothing for _, _, nothing in known]).float(),
    )
    return dataclasses.replace(artifact, calibration=calibration)


def _require_task_images(names: Sequence[str], images: Mapping[str, NDArray[np.float32]]) -> None:
    unknown = sorted(set(images) - set(names))
    if unknown:
        raise DataError(
            f"calibration images for unknown tasks {', '.join(unknown)}; known: {', '.join(names)}."
        )
    few = sorted(name for name, array in images.items() if len(array) < 2)
    if few or len(images) < 2:
        raise DataError(
            f"calibration needs 2 tasks with 2 images each at least; too few for {few or list(images)}."
        )
