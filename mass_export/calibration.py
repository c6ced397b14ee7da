"""Teaching the router with images but without gradients: closed forms on the first pass' features.

Three levels, by what one may know:

- `synthetic`: nothing. Images made from noise show which residuals are small for any input at all.
- `pool`: unlabelled images. The per-task bias of the residuals at each tap is removed: of those relative to the
  feature's length as far as it exceeds what images differ by, of others with their spread unless heads speak. Heads
  that were not trusted are heard where they agree with the residuals. The router's own answers then serve as labels,
  once, for the discriminant below.
- `task_images`: a few images a task, no class labels. A linear discriminant with shrunk covariance names the task. It
  reads all mlp inputs up to a block that is early enough for the first pass to get shorter, and where that saves more,
  image by image up to the first block that is sure (`mass_export.early_stops`).

Images also show what known ones look like: at the deepest place that the router reads, the distance to the nearest
task's mean, in units of the spread within tasks, says how unknown an image is, the more so if it lies
nearer to dull images.

Statistics are computed in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, Calibration
from mass_export.discriminant import (
    cross_validated_distances,
    cross_validated_posterior,
    fit_confidence_scale,
    fit_discriminant,
    fit_known_images,
    macro_accuracy,
)
from mass_export.early_stops import choose_stops, no_stops
from mass_export.errors import DataError
from mass_export.head_evidence import EVIDENCE_WEIGHT, HEARD_WEIGHT, LEAST_AGREEMENT, agreement
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Tap, default_routing_layer
from mass_export.routing import RELATIVE_SCALE, feature_length, projection_residuals, routing_feature
from mass_export.synthetic_images import dull_images
from mass_export.vit import tap_tokens
from runtime.verification import two_best

BATCH = 64
# A shorter first pass is worth this much routing accuracy in cross-validation.
LAYER_TOLERANCE = 0.005
# Weight of a discriminant whose labels are the router's own answers, beside these answers' score.
PSEUDO_WEIGHT = 0.2
# The share of calibration images whose margin counts as unsure, and the prior's weight against the heads' confidence.
UNSURE_SHARE = 0.05
VERIFY_PRIOR = 0.1
# The share of images like those of the calibration that may be called unknown.
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class LayerTrial:
    """Cross-validated routing accuracy of the discriminant that reads the mlp inputs up to a tap."""

    tap: Tap
    accuracy: float


@torch.inference_mode()
def tap_features(
    artifact: Artifact, pixel_values: NDArray[np.float32], taps: Sequence[Tap], progress: Progress
) -> dict[Tap, Tensor]:
    """Routing features of the first pass: [n, 3, H, W] -> [n, D] float64 by tap; no taps, no pass."""
    params, info = artifact.merged or artifact.base, artifact.info
    parts: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    starts = list(range(0, len(pixel_values), BATCH)) if taps else []
    for start in progress.track(starts, "Features of the calibration images"):
        batch = torch.from_numpy(pixel_values[start : start + BATCH])
        for tap, tokens in tap_tokens(params, batch, info.vision, taps).items():
            parts[tap].append(routing_feature(tokens, info.router.token).double())
    return {tap: torch.cat(rows) for tap, rows in parts.items()}


def calibrate_pool(
    artifact: Artifact,
    pixel_values: NDArray[np.float32],
    *,
    synthetic: bool = False,
    pseudo_labels: bool = True,
    hear_heads: bool = True,
    source: str = "",
    progress: Progress,
) -> Artifact:
    """Remove the per-task bias of the residuals on unlabelled images, and learn from the router's own answers.

    Args:
        artifact: to calibrate; an older calibration is replaced.
        pixel_values: normalised images, at least two. [n, 3, H, W]
        synthetic: whether they were made by `synthetic_images`; these have no tasks to learn from.
        pseudo_labels: fit a discriminant at three quarters of the depth to what the router says of the images.
        hear_heads: where the router does without head evidence, use it if it agrees with the residuals on the images.
        source: where they come from, for the record.
        progress: where to show it.
    """
    if len(pixel_values) < 2:
        raise DataError(f"calibration needs at least 2 images, got {len(pixel_values)}.")
    artifact = artifact.without_calibration()
    before, learn = artifact.info.router, pseudo_labels and not synthetic
    if learn and hear_heads and before.standardize == "length" and not before.evidence:
        artifact = _with_heads_heard(artifact, pixel_values, progress)
    known = None if synthetic else _deepest(artifact)
    taps = (Tap(default_routing_layer(artifact.info.vision.layers), "mlp"),) if learn else ()
    # Evidence has a scale of its own, and shares of the feature's length are on one scale already.
    relative = artifact.info.router.standardize == "length" and not synthetic
    removed = () if artifact.info.router.evidence and not relative else artifact.info.taps()
    read = {*taps, *removed} if known is None else {*taps, *removed, known}
    features = tap_features(artifact, pixel_values, sorted(read), progress)
    shape = (len(artifact.info.taps()), len(artifact.tasks))
    offset, scale = torch.zeros(shape), torch.ones(shape)
    if relative:
        offset = _shrunk_bias(artifact, features)
    elif removed:
        offset, scale = _residual_statistics(artifact, features)
    info = CalibrationInfo(
        level="synthetic" if synthetic else "pool",
        images={"pool": len(pixel_values)},
        sources={"pool": source} if source else None,
        router=before,
    )
    calibrated = _calibrated(artifact, info, Calibration(offset, scale))
    if known is None:
        return calibrated
    answers = _own_answers(calibrated, pixel_values, progress)
    rows = np.flatnonzero(np.bincount(answers)[answers] >= 2)
    if not len(rows):
        return calibrated
    given, labels = np.unique(answers[rows], return_inverse=True)
    dull = _dull_features(artifact, pixel_values, [known])
    calibrated = _with_known_images(calibrated, known, features[known].numpy()[rows], labels, dull[known])
    if not learn or len(given) < 2:
        return calibrated
    weight, bias = _with_absent_tasks(
        *fit_discriminant(_joined(features, taps)[rows], labels), given, len(artifact.tasks)
    )
    assert calibrated.info.calibration is not None
    assert calibrated.calibration is not None
    return _calibrated(
        artifact,
        dataclasses.replace(
            calibrated.info.calibration, discriminant=taps, discriminant_weight=PSEUDO_WEIGHT
        ),
        dataclasses.replace(calibrated.calibration, weight=weight, bias=bias),
    )


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
        last: cross_validated_posterior(_joined(features, taps[: last.layer + 1]), labels)
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
        fitted = fit_discriminant(_joined(features, taps[: last + 1]), labels)
        return _with_absent_tasks(*fitted, rows, len(names))

    weight, bias = discriminant(chosen.layer)
    offset, scale = _residual_statistics(artifact, features)
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
    artifact = _calibrated(artifact, info, Calibration(offset, scale, weight, bias))
    if not incomplete:  # else images of the other tasks would be unknown
        stopped = [taps[stop] for stop in early.stops]
        dull = _dull_features(artifact, pixel_values, [*stopped, chosen])
        artifact = _with_known_images(artifact, chosen, features[chosen].numpy(), labels, dull[chosen])
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
        threshold, *parts = _known_images(at_stop, labels, dull)
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


def _own_answers(
    artifact: Artifact, pixel_values: NDArray[np.float32], progress: Progress
) -> NDArray[np.int64]:
    """The task that the router itself gives each image. [n]"""
    model = MassModel(artifact)
    return _answers(lambda images: -model.residuals(images), pixel_values, progress)


def _answers(
    score: Callable[[Tensor], Tensor], pixel_values: NDArray[np.float32], progress: Progress
) -> NDArray[np.int64]:
    """The task with the highest score, image by image. [n]"""
    parts: list[Tensor] = []
    for start in progress.track(list(range(0, len(pixel_values), BATCH)), "Routing the calibration images"):
        parts += [score(torch.from_numpy(pixel_values[start : start + BATCH])).argmax(dim=1)]
    labels: NDArray[np.int64] = torch.cat(parts).numpy()
    return labels


def _with_heads_heard(artifact: Artifact, pixel_values: NDArray[np.float32], progress: Progress) -> Artifact:
    """With head evidence, if it and the residuals mostly see the same tasks in the images."""
    heads = _answers(MassModel(artifact).evidence, pixel_values, progress)
    if agreement(_own_answers(artifact, pixel_values, progress), heads) < LEAST_AGREEMENT:
        return artifact
    router = artifact.info.router
    router = dataclasses.replace(router, evidence=HEARD_WEIGHT * EVIDENCE_WEIGHT[router.standardize])
    return dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))


def _deepest(artifact: Artifact) -> Tap:
    """The last mlp input that the router reads, but none before the one that learns from the router's own answers."""
    layers = artifact.info.vision.layers
    read = layers - 1 if artifact.info.router.evidence else max(artifact.info.taps()).layer
    return Tap(max(read, default_routing_layer(layers)), "mlp")


