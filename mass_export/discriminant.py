"""Closed forms over labelled features, in float64: which task is it, and is it like any of them?

The linear discriminant names the task; the distance to the nearest task's mean, in units of the spread within tasks,
says how unlike all of them an image is. Both take one covariance for all tasks, shrunk towards a multiple of the
identity by the oracle-approximating coefficient (Chen et al. 2010, "Shrinkage algorithms for MMSE covariance
estimation", eq. 23).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.layer_choice import macro_average
from mass_export.routing import whitened_distance

FOLDS = 5


def fit_discriminant(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Linear discriminant analysis with a shrunk shared covariance and equal priors.

    `score_t = m_t^T S^-1 z - m_t^T S^-1 m_t / 2`, S the shrunk within-task covariance.

    Args:
        features: [n, D]
        labels: task of each, 0..K-1, each present. [n]

    Returns:
        weight [K, D], bias [K]
    """
    n, D = features.shape
    means, centred, degrees = _within_tasks(features, labels)
    few = n < D  # then products of images are smaller than those of dimensions
    gram = centred @ centred.T if few else centred.T @ centred  # both have the covariance's trace and norm
    trace, square = np.trace(gram) / degrees, float(np.sum(gram**2)) / degrees**2
    kept, floor = _shrunk(float(trace), square, D, degrees)
    kept /= degrees
    if few and kept > 0:  # Woodbury's identity
        inner = np.linalg.solve(gram + floor / kept * np.eye(n), centred @ means.T)
        weight: NDArray[Any] = (means.T - centred.T @ inner).T / floor
    elif few:
        weight = means / floor
    else:
        weight = np.linalg.solve(kept * gram + floor * np.eye(D), means.T).T
    bias = -0.5 * np.sum(weight * means, axis=1)
    return weight, bias


def with_absent_tasks(
    weight: NDArray[np.float64], bias: NDArray[np.float64], rows: NDArray[np.int64], T: int
) -> tuple[Tensor, Tensor]:
    """Rows of the tasks that had images; the others get the average task's. [T, M*D], [T] float32

    The average is subtracted from all: a softmax does not see it, and float32 is spared its magnitude.
    """
    full_weight, full_bias = np.zeros((T, weight.shape[1])), np.zeros(T)
    full_weight[rows], full_bias[rows] = weight - weight.mean(axis=0), bias - bias.mean()
    return torch.from_numpy(full_weight).float(), torch.from_numpy(full_bias).float()


def cross_validated_posterior(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Scores of the discriminant for each image by the fit that has not seen its fold. [n, K]"""
    scores = np.zeros((len(labels), int(labels.max()) + 1))
    for held in _folds(labels):
        weight, bias = fit_discriminant(features[~held], labels[~held])
        scores[held] = features[held] @ weight.T + bias
    return scores


def cross_validate(features: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Routing accuracy of the discriminant on held-out folds, averaged over tasks."""
    return macro_accuracy(cross_validated_posterior(features, labels), labels)


def macro_accuracy(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Share of images whose largest score is their task's, averaged over tasks."""
    return macro_average(scores.argmax(axis=1) == labels, labels)


def fit_confidence_scale(scores: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The scale at which `softmax(scale * scores)` is the likeliest probability of the tasks: one number, by bisection.

    The log-likelihood is concave in the scale; at its top the own task's score is what the softmax expects on average
    (temperature scaling: Guo et al. 2017, "On calibration of modern neural networks", section 4.2).

    Args:
        scores: of images that the scores' fit has not seen; higher is likelier. [n, K]
        labels: their tasks. [n]

    Returns:
        in [1e-3, 1e3]; at the upper end where no image is routed wrongly
    """
    own = scores[np.arange(len(labels)), labels]
    low, high = np.log(1e-3), np.log(1e3)
    for _ in range(60):
        middle = (low + high) / 2
        scaled = np.exp(middle) * (scores - scores.max(axis=1, keepdims=True))
        shares = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
        surer = np.mean(own - (shares * scores).sum(axis=1)) > 0
        low, high = (middle, high) if surer else (low, middle)
    return float(np.exp(low))


def fit_known_images(features: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    """What `mass_export.routing.whitened_distance` compares features with.

    Args:
        features: [n, D]
        labels: task of each, 0..K-1, each present. [n]

    Returns:
        inverse square root of the shrunk covariance within tasks [D, D], the tasks' whitened means [K, D]; float64
    """
    means, centred, degrees = _within_tasks(features, labels)
    covariance = centred.T @ centred / degrees
    D = len(covariance)
    kept, floor = _shrunk(float(np.trace(covariance)), float(np.sum(covariance**2)), D, degrees)
    values, vectors = np.linalg.eigh(kept * covariance)
    whiten = (vectors / np.sqrt(np.maximum(values, 0) + floor)) @ vectors.T
    return torch.from_numpy(whiten), torch.from_numpy(means @ whiten)


def cross_validated_distances(
    features: NDArray[np.float64], labels: NDArray[np.int64], dull: Tensor
) -> NDArray[np.float64]:
    """Distance of each image by the fit that has not seen its fold; each task has two images at least.

    Args:
        features: [n, D]
        labels: task of each, 0..K-1. [n]
        dull: features of images of nothing. [M, D] float64

    Returns:
        see `whitened_distance`. [n]
    """
    distances = np.empty(len(labels))
    for held in _folds(labels):
        whiten, centres = fit_known_images(features[~held], labels[~held])
        held_out = torch.from_numpy(features[held])
        distances[held] = whitened_distance(held_out, whiten, centres, dull @ whiten).numpy()
    return distances


def _folds(labels: NDArray[np.int64]) -> Iterator[NDArray[np.bool_]]:
    """The images of one fold after the other, each task's dealt out at random. [n] each"""
    folds = np.zeros(len(labels), np.int64)
    for k in range(int(labels.max()) + 1):
        rows = np.flatnonzero(labels == k)
        folds[rows] = np.random.default_rng(k).permutation(len(rows)) % min(FOLDS, len(rows))
    for fold in range(int(folds.max()) + 1):
        yield folds == fold


def _within_tasks(
    features: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """The tasks' means [K, D], the differences to them [n, D], and these' degrees of freedom."""
    K = int(labels.max()) + 1
    means = np.stack([features[labels == k].mean(axis=0) for k in range(K)])
    return means, features - means[labels], max(len(features) - K, 1)


def _shrunk(trace: float, square: float, D: int, degrees: int) -> tuple[float, float]:
    """The shrunk covariance is a C + b I: a in [0, 1], and b > 0.

    Args:
        trace: of the covariance C.
        square: of its Frobenius norm.
        D: dimensions.
        degrees: of freedom.
    """
    shrinkage = 1.0
    if square > trace**2 / D:
        numerator = (1 - 2 / D) * square + trace**2
        shrinkage = min(1.0, numerator / ((degrees + 1 - 2 / D) * (square - trace**2 / D)))
    return 1 - shrinkage, shrinkage * trace / D + 1e-6 * max(trace / D, 1e-12)
