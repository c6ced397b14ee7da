"""Factorisation of single matrices."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mass_export.low_rank import factorize

sizes = st.integers(2, 12)


@given(sizes, sizes, st.integers(0, 2**31))
def test_full_rank_reconstructs_the_matrix(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(factorize(delta, min(rows, columns)).delta(), delta, rtol=0, atol=1e-12)


@given(sizes, sizes, st.integers(0, 2**31), st.data())
def test_bases_are_orthonormal_and_values_descend(
    rows: int, columns: int, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    low_rank = factorize(delta, rank)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(low_rank.u.T @ low_rank.u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_rank.vh @ low_rank.vh.T, eye, rtol=0, atol=1e-12)
    assert (low_rank.s.diff() <= 0).all()


def test_truncation_is_the_best_approximation_in_the_frobenius_norm() -> None:
    delta = torch.randn(9, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = (delta - factorize(delta, 2).delta()).norm()
    assert error == pytest.approx(torch.linalg.svdvals(delta)[2:].norm().item(), rel=1e-12)


def test_signs_are_fixed_so_that_equal_matrices_give_equal_factors() -> None:
    delta = torch.randn(7, 5, generator=torch.Generator().manual_seed(1))
    low_rank = factorize(delta, 3)
    peaks = low_rank.u.gather(0, low_rank.u.abs().argmax(dim=0, keepdim=True))
    assert (peaks > 0).all()
    assert torch.equal(low_rank.u, factorize(delta.clone(), 3).u)


def test_a_zero_matrix_has_zero_factors() -> None:
    low_rank = factorize(torch.zeros(4, 3), 2)
    assert not any(part.any() for part in (low_rank.u, low_rank.s, low_rank.vh))


def test_triplets_beyond_the_numerical_rank_are_zero() -> None:
    delta = torch.outer(torch.arange(1.0, 5), torch.arange(1.0, 4)).double()
    low_rank = factorize(delta, 3)
    assert low_rank.s[0] > 0
    assert not low_rank.s[1:].any()
    assert not low_rank.u[:, 1:].any()
    assert not low_rank.vh[1:].any()


def test_factors_keep_the_dtype_of_the_matrix() -> None:
    assert factorize(torch.ones(3, 3), 1).u.dtype == torch.float32
