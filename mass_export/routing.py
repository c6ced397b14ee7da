"""The router in torch: taps -> residuals -> one score per task (arXiv 2504.05342, section 4.2, and extensions).

The paper's router reads one layer and scores a task by its projection residual. `combine_taps` extends this to
several layers. Gates and sets come from `runtime.routing`, which the device uses too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mass_export.artifact import Calibration
from mass_export.router_spec import Norm, Standardize, Token
from runtime.routing import STD_EPSILON

COVARIANCE_RIDGE = 1e-3
# Weight of the relative residual, in [0, 1], against head evidence, which spans some 28 cosines.
UNKNOWN_RESIDUAL_WEIGHT = 20.0
# The same for the mean over the taps in the router's score: chosen on validation images of the zoo, flat from 40 to 80.
RELATIVE_SCALE = 60.0
LEAST_DISTANCE = 1e-3
LEAST_LENGTH = 1e-12


def routing_feature(tokens: Tensor, token: Token) -> Tensor:
    """The CLS token or the mean of all tokens: [B, N, D] -> z [B, D]."""
    return tokens[:, 0] if token == "cls" else tokens.mean(dim=1)


def projection_residuals(z: Tensor, bases: Sequence[Tensor], norm: Norm) -> Tensor:
    """Distance of the feature to each task's subspace: `|| z - vh_i^T vh_i z ||`.

    Args:
        z: routing feature. [B, D]
        bases: per task vh_i with orthonormal rows. [R_i, D] each
        norm: `l2`, `l1`, or `mahalanobis`: sqrt(r^T C^-1 r), C the unbiased covariance of the rows of vh_i plus
            1e-3 I. The residual r is orthogonal to the rows, so this is l2 / sqrt(1e-3) up to rounding.

    Returns:
        residuals: >= 0, lower matches better. [B, T]
    """
    columns = []
    for vh in bases:
        r = z - (z @ vh.T) @ vh  # [B, D]
        if norm == "l1":
            columns.append(r.abs().sum(dim=1))
        elif norm == "l2":
            columns.append(r.square().sum(dim=1).sqrt())
        else:
            columns.append((r @ _precision(vh) * r).sum(dim=1).clamp_min(0).sqrt())
    return torch.stack(columns, dim=1)


def standardize_over_tasks(values: Tensor) -> Tensor:
    """Z-scores over the last axis, `(v - mean) / (std + 1e-6)` with the sample deviation; zero for one task."""
    if values.shape[-1] == 1:
        return torch.zeros_like(values)
    centred = values - values.mean(dim=-1, keepdim=True)
    return centred / (values.std(dim=-1, keepdim=True) + STD_EPSILON)


def combine_taps(
    residuals: Tensor,
    standardize: Standardize,
    calibration: Calibration | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """Average the taps' residuals, calibrated if there is a calibration, standardised if asked.

    Args:
        residuals: of each tap. [B, L, T]
        standardize: see `RouterSettings`.
        calibration: its offset is subtracted and its scale divides.
        lengths: of each tap's feature, as `feature_length` has them; for `length` alone. [B, L]

    Returns:
        score: lower matches better; for one tap and `none` the residual itself. [B, T]
    """
    if standardize == "length":
        assert lengths is not None
        residuals = residuals / lengths[:, :, None]
    if calibration is not None:
        residuals = (residuals - calibration.offset) / calibration.scale
    if standardize == "tasks":
        residuals = standardize_over_tasks(residuals)
    score = residuals.mean(dim=1)
    return RELATIVE_SCALE * score if standardize == "length" else score


def feature_length(z: Tensor, norm: Norm) -> Tensor:
    """The residual of a task without a subspace: [B, D] -> [B], > 0."""
    nothing = torch.zeros(1, z.shape[1], dtype=z.dtype)
    return projection_residuals(z, [nothing], norm)[:, 0].clamp_min(LEAST_LENGTH)


def unknown_score(z: Tensor, residuals: Tensor, norm: Norm, evidence: Tensor | None) -> Tensor:
    """How badly even the best task explains an image, without any image to compare with.

    `min_i r_i / ||z||`, the share of the feature that no task's subspace holds; where heads speak,
    20 times that less the strongest evidence.

    Args:
        z: feature at the router's last tap. [B, D]
        residuals: there, as `projection_residuals` has them. [B, T]
        norm: of the residuals.
        evidence: of `head_evidence`, or None. [B, T]

    Returns:
        score: higher is less known. [B]
    """
    share = residuals.amin(dim=1) / feature_length(z, norm)
    return share if evidence is None else UNKNOWN_RESIDUAL_WEIGHT * share - evidence.amax(dim=1)


def whitened_distance(z: Tensor, whiten: Tensor, centres: Tensor, nothing: Tensor | None = None) -> Tensor:
    """Root mean square of the whitened feature's differences to the nearest centre; about 1 for known images.

    Blank and dull images lie between the tasks' means, as near to them as known ones. But they lie nearer still to
    images of nothing; then the distance grows by the ratio of the two.

    Args:
        z: [B, D]
        whiten: inverse square root of the covariance. [D, D]
        centres: whitened. [K, D]
        nothing: whitened features of images of nothing. [M, D]

    Returns:
        distance: >= 0. [B]
    """
    white = (z @ whiten)[:, None, :]

    def nearest(points: Tensor) -> Tensor:
        return (white - points).square().mean(dim=2).amin(dim=1).sqrt()

    known = nearest(centres)
    if nothing is None:
        return known
    return known * (known / nearest(nothing).clamp_min(LEAST_DISTANCE)).clamp_min(1)


def log_posterior(z: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Log probabilities of the tasks by a linear discriminant: z [B, M*D], [T, M*D], [T] -> [B, T], <= 0."""
    return (z @ weight.T + bias).log_softmax(dim=1)


def is_sure(scores: Tensor, margin: float) -> Tensor:
    """Where the best task leads the second by the margin: scores [B, T], lower matches better -> [B] bool."""
    best = scores.topk(2, dim=1, largest=False).values
    return best[:, 1] - best[:, 0] >= margin


def head_evidence(logits: Tensor, sizes: Sequence[int]) -> Tensor:
    """How strongly each head claims the feature: `logsumexp(logits_i) - log C_i`, higher is better.

    Args:
        logits: of all heads, tasks in order, on a common scale; see `mass_export.head_evidence`. [B, sum C]
        sizes: C_i.

    Returns:
        evidence [B, T]
    """
    log_sizes = torch.tensor(sizes, dtype=logits.dtype).log()
    parts = torch.split(logits, list(sizes), dim=1)
    return torch.stack([part.logsumexp(dim=1) for part in parts], dim=1) - log_sizes


def _precision(vh: Tensor) -> Tensor:
    """Inverse covariance of the rows of vh, plus the ridge. [D, D]"""
    rows = vh.double()
    centred = rows - rows.mean(dim=0)
    covariance = centred.T @ centred / max(rows.shape[0] - 1, 1)
    ridge = COVARIANCE_RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    precision: Tensor = torch.linalg.inv(covariance + ridge)
    return precision.to(vh.dtype)
