"""Teaching the router with images but without gradients: closed forms on the first pass' features.

Three levels, by what one may know:

- `synthetic`: nothing. Images made from noise show which residuals are small for any input at all.
- `pool`: unlabelled images. Mean and spread of each task's residual at each tap remove the per-task bias.
- `task_images`: a few images a task, no class labels. A linear discriminant with shrunk covariance on one
  tap's feature names the task, from a layer early enough that the first pass gets shorter.

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
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Site, Tap
from mass_export.routing import projection_residuals, routing_feature
from mass_export.vit import tap_tokens

BATCH = 64
SYNTHETIC_IMAGES = 256
FOLDS = 5
# A shorter first pass is worth this much routing accuracy in cross-validation.
LAYER_TOLERANCE = 0.005


@dataclass(frozen=True)
class LayerTrial:
    """Cross-validated routing accuracy of the discriminant at one tap."""

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
            coarse = rng.random((3, cells, cells))
            picture = coarse[:, np.arange(H) * cells // H][:, :, np.arange(W) * cells // W]
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
    """Routing features of the first pass: [n, 3, H, W] -> [n, D] float64 by tap."""
    params, info = artifact.merged or artifact.base, artifact.info
    parts: dict[Tap, list[Tensor]] = {tap: [] for tap in taps}
    starts = list(range(0, len(pixel_values), BATCH))
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
    source: str = "",
    progress: Progress,
) -> Artifact:
    """Centre and scale every residual by its mean and spread over unlabelled (or synthetic) images.

    Args:
        artifact: to calibrate; an older calibration is replaced.
        pixel_values: normalised images, at least two. [n, 3, H, W]
        synthetic: whether they were made by `synthetic_images`.
        source: where they come from, for the record.
        progress: where to show it.
    """
    if len(pixel_values) < 2:
        raise DataError(f"calibration needs at least 2 images, got {len(pixel_values)}.")
    offset, scale = _residual_statistics(artifact, pixel_values, progress)
    info = CalibrationInfo(
        level="synthetic" if synthetic else "pool",
        images={"pool": len(pixel_values)},
        sources={"pool": source} if source else None,
    )
    return _calibrated(artifact, info, Calibration(offset, scale))


def calibrate_task_images(
    artifact: Artifact,
    images: Mapping[str, NDArray[np.float32]],
    *,
    tap: Tap | None = None,
    residual_weight: float = 0.0,
    sources: Mapping[str, str] | None = None,
    progress: Progress,
) -> tuple[Artifact, tuple[LayerTrial, ...]]:
    """Fit the linear discriminant on a few images a task.

    Without `tap` the earliest mlp input is taken whose cross-validated routing accuracy comes within half a point
    of the best. Tasks without images keep the residuals on a common scale: their discriminant is that of an
    average task, and the residual score decides between them and the rest.

    Args:
        artifact: to calibrate; an older calibration is replaced.
        images: normalised images by task, at least two each. [n_i, 3, H, W]
        tap: where the discriminant reads.
        residual_weight: weight of the calibrated residuals beside the discriminant.
        sources: where the images come from, for the record.
        progress: where to show it.

    Returns:
        the calibrated artifact, and the trial of every tap.
    """
    names = [task.name for task in artifact.info.tasks]
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
    given = [name for name in names if name in images]
    labels = np.repeat(np.arange(len(given)), [len(images[name]) for name in given])
    pixel_values = np.concatenate([images[name] for name in given])
    site: Site = "mlp"
    taps = [tap] if tap else [Tap(i, site) for i in range(artifact.info.vision.layers)]
    features = tap_features(artifact, pixel_values, taps, progress)
    trials = tuple(LayerTrial(t, cross_validate(features[t].numpy(), labels)) for t in taps)
    best = max(trial.accuracy for trial in trials)
    chosen = next(trial.tap for trial in trials if trial.accuracy >= best - LAYER_TOLERANCE)
    weight, bias = fit_discriminant(features[chosen].numpy(), labels)
    offset, scale = _residual_statistics(artifact, pixel_values, progress)
    incomplete = len(given) < len(names)
    info = CalibrationInfo(
        level="task_images",
        images={name: len(images[name]) for name in given},
        discriminant=chosen,
        residual_weight=max(residual_weight, 1.0) if incomplete else residual_weight,
        discriminant_weight=1.0,
        sources=dict(sources) if sources else None,
    )
    rows = [names.index(name) for name in given]
    full_weight = np.tile(weight.mean(axis=0), (len(names), 1))
    full_bias = np.full(len(names), bias.mean())
    full_weight[rows], full_bias[rows] = weight, bias
    calibration = Calibration(
        offset, scale, torch.from_numpy(full_weight).float(), torch.from_numpy(full_bias).float()
    )
    return _calibrated(artifact, info, calibration), trials


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
    covariance = centred.T @ centred / degrees
    trace, square = np.trace(covariance), float(np.sum(covariance**2))
    shrinkage = 1.0
    if square > trace**2 / D:
        numerator = (1 - 2 / D) * square + trace**2
        shrinkage = min(1.0, numerator / ((degrees + 1 - 2 / D) * (square - trace**2 / D)))
    shrunk = (1 - shrinkage) * covariance + shrinkage * trace / D * np.eye(D)
    shrunk += 1e-6 * max(trace / D, 1e-12) * np.eye(D)
    weight = np.linalg.solve(shrunk, means.T).T
    bias = -0.5 * np.sum(weight * means, axis=1)
    return weight, bias


def cross_validate(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Routing accuracy of the discriminant on held-out folds, averaged over tasks."""
    folds = np.zeros(len(labels), np.int64)
    for k in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == k)
        folds[rows] = np.random.default_rng(k).permutation(len(rows)) % min(FOLDS, len(rows))
    right = np.zeros(len(labels), bool)
    for fold in range(int(folds.max()) + 1):
        held = folds == fold
        weight, bias = fit_discriminant(features[~held], labels[~held])
        right[held] = (features[held] @ weight.T + bias).argmax(axis=1) == labels[held]
    return float(np.mean([right[labels == k].mean() for k in range(int(labels.max()) + 1)]))


def _residual_statistics(
    artifact: Artifact, pixel_values: NDArray[np.float32], progress: Progress
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each task's residual at each tap: [L, T] each."""
    taps = artifact.info.taps()
    features = tap_features(artifact, pixel_values, taps, progress)
    rows = [
        projection_residuals(
            features[tap],
            [bases[tap.parameter].double() for bases in artifact.router_bases],
            artifact.info.router.norm,
        )
        for tap in taps
    ]
    residuals = torch.stack(rows)  # [L, n, T]
    scale = residuals.std(dim=1).clamp_min(1e-6)
    return residuals.mean(dim=1).float(), scale.float()


def _calibrated(artifact: Artifact, info: CalibrationInfo, calibration: Calibration) -> Artifact:
    return dataclasses.replace(
        artifact, info=dataclasses.replace(artifact.info, calibration=info), calibration=calibration
    )
