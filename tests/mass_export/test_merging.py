"""TSV-M and its neighbours on single matrices."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mass_export.low_rank import LowRank, factorize
from mass_export.merging import IllConditionedWarning, merge_isotropic, merge_sum, merge_tsvm, polar_factor


def random_factors(seed: int, shape: tuple[int, int] = (12, 10), rank: int = 3) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return factorize(torch.randn(shape, generator=generator, dtype=torch.float64), rank)


@settings(deadline=None)
@given(st.integers(0, 2**31))
def test_polar_factor_of_a_stack_is_orthonormal_and_nearest(seed: int) -> None:
    stack = torch.randn(9, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = polar_factor(stack)
    torch.testing.assert_close(q.T @ q, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-10)
    symmetric = q.T @ stack  # stack = q (q^T stack), the second factor symmetric and positive
    torch.testing.assert_close(symmetric, symmetric.T, rtol=0, atol=1e-10)
    assert (torch.linalg.eigvalsh(symmetric) > 0).all()


def test_tsvm_of_one_task_is_that_task() -> None:
    task = random_factors(0)
    torch.testing.assert_close(merge_tsvm([task]), task.delta(), rtol=0, atol=1e-12)


def test_tsvm_of_orthogonal_tasks_is_their_sum() -> None:
    u, v = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0], torch.eye(8, dtype=torch.float64)
    first = LowRank(u[:, :2], torch.tensor([3.0, 1.0], dtype=torch.float64), v[:2])
    second = LowRank(u[:, 2:5], torch.tensor([5.0, 2.0, 1.0], dtype=torch.float64), v[2:5])
    torch.testing.assert_close(
        merge_tsvm([first, second]), first.delta() + second.delta(), rtol=0, atol=1e-12
    )


def test_tsvm_does_not_depend_on_the_order_of_tasks() -> None:
    tasks = [random_factors(i) for i in range(3)]
    torch.testing.assert_close(merge_tsvm(tasks), merge_tsvm(tasks[::-1]), rtol=0, atol=1e-10)


def test_tsvm_orthogonalises_overlapping_tasks() -> None:
    tasks = [random_factors(i, (6, 5), 2) for i in range(2)]
    plain = tasks[0].delta() + tasks[1].delta()
    assert (merge_tsvm(tasks) - plain).abs().max() > 0.01


def test_the_same_task_twice_counts_once_and_warns_with_the_layer() -> None:
    task = random_factors(0)
    with pytest.warns(IllConditionedWarning, match="mlp.c_fc.weight: 3 of 6"):
        merged = merge_tsvm([task, task], "mlp.c_fc.weight")
    torch.testing.assert_close(merged, task.delta(), rtol=0, atol=1e-10)


def test_a_zero_task_changes_nothing_and_is_not_warned_about() -> None:
    task, zero = random_factors(0), factorize(torch.zeros(12, 10, dtype=torch.float64), 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(merge_tsvm([task, zero]), task.delta(), rtol=0, atol=1e-10)
        assert not merge_tsvm([zero, zero]).any()


def test_sum_weights_scale_the_deltas() -> None:
    a, b = random_factors(0), random_factors(1)
    torch.testing.assert_close(merge_sum([a, b], [0.25, 0.75]), 0.25 * a.delta() + 0.75 * b.delta())


def test_isotropic_has_one_singular_value_the_mean() -> None:
    total = torch.randn(6, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    values = torch.linalg.svdvals(merge_isotropic(total))
    torch.testing.assert_close(values, torch.linalg.svdvals(total).mean().expand(4), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(300, 150), (150, 300), (150, 150)])
@pytest.mark.parametrize("smallest", [1e-1, 2e-3, 2e-4, 1e-6])
def test_the_polar_factor_of_a_large_stack_equals_that_by_full_decomposition(
    shape: tuple[int, int], smallest: float
) -> None:
    generator = torch.Generator().manual_seed(5)
    left, right = (
        torch.linalg.qr(torch.randn(size, 150, generator=generator, dtype=torch.float64))[0] for size in shape
    )
    sigma = torch.linspace(1, 0, 150).double() * (1 - smallest) + smallest
    sigma[sigma < 1e-3] = smallest
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", IllConditionedWarning)
        factor = polar_factor((left * sigma) @ right.T)
    expected = (left * (sigma > 1e-4 * sigma[0])) @ right.T
    torch.testing.assert_close(factor, expected, rtol=0, atol=1e-7)
    large = torch.linalg.svdvals(factor)
    assert ((large - large.round()).abs() < 1e-9).all()


def test_a_large_stack_of_zeros_has_a_zero_polar_factor() -> None:
    assert not polar_factor(torch.zeros(200, 140)).any()
