"""A task vector's matrices as truncated singular value decompositions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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

    def delta(self) -> Tensor:
        """The dense matrix. [D_out, D_in]"""
        return (self.u * self.s) @ self.vh


def factorize(delta: Tensor, rank: int) -> LowRank:
    """Keep the top `rank` singular triplets of a matrix (arXiv 2504.05342, section 3.2).

    The decomposition is done in float64 and returned in the dtype of `delta`. The sign of every triplet is fixed
    (the largest entry of each `u` column is positive), so that equal matrices give equal factors. Triplets beyond
    the numerical rank (s <= 1e-10 of the largest, or all of a zero matrix) have arbitrary bases that would disturb
    other tasks' orthogonalisation: their s, u column and vh row are set to zero, and contribute nothing anywhere.

    Args:
        delta: one matrix of a task vector. [D_out, D_in]
        rank: 1 <= rank <= min(D_out, D_in).
    """
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    peak = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, peak) < 0, -1.0, 1.0)
    present = (s > NUMERICAL_RANK_CUTOFF * s[0]).double()
    low_rank = LowRank(u * sign * present, s * present, vh * sign.T * present[:, None])
    return LowRank(*(part.contiguous() for part in vars(low_rank.to(delta.dtype)).values()))
