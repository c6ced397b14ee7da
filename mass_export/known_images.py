"""What known images look like, by which an unknown one is told: learnt by every calibration with real images.

At the deepest place that the router reads, the distance to the nearest task's mean, in units of the spread within
tasks, says how unknown an image is, the more so if it lies nearer to dull images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact
from mass_export.calibration_features import tap_features
from mass_export.discriminant import cross_validated_distances, fit_known_images
from mass_export.progress import Progress
from mass_export.router_spec import Tap
from mass_export.synthetic_images import dull_images

# The share of images like those of the calibration that may be called unknown.
FALSE_ALARMS = 0.05


def with_known_images(
    artifact: Artifact, tap: Tap, features: NDArray[np.float64], labels: NDArray[np.int64], dull: Tensor
) -> Artifact:
    """The calibrated artifact with what images look like at a tap: features [n, D], tasks 0..K-1 [n], dull [M, D]."""
    info, calibration = artifact.info.calibration, artifact.calibration
    assert info is not None
    assert calibration is not None
    threshold, whiten, centres, nothing = known_images(features, labels, dull)
    return artifact.with_calibration(
        dataclasses.replace(info, unknown=tap, unknown_threshold=threshold),
        dataclasses.replace(
            calibration, whiten=whiten.float(), centres=centres.float(), nothing=nothing.float()
        ),
    )


def known_images(
    features: NDArray[np.float64], labels: NDArray[np.int64], dull: Tensor
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The distance that few of the images exceed, and what `whitened_distance` compares with: [D, D], [K, D], [M, D]"""
    distances = cross_validated_distances(features, labels, dull)
    whiten, centres = fit_known_images(features, labels)
    return float(np.quantile(distances, 1 - FALSE_ALARMS)), whiten, centres, dull @ whiten


def dull_features(
    artifact: Artifact, pixel_values: NDArray[np.float32], taps: Sequence[Tap]
) -> dict[Tap, Tensor]:
    """Of images that show nothing, made of the calibration images: [M, D] float64 by tap."""
    dull = dull_images(pixel_values, artifact.info.preprocess)
    return tap_features(artifact, dull, sorted(set(taps)), Progress(quiet=True))
