"""Teaching the router with images that nobody has labelled, without gradients.

- `synthetic`: images made from noise show which residuals are small for any input at all.
- `pool`: unlabelled images. The per-task bias of the residuals at each tap is removed: of those relative to the
  feature's length as far as it exceeds what images differ by, of others with their spread unless heads speak. Heads
  that were not trusted are heard where they agree with the residuals. The router's own answers then serve as labels,
  once, for a discriminant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, Calibration
from mass_export.calibration_features import BATCH, joined, residual_statistics, shrunk_bias, tap_features
from mass_export.discriminant import fit_discriminant, with_absent_tasks
from mass_export.errors import DataError
from mass_export.head_evidence import EVIDENCE_WEIGHT, HEARD_WEIGHT, LEAST_AGREEMENT, agreement
from mass_export.known_images import dull_features, with_known_images
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.router_spec import CalibrationInfo, Tap, default_routing_layer

# Weight of a discriminant whose labels are the router's own answers, beside these answers' score.
PSEUDO_WEIGHT = 0.2


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
        offset = shrunk_bias(artifact, features)
    elif removed:
        offset, scale = residual_statistics(artifact, features)
    info = CalibrationInfo(
        level="synthetic" if synthetic else "pool",
        images={"pool": len(pixel_values)},
        sources={"pool": source} if source else None,
        router=before,
    )
    calibrated = artifact.with_calibration(info, Calibration(offset, scale))
    if known is None:
        return calibrated
    answers = _own_answers(calibrated, pixel_values, progress)
    rows = np.flatnonzero(np.bincount(answers)[answers] >= 2)
    if not len(rows):
        return calibrated
    given, labels = np.unique(answers[rows], return_inverse=True)
    dull = dull_features(artifact, pixel_values, [known])
    calibrated = with_known_images(calibrated, known, features[known].numpy()[rows], labels, dull[known])
    if not learn or len(given) < 2:
        return calibrated
    weight, bias = with_absent_tasks(
        *fit_discriminant(joined(features, taps)[rows], labels), given, len(artifact.tasks)
    )
    assert calibrated.info.calibration is not None
    assert calibrated.calibration is not None
    return artifact.with_calibration(
        dataclasses.replace(
            calibrated.info.calibration, discriminant=taps, discriminant_weight=PSEUDO_WEIGHT
        ),
        dataclasses.replace(calibrated.calibration, weight=weight, bias=bias),
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
