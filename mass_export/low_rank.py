"""A task vector's matrices as truncated singular value decompositions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mass_export.eigenvectors import GRAM_FROM, leading_right_vectors

# Rows of a basis may be off by this much, as float32 leaves them; 16 bits leave 1e-3.
ORTHONORMAL_TOLERANCE = 1e-5

NUMERICAL_RANK_CUTOFF = 1e-10


@dataclass(frozen=True)
class LowRank:
    """`delta ~ u diag(s) vh`.

    Attributes:
        u: left singular vectors, columns orthonormal. [D_out, R]
        s: singular values, descending, >= 0. [R]
        vh: right singular vectors, rows orthonormal. [R, D_in]
    """

    u: Tensor
    s: Tensor
    vh: Tensor

    @property
    def rank(self) -> int:
        """R."""
        return self.s.shape[0]

    def to(self, dtype: torch.dtype) -> LowRank:
        """Cast all three factors."""
        return LowRank(self.u.to(dtype), self.s.to(dtype), self.vh.to(dtype))

    def truncated(self, rank: int) -> LowRank:
        """The top `rank` triplets, in memory of their own."""
        kept = LowRank(self.u[:, :rank], self.s[:rank], self.vh[:rank])
        return kept if rank >= self.rank else LowRank(*(part.clone() for part in vars(kept).values()))

    def delta(self) -> Tensor:
        """The dense matrix. [D_out, D_in]"""
        return (self.u * self.s) @ self.vh


def factorize(delta: Tensor, rank: int) -> LowRank:
    """Keep the top `rank` singular triplets of a matrix (arXiv 2504.05342, section 3.2).

    The decomposition is done in float64 and returned in the dtype of `delta`. A matrix whose smaller side is at least
    `GRAM_FROM` and of which less than a half is kept goes by its Gram matrix, which is several times faster and
    agrees with the full decomposition to 1e-5 of every kept singular value (see `leading_right_vectors`). The sign
    of every triplet is fixed (the largest entry of each `u` column is positive), so that equal matrices give equal
    factors. Triplets beyond the numerical rank (s <= 1e-10 of the largest, or all of a zero matrix) have arbitrary
    bases that would disturb other tasks' orthogonalisation: their s, u column and vh row are set to zero, and
    contribute nothing anywhere.

    Args:
        delta: one matrix of a task vector. [D_out, D_in]
        rank: 1 <= rank <= min(D_out, D_in).

    Example:
        >>> delta = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> factors = factorize(delta, rank=1)
        >>> factors.rank, factors.s.tolist()
        (1, [3.0])
        >>> (factors.delta() - delta).norm().item()
        1.0
    """
    matrix = delta.double()
    if min(matrix.shape) >= GRAM_FROM and 2 * rank <= min(matrix.shape):
        u, s, vh = _by_gram(matrix, rank)
    else:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return _normalized(u[:, :rank], s[:rank], vh[:rank], delta.dtype)


def factorize_product(left: Tensor, right: Tensor, rank: int) -> LowRank:
    """Top singular triplets of `left @ right` from its factors: two QR and a small SVD, never the dense product.

    With `left = Q_l R_l` and `right^T = Q_r R_r` the product is `Q_l (R_l R_r^T) Q_r^T`.

    Args:
        left: [D_out, K] float64
        right: [K, D_in] float64
        rank: number of triplets to keep, at most min(D_out, K, D_in).
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return _normalized((q_left @ u)[:, :rank], s[:rank], (vh @ q_right.T)[:rank], left.dtype)


def orthonormal_rows(vh: Tensor) -> Tensor:
    """The nearest basis with orthonormal rows (the polar factor); one of float32 accuracy is returned as it is.

    Bases that were stored in fewer bits are rounded. `residual^2 = ||z||^2 - ||vh z||^2` holds for orthonormal rows
    alone, so that without this the graphs would differ from `mass_export.routing.projection_residuals`.

    Args:
        vh: rows of unit length, or zero where a rank is not used. [R, D]
    """
    used = vh.norm(dim=1) > 0.5
    rows = vh[used].double()
    off = rows @ rows.T - torch.eye(len(rows), dtype=torch.float64)
    if not len(rows) or float(off.abs().max()) <= ORTHONORMAL_TOLERANCE:
        return vh
    p, _, qh = torch.linalg.svd(rows, full_matrices=False)
    basis = vh.clone()
    basis[used] = (p @ qh).to(vh.dtype)
    return basis


def _by_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Project on the leading right singular subspace, then decompose the small remainder (Rayleigh-Ritz)."""
    if matrix.shape[0] < matrix.shape[1]:
        u, s, vh = _by_gram(matrix.T, rank)
        return vh.T, s, u.T
    v = leading_right_vectors(matrix, rank)  # [D_in, R]
    q, r = torch.linalg.qr(matrix @ v)
    u, s, vh = torch.linalg.svd(r)
    return q @ u, s, vh @ v.T


def _normalized(u: Tensor, s: Tensor, vh: Tensor, dtype: torch.dtype) -> LowRank:
    """Fix the signs and clear what lies beyond the numerical rank."""
    peak = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, peak) < 0, -1.0, 1.0)
    present = (s > NUMERICAL_RANK_CUTOFF * s[0]).double()
    parts = (u * sign * present, s * present, vh * sign.T * present[:, None])
    return LowRank(*(part.to(dtype).contiguous() for part in parts))