def _with_known_images(
    artifact: Artifact, tap: Tap, features: NDArray[np.float64], labels: NDArray[np.int64], dull: Tensor
) -> Artifact:
    """The calibrated artifact with what images look like at a tap: features [n, D], tasks 0..K-1 [n], dull [M, D]."""
    info, calibration = artifact.info.calibration, artifact.calibration
    assert info is not None
    assert calibration is not None
    threshold, whiten, centres, nothing = _known_images(features, labels, dull)
    return _calibrated(
        artifact,
        dataclasses.replace(info, unknown=tap, unknown_threshold=threshold),
        dataclasses.replace(
            calibration, whiten=whiten.float(), centres=centres.float(), nothing=nothing.float()
        ),
    )


def _known_images(
    features: NDArray[np.float64], labels: NDArray[np.int64], dull: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The distance that few of the images exceed, and what `whitened_distance` compares with: [D, D], [K, D], [M, D]"""
    distances = cross_validated_distances(features, labels, dull)
    whiten, centres = fit_known_images(features, labels)
    return float(np.quantile(distances, 1 - FALSE_ALARMS)), whiten, centres, dull @ whiten


def _dull_features(
    artifact: Artifact, pixel_values: NDArray[np.float32], taps: Sequence[Tap]
) -> dict[Tap, Tensor]:
    """Of images that show nothing, made of the calibration images: [M, D] float64 by tap."""
    dull = dull_images(pixel_values, artifact.info.preprocess)
    return tap_features(artifact, dull, sorted(set(taps)), Progress(quiet=True))


def _joined(features: Mapping[Tap, Tensor], taps: Sequence[Tap]) -> NDArray[np.float64]:
    """Features of several taps, one after the other. [n, M*D]"""
    return np.concatenate([features[tap].numpy() for tap in taps], axis=1)


def _with_absent_tasks(
    weight: NDArray[np.float64], bias: NDArray[np.float64], rows: NDArray[np.int64], T: int
) -> tuple[Tensor, Tensor]:
    """Rows of the tasks that had images; the others get the average task's. [T, M*D], [T] float32

    The average is subtracted from all: a softmax does not see it, and float32 is spared its magnitude.
    """
    full_weight, full_bias = np.zeros((T, weight.shape[1])), np.zeros(T)
    full_weight[rows], full_bias[rows] = weight - weight.mean(axis=0), bias - bias.mean()
    return torch.from_numpy(full_weight).float(), torch.from_numpy(full_bias).float()


def _residual_statistics(artifact: Artifact, features: Mapping[Tap, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each task's residual at each tap, so that the score has z-scores: [L, T] each."""
    residuals = _residuals(artifact, features)
    unit = RELATIVE_SCALE if artifact.info.router.standardize == "length" else 1.0
    return residuals.mean(dim=1).float(), (unit * residuals.std(dim=1).clamp_min(1e-6)).float()


def _shrunk_bias(artifact: Artifact, features: Mapping[Tap, Tensor]) -> Tensor:
    """What a task's residual at a tap differs by from all tasks' on average, as far as this is more than images do.

    Where a task's subspace holds what all images share, its residual is small for all of them; that is seen in the
    mean over the images, which also differs because tasks are not equally frequent. So only a share of the difference
    is taken: the tasks' means vary by V, the residuals of an image without them by W; the share is V / (V + W). [L, T]
    """
    residuals = _residuals(artifact, features)  # [L, n, T]
    means = residuals.mean(dim=1)
    bias = means - means.mean(dim=1, keepdim=True)
    between = bias.square().mean(dim=1)
    within = (residuals - means[:, None]).var(dim=2, correction=0).mean(dim=1)
    return ((between / (between + within).clamp_min(1e-12))[:, None] * bias).float()


def _residuals(artifact: Artifact, features: Mapping[Tap, Tensor]) -> Tensor:
    """Of images at the router's taps, relative to the feature's length where it reads them so. [L, n, T]"""
    router, rows = artifact.info.router, []
    for tap in artifact.info.taps():
        bases = [of_task[tap.parameter].double() for of_task in artifact.routing_bases]
        residuals = projection_residuals(features[tap], bases, router.norm)
        relative = router.standardize == "length"
        rows.append(
            residuals / feature_length(features[tap], router.norm)[:, None] if relative else residuals
        )
    return torch.stack(rows)


def _calibrated(artifact: Artifact, info: CalibrationInfo, calibration: Calibration) -> Artifact:
    return dataclasses.replace(
        artifact, info=dataclasses.replace(artifact.info, calibration=info), calibration=calibration
    )
