"""Leading right singular vectors of a tall matrix through its Gram matrix, in float64."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

GRAM_FROM = 128  # smaller matrices are decomposed in milliseconds as they are
# What one Gram matrix resolves: singular values down to this share of the largest. Squaring a matrix leaves half
# of float64's digits, so that an eigenvalue of 1e-8 of the largest still has 8 of them.
_RESOLVED = 1e-4
_NOTHING_LEFT = 1e-11  # of the largest singular value of all; below the numerical rank


def leading_right_vectors(matrix: Tensor, count: int) -> Tensor:
    """Orthonormal basis of the `count` leading right singular vectors, in descending order.

    The eigenvectors of `A^T A` are the right singular vectors of A. Squaring loses small singular values beside
    large ones, so only those within 1e-4 of the largest are taken from one Gram matrix; they are then projected out
    and the next ones come from the Gram matrix of the rest. Real task vectors need one round; adapters merged into
    16-bit weights two.

    Args:
        matrix: A. [M, N] float64, M >= N
        count: at most N.

    Returns:
        [N, count] float64
    """
    rest, found, largest = matrix, matrix.new_empty(matrix.shape[1], 0), None
    while found.shape[1] < count:
        values, vectors = _leading_eigenpairs(gram(rest), count - found.shape[1])
        sigma = values.clamp_min(0).sqrt()
        largest = sigma[0] if largest is None else largest
        taken = int((sigma >= _RESOLVED * sigma[0]).sum())
        if sigma[0] <= _NOTHING_LEFT * largest:  # whatever completes the basis
            taken = vectors.shape[1]
        found = torch.linalg.qr(torch.cat([found, vectors[:, :taken]], dim=1))[0]
        if found.shape[1] < count:
            rest = rest - (rest @ found) @ found.T
    return found


def gram(matrix: Tensor) -> Tensor:
    """`A^T A`. [M, N] -> [N, N]"""
    array = matrix.numpy()
    return torch.from_numpy(array.T @ array)  # numpy computes one triangle alone, torch both


def eigenpairs(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and their vectors as columns. [N, N] float64 -> [N], [N, N]"""
    values, vectors = np.linalg.eigh(symmetric.numpy())  # a fifth faster than torch's
    return torch.from_numpy(values), torch.from_numpy(vectors)


def _leading_eigenpairs(symmetric: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenvalues, descending, and their vectors as columns."""
    values, vectors = eigenpairs(symmetric)
    return values.flip(0)[:count], vectors.flip(1)[:, :count]
