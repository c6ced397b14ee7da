"""Merging task vectors: TSV-M, isotropic, mean, and plain sums. Dense, in float64: the specification.

All functions take and return deltas (what is added to the base). `polar_factor` is the one place where
conditioning matters; see there for the bound and what happens below it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from mass_export.eigenvectors import GRAM_FROM, eigenpairs, gram
from mass_export.low_rank import LowRank

# Singular directions below this share of the largest are dropped from a polar factor. The runtime's cores use
# the same bound (`runtime.cores`), so that both sides agree on which directions are there.
RELATIVE_CUTOFF = 1e-4
_REFINED_BELOW = 1e-2


class IllConditionedWarning(UserWarning):
    """Task subspaces overlap so much that directions of the stack were dropped."""


def polar_factor(stack: Tensor, where: str = "") -> Tensor:
    """The nearest matrix with orthonormal columns (or rows): `P Q^T` of the thin SVD `P diag(sigma) Q^T`.

    (Gargiulo et al., arXiv 2412.00081, section 4: whitening by the orthogonal Procrustes problem.) When the
    tasks' subspaces share a direction the smallest sigma tends to zero and its P and Q are noise. Directions
    with sigma < 1e-4 of the largest are therefore left out, which is the pseudo-inverse in
    `stack (stack^T stack)^(-1/2)`: the same task given twice then counts once, and zero deltas count for nothing.

    Args:
        stack: [D, K] with K <= D, or [K, D].
        where: parameter name for the warning.

    Returns:
        Same shape, float64.
    """
    factor, sigma = _polar(stack.double())
    kept = sigma > RELATIVE_CUTOFF * sigma[0]
    axis = 0 if stack.shape[0] >= stack.shape[1] else 1
    absent = int(
        (stack == 0).all(dim=axis).sum()
    )  # triplets beyond a delta's own rank, which are zero on purpose
    if int((~kept).sum()) > absent:
        warnings.warn(
            f"{where or 'stack'}: {int((~kept).sum()) - absent} of {sigma.numel()} stacked directions are shared "
            "between tasks "
            f"(smallest singular value {float(sigma[-1]):.1e}, bound {RELATIVE_CUTOFF:g} of the largest); they were "
            "merged into one. Lower the rank if this is not intended.",
            IllConditionedWarning,
            stacklevel=2,
        )
    return factor


def _polar(stack: Tensor) -> tuple[Tensor, Tensor]:
    """The polar factor without the dropped directions, and all singular values, descending.

    Large stacks go by the inverse square root of their Gram matrix, `stack V diag(1 / sigma) V^T` with
    `stack^T stack = V diag(sigma^2) V^T`. Down to the cutoff this is exact to about 1e-8; one step of Newton and
    Schulz, `X (3 I - X^T X) / 2`, makes up for what the squaring lost where sigma is small.
    """
    if stack.shape[0] < stack.shape[1]:
        factor, sigma = _polar(stack.T)
        return factor.T, sigma
    if stack.shape[1] < GRAM_FROM:
        p, sigma, qh = torch.linalg.svd(stack, full_matrices=False)
        return (p * (sigma > RELATIVE_CUTOFF * sigma[0])) @ qh, sigma
    values, vectors = eigenpairs(gram(stack))
    sigma = values.clamp_min(0).sqrt().flip(0)
    kept = values.clamp_min(0).sqrt() > RELATIVE_CUTOFF * sigma[0]
    if not kept.any():
        return torch.zeros_like(stack), sigma
    basis = vectors[:, kept]
    factor = stack @ ((basis * values[kept].rsqrt()) @ basis.T)
    if values[kept][0] < _REFINED_BELOW**2 * values[-1]:
        factor = 1.5 * factor - 0.5 * factor @ gram(factor)
    return factor, sigma


def merge_tsvm(factors: Sequence[LowRank], where: str = "") -> Tensor:
    """TSV-M over a set of tasks (arXiv 2412.00081, algorithm 1; MASS.md section 2).

    `polar([u_1 .. u_K]) diag([s_1 .. s_K]) polar([vh_1; ..; vh_K])`; a single task needs no orthogonalisation.

    Returns:
        delta [D_out, D_in] float64.
    """
    if len(factors) == 1:
        return factors[0].to(torch.float64).delta()
    u = torch.cat([f.u.double() for f in factors], dim=1)  # [D_out, sum R]
    s = torch.cat([f.s.double() for f in factors])  # [sum R]
    vh = torch.cat([f.vh.double() for f in factors], dim=0)  # [sum R, D_in]
    return (polar_factor(u, where) * s) @ polar_factor(vh, where)


def merge_sum(factors: Sequence[LowRank], weights: Sequence[float]) -> Tensor:
    """Weighted sum of low-rank deltas (arXiv 2504.05342, algorithm 1).

    Returns:
        delta [D_out, D_in] float64.
    """
    terms = [w * f.to(torch.float64).delta() for f, w in zip(factors, weights, strict=True)]
    return torch.stack(terms).sum(dim=0)


def merge_isotropic(delta_sum: Tensor) -> Tensor:
    """Flatten the spectrum of the summed delta to its mean (Marczak et al., arXiv 2502.04959, Iso-C).

    Args:
        delta_sum: sum over tasks of full deltas. [D_out, D_in]

    Returns:
        delta [D_out, D_in] float64.
    """
    p, sigma, qh = torch.linalg.svd(delta_sum.double(), full_matrices=False)
    delta: Tensor = sigma.mean() * (p @ qh)
    return delta
