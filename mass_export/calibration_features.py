"""What a calibration reads of images: the first pass' features, and their residuals over the tasks. In float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact
from mass_export.progress import Progress
from mass_export.router_spec import Tap
from mass_export.routing import RELATIVE_SCALE, feature_length, projection_residuals, routing_feature
from mass_export.vit import tap_tokens

BATCH = 64


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


def joined(features: Mapping[Tap, Tensor], taps: Sequence[Tap]) -> NDArray[np.float64]:
    """Features of several taps, one after the other. [n, M*D]"""
    return np.concatenate([features[tap].numpy() for tap in taps], axis=1)


def residual_statistics(artifact: Artifact, features: Mapping[Tap, Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each task's residual at each tap, so that the score has z-scores: [L, T] each."""
    residuals = _residuals(artifact, features)
    unit = RELATIVE_SCALE if artifact.info.router.standardize == "length" else 1.0
    return residuals.mean(dim=1).float(), (unit * residuals.std(dim=1).clamp_min(1e-6)).float()


def shrunk_bias(artifact: Artifact, features: Mapping[Tap, Tensor]) -> Tensor:
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
