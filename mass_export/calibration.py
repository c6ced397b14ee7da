"""Teaching the router with images but without gradients: closed forms on the first pass' features.

Three levels, by what one may know:

- `synthetic`: nothing. Images made from noise show which residuals are small for any input at all.
- `pool`: unlabelled images. Mean and spread of each task's residual at each tap remove the per-task bias where no
  head evidence does. The router's own answers then serve as labels, once, for the discriminant below.
- `task_images`: a few images a task, no class labels. A linear discriminant with shrunk covariance names the task. It
  reads all mlp inputs up to a block that is early enough for the first pass to get shorter.

Images also show what known ones look like: at the deepest place that the router reads, the distance to the nearest
task's mean, in units of the spread within tasks, says how unknown an image is.

Statistics are computed in float64.
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
from mass_export.errors import DataError
from mass_export.layer_choice import macro_average
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Tap, default_routing_layer
from mass_export.routing import (
    orthonormal_rows,
    projection_residuals,
    routing_feature,
    whitened_distance,
)
from mass_export.verify import enlarged
from mass_export.vit import tap_tokens
from runtime.verification import two_best

BATCH = 64
SYNTHETIC_IMAGES = 256
FOLDS = 5
# A shorter first pass is worth this much routing accuracy in cross-validation.
LAYER_TOLERANCE = 0.005
# Weight of a discriminant whose labels are the router's own answers, beside these answers' score.
PSEUDO_WEIGHT = 0.1
# The share of calibration images whose margin counts as unsure, and the prior's weight against the heads' confidence.
UNSURE_SHARE = 0.3
VERIFY_PRIOR = 0.1
# The share of images like those of the calibration that may be called unknown.
FALSE_ALARMS = 0.05


@dataclass(frozen=True)
class LayerTrial:
    """Cross-validated routing accuracy of the discriminant that reads the mlp inputs up to a tap."""

    tap: Tap
    accuracy: float


def synthetic_images(artifact: Artifact, count: int = SYNTHETIC_IMAGES, seed: int = 0) -> NDArray[np.float32]:
    """Images of nothing: 1/f noise of several slopes, patches, gradients and lines, normalised. [n, 3, H, W]"""
    rng = np.random.default_rng(seed)
    H, W = artifact.info.vision.image_size
    frequency = np.hypot(np.fft.fftfreq(H)[:, None], np.fft.fftfreq(W)[None, :])
    frequency[0, 0] = 1 / max(H, W)
    images = np.empty((count, 3, H, W), np.float32)
    for i in range(count):
        kind = i % 4
        if kind == 0:  # coloured 1/f noise
            spectrum = np.fft.fft2(rng.standard_normal((3, H, W))) / frequency ** rng.uniform(0.3, 2)
            picture = np.fft.ifft2(spectrum).real
        elif kind == 1:  # flat patches
            cells = int(rng.integers(2, 9))
            picture = enlarged(rng.random((3, cells, cells)), H, W)
        elif kind == 2:  # a light shape on a dark ground, or the other way round
            rows, columns = np.mgrid[0:H, 0:W]
            angle, width = rng.uniform(0, np.pi, 3), rng.uniform(1, 4, 3)
            distance = [
                abs((rows - rng.uniform(0, H)) * np.cos(a) + (columns - rng.uniform(0, W)) * np.sin(a)) / w
                for a, w in zip(angle, width, strict=True)
            ]
            picture = np.repeat((np.min(distance, axis=0) < 1)[None].astype(float), 3, axis=0)
            picture = picture if rng.random() < 0.5 else 1 - picture
        else:  # smooth colour gradients
            corners = rng.random((3, 2, 2))
            rows, columns = np.linspace(0, 1, H)[:, None], np.linspace(0, 1, W)[None, :]
            top = corners[:, :1, :1] * (1 - columns) + corners[:, :1, 1:] * columns
            low = corners[:, 1:, :1] * (1 - columns) + corners[:, 1:, 1:] * columns
            picture = top * (1 - rows) + low * rows
        span = picture.max() - picture.min()
        images[i] = (picture - picture.min()) / (span if span > 0 else 1)
    spec = artifact.info.preprocess
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (spec.mean, spec.std))
    normalised: NDArray[np.float32] = (images - mean) / std
    return normalised


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
    source: str = "",
    progress: Progress,
) -> Artifact:
    """Remove the per-task bias of the residuals on unlabelled images, and learn from the router's own answers.

    Args:
        artifact: to calibrate; an older calibration is replaced.
        pixel_values: normalised images, at least two. [n, 3, H, W]
        synthetic: whether they were made by `synthetic_images`; these have no tasks to learn from.
        pseudo_labels: fit a discriminant at three quarters of the depth to what the router says of the images.
        source: where they come from, for the record.
        progress: where to show it.
    """
    if len(pixel_values) < 2:
        raise DataError(f"calibration needs at least 2 images, got {len(pixel_values)}.")
    artifact = artifact.without_calibration()
    learn = pseudo_labels and not synthetic
    known = None if synthetic else _deepest(artifact)
    taps = (Tap(default_routing_layer(artifact.info.vision.layers), "mlp"),) if learn else ()
    scaled = () if artifact.info.router.evidence else artifact.info.taps()  # evidence has a scale of its own
    read = {*taps, *scaled} if known is None else {*taps, *scaled, known}
    features = tap_features(artifact, pixel_values, sorted(read), progress)
    if scaled:
        offset, scale = _residual_statistics(artifact, features)
    else:
        shape = (len(artifact.info.taps()), len(artifact.tasks))
        offset, scale = torch.zeros(shape), torch.ones(shape)
    info = CalibrationInfo(
        level="synthetic" if synthetic else "pool",
        images={"pool": len(pixel_values)},
        sources={"pool": source} if source else None,
        router=artifact.info.router,
    )
    calibrated = _calibrated(artifact, info, Calibration(offset, scale))
    if known is None:
        return calibrated
    labels = _own_answers(calibrated, pixel_values, progress)
    calibrated = _with_known_images(calibrated, known, features[known].numpy(), labels)
    if not learn:
        return calibrated
    rows = np.flatnonzero(np.bincount(labels, minlength=len(artifact.tasks))[labels] >= 2)
    given = np.unique(labels[rows])
    if len(given) < 2:
        return calibrated
    weight, bias = _with_absent_tasks(
        *fit_discriminant(_joined(features, taps)[rows], np.searchsorted(given, labels[rows])),
        given,
        len(artifact.tasks),
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
        verify: run the two best tasks where the margin is below that of 30% of the images, as cross-validation sees
            them; the heads' confidence then counts ten times as much as the posterior.
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
    trials = tuple(LayerTrial(last, _accuracy(p, labels)) for last, p in posteriors.items())
    best = max(trial.accuracy for trial in trials)
    chosen = next(trial.tap for trial in trials if trial.accuracy >= best - LAYER_TOLERANCE)
    read = taps[: chosen.layer + 1]
    rows = np.array([names.index(name) for name in given])
    weight, bias = _with_absent_tasks(*fit_discriminant(_joined(features, read), labels), rows, len(names))
    incomplete = len(given) < len(names)
    offset, scale = _residual_statistics(artifact, features)
    info = CalibrationInfo(
        level="task_images",
        images={name: len(images[name]) for name in given},
        discriminant=read,
        residual_weight=max(residual_weight, 1.0) if incomplete else residual_weight,
        discriminant_weight=1.0,
        sources=dict(sources) if sources else None,
        router=artifact.info.router,
    )
    router = artifact.info.router
    if not incomplete:  # the discriminant knows better, and needs no whole tower
        router = dataclasses.replace(router, evidence=0.0)
    if verify and router.mode == "top1" and not incomplete:
        _, margins = two_best(-posteriors[chosen])
        margin = float(np.quantile(margins, UNSURE_SHARE))
        router = dataclasses.replace(router, verify_margin=margin, verify_prior=VERIFY_PRIOR)
    artifact = dataclasses.replace(artifact, info=dataclasses.replace(artifact.info, router=router))
    artifact = _calibrated(artifact, info, Calibration(offset, scale, weight, bias))
    if not incomplete:  # else images of the other tasks would be unknown
        artifact = _with_known_images(artifact, chosen, features[chosen].numpy(), labels)
    return artifact, trials


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
    parts: list[Tensor] = []
    for start in progress.track(list(range(0, len(pixel_values), BATCH)), "Routing the calibration images"):
        batch = torch.from_numpy(pixel_values[start : start + BATCH])
        parts += [model.residuals(batch).argmin(dim=1)]
    labels: NDArray[np.int64] = torch.cat(parts).numpy()
    return labels


def _deepest(artifact: Artifact) -> Tap:
    """The last mlp input that the first pass computes anyway."""
    layers = artifact.info.vision.layers
    read = layers - 1 if artifact.info.router.evidence else max(artifact.info.taps()).layer
    return Tap(max(read, default_routing_layer(layers)), "mlp")


def _with_known_images(
    artifact: Artifact, tap: Tap, features: NDArray[np.float64], labels: NDArray[np.int64]
) -> Artifact:
    """The calibrated artifact with what its images look like at a tap, by task: [n, D], [n]"""
    _, labels = np.unique(labels, return_inverse=True)
    distances = np.empty(len(labels))
    folds = _folds(labels)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        distances[held] = _distances(features[held], *_known_images(features[~held], labels[~held]))
    whiten, centres = (torch.from_numpy(array).float() for array in _known_images(features, labels))
    info, calibration = artifact.info.calibration, artifact.calibration
    assert info is not None
    assert calibration is not None
    info = dataclasses.replace(
        info, unknown=tap, unknown_threshold=float(np.quantile(distances, 1 - FALSE_ALARMS))
    )
    return _calibrated(artifact, info, dataclasses.replace(calibration, whiten=whiten, centres=centres))


def _known_images(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Inverse square root of the shrunk covariance within tasks [D, D], and the tasks' whitened means [K, D]."""
    present, labels = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == k].mean(axis=0) for k in range(len(present))])
    centred = features - means[labels]
    degrees, D = max(len(features) - len(present), 1), features.shape[1]
    covariance = centred.T @ centred / degrees
    trace = float(np.trace(covariance))
    shrinkage = _shrinkage(trace, float(np.sum(covariance**2)), D, degrees)
    floor = shrinkage * trace / D + 1e-6 * max(trace / D, 1e-12)
    values, vectors = np.linalg.eigh((1 - shrinkage) * covariance)
    whiten = (vectors / np.sqrt(np.maximum(values, 0) + floor)) @ vectors.T
    return whiten, means @ whiten


