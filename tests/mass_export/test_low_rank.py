"""Factorisation of single matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_export.low_rank import factorize, factorize_product

sizes = st.integers(2, 12)


@settings(deadline=None)
@given(sizes, sizes, st.integers(0, 2**31))
def test_full_rank_reconstructs_the_matrix(rows: int, columns: int, seed: int) -> None:
    delta = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(factorize(delta, min(rows, columns)).delta(), delta, rtol=0, atol=1e-12)


@settings(deadline=None)
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


def graded(shape: tuple[int, int], spectrum: torch.Tensor) -> torch.Tensor:
    """A matrix with these singular values and random bases."""
    generator = torch.Generator().manual_seed(4)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(spectrum), generator=generator, dtype=torch.float64))[0]
        for size in shape
    )
    return (left * spectrum) @ right.T


DECAYS = {
    "flat": torch.linspace(2, 1, 160).double(),
    "power law": torch.arange(1, 161).double().rsqrt(),
    "to 1e-4 at the rank": torch.logspace(0, -16, 160).double(),
    "to 1e-9 at the rank": torch.logspace(0, -36, 160).double(),
    "an adapter and rounding": torch.cat([torch.ones(8), torch.full((152,), 1e-7)]).double(),
}


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("shape", [(400, 160), (160, 400), (160, 160)])
def test_large_matrices_by_their_gram_matrix_equal_the_full_decomposition(
    shape: tuple[int, int], decay: str
) -> None:
    rank, spectrum = 40, DECAYS[decay]
    matrix = graded(shape, spectrum)
    low_rank, (u, s, vh) = factorize(matrix, rank), torch.linalg.svd(matrix, full_matrices=False)
    torch.testing.assert_close(low_rank.s, s[:rank], rtol=1e-5, atol=0)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(low_rank.u.T @ low_rank.u, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(low_rank.vh @ low_rank.vh.T, eye, rtol=0, atol=1e-12)
    kept = (
        8 if decay.startswith("an adapter") else rank
    )  # equal singular values have no subspaces of their own
    for mine, full in ((low_rank.u[:, :kept], u[:, :kept]), (low_rank.vh[:kept].T, vh[:kept].T)):
        assert torch.linalg.matrix_norm(mine @ mine.T - full @ full.T) < 1e-5
    best = (matrix - (u[:, :rank] * s[:rank]) @ vh[:rank]).norm()
    assert (matrix - low_rank.delta()).norm() <= best + 1e-12 * s[0]


def test_a_large_matrix_of_low_rank_has_no_triplets_beyond_it() -> None:
    low_rank = factorize(graded((300, 200), torch.arange(5, 0, -1).double()), 50)
    assert int((low_rank.s > 0).sum()) == 5
    assert int((low_rank.vh.norm(dim=1) > 0).sum()) == 5
    assert not factorize(torch.zeros(300, 200), 50).s.any()


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 4), st.integers(0, 2**31))
def test_a_product_is_factorised_from_its_factors(rows: int, columns: int, inner: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, columns, generator=generator, dtype=torch.float64)
    rank = min(inner, rows, columns)
    low_rank = factorize_product(left, right, rank)
    torch.testing.assert_close(low_rank.delta(), left @ right, rtol=0, atol=1e-11)
    torch.testing.assert_close(low_rank.s, factorize(left @ right, rank).s, rtol=1e-9, atol=1e-11)
