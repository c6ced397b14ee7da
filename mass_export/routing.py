"""The projection router in torch: routing feature -> residuals (arXiv 2504.05342, section 4.2).

Gates and sets come from `runtime.routing`, which the device uses too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mass_export.spec import Norm, Token

COVARIANCE_RIDGE = 1e-3


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


def _precision(vh: Tensor) -> Tensor:
    """Inverse covariance of the rows of vh, plus the ridge. [D, D]"""
    rows = vh.double()
    centred = rows - rows.mean(dim=0)
    covariance = centred.T @ centred / max(rows.shape[0] - 1, 1)
    ridge = COVARIANCE_RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    precision: Tensor = torch.linalg.inv(covariance + ridge)
    return precision.to(vh.dtype)