def _distances(
    features: NDArray[np.float64], whiten: NDArray[np.float64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    """As the first pass computes them: [n, D] -> [n]"""
    given = (torch.from_numpy(array) for array in (features, whiten, centres))
    found: NDArray[np.float64] = whitened_distance(*given).numpy()
    return found


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


def fit_discriminant(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Linear discriminant analysis with a shrunk shared covariance and equal priors.

    `score_t = m_t^T S^-1 z - m_t^T S^-1 m_t / 2`, S the within-task covariance shrunk towards a multiple of the
    identity by the oracle-approximating coefficient (Chen et al. 2010, "Shrinkage algorithms for MMSE covariance
    estimation", eq. 23).

    Args:
        features: [n, D]
        labels: task of each, 0..K-1, each present. [n]

    Returns:
        weight [K, D], bias [K]
    """
    K, (n, D) = int(labels.max()) + 1, features.shape
    means = np.stack([features[labels == k].mean(axis=0) for k in range(K)])
    centred = features - means[labels]
    degrees = max(n - K, 1)
    few = n < D  # then products of images are smaller than those of dimensions
    gram = centred @ centred.T if few else centred.T @ centred  # both have the covariance's trace and norm
    trace, square = np.trace(gram) / degrees, float(np.sum(gram**2)) / degrees**2
    shrinkage = _shrinkage(trace, square, D, degrees)
    kept, floor = (1 - shrinkage) / degrees, shrinkage * trace / D + 1e-6 * max(trace / D, 1e-12)
    if few and kept > 0:  # Woodbury's identity
        inner = np.linalg.solve(gram + floor / kept * np.eye(n), centred @ means.T)
        weight = (means.T - centred.T @ inner).T / floor
    elif few:
        weight = means / floor
    else:
        weight = np.linalg.solve(kept * gram + floor * np.eye(D), means.T).T
    bias = -0.5 * np.sum(weight * means, axis=1)
    return weight, bias


def _shrinkage(trace: float, square: float, D: int, degrees: int) -> float:
    """The oracle-approximating coefficient (Chen et al. 2010, eq. 23), 0..1.

    Args:
        trace: of the covariance.
        square: of its Frobenius norm.
        D: dimensions.
        degrees: of freedom.
    """
    if square <= trace**2 / D:
        return 1.0
    numerator = (1 - 2 / D) * square + trace**2
    return min(1.0, numerator / ((degrees + 1 - 2 / D) * (square - trace**2 / D)))


def cross_validated_posterior(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores of the discriminant for each image by the fit that has not seen its fold. [n, K]"""
    folds = _folds(labels)
    scores = np.zeros((len(labels), int(labels.max()) + 1))
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        weight, bias = fit_discriminant(features[~held], labels[~held])
        scores[held] = features[held] @ weight.T + bias
    return scores


def _folds(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The fold of each image, at random within its task. [n]"""
    folds = np.zeros(len(labels), np.int64)
    for k in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == k)
        folds[rows] = np.random.default_rng(k).permutation(len(rows)) % min(FOLDS, len(rows))
    return folds


def cross_validate(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Routing accuracy of the discriminant on held-out folds, averaged over tasks."""
    return _accuracy(cross_validated_posterior(features, labels), labels)


def _accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    return macro_average(scores.argmax(axis=1) == labels, labels)


def _residual_statistics(artifact: Artifact, features: Mapping[Tap, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each task's residual at each tap: [L, T] each."""
    rows = [
        projection_residuals(
            features[tap],
            [orthonormal_rows(bases[tap.parameter]).double() for bases in artifact.router_bases],
            artifact.info.router.norm,
        )
        for tap in artifact.info.taps()
    ]
    residuals = torch.stack(rows)  # [L, n, T]
    scale = residuals.std(dim=1).clamp_min(1e-6)
    return residuals.mean(dim=1).float(), scale.float()


def _calibrated(artifact: Artifact, info: CalibrationInfo, calibration: Calibration) -> Artifact:
    return dataclasses.replace(
        artifact, info=dataclasses.replace(artifact.info, calibration=info), calibration=calibration
    )
