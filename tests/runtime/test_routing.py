"""Residuals to gates to sets to answers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from runtime.bundle import TaskSpec
from runtime.routing import Selection, answer, gates_from_residuals, select_tasks

MODES = ["topk", "top1", "weighted"]


def residuals_of(max_tasks=7):
    shapes = st.tuples(st.integers(1, 4), st.integers(1, max_tasks))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=st.floats(0, 50, width=16)))


modes = st.sampled_from(MODES)
temperatures = st.floats(0.125, 8)
thresholds = st.floats(0, 0.99)


def test_topk_gates_are_the_softmax_of_standardised_closeness():
    r = np.array([[1.0, 2.0, 4.0]])
    a = (-r + r.mean()) / (np.sqrt(((r - r.mean()) ** 2).sum() / 2) + 1e-6)
    expected = np.exp(a / 0.5) / np.exp(a / 0.5).sum()
    gates = gates_from_residuals(r.astype(np.float32), "topk", 0.5)
    assert gates.dtype == np.float32
    assert np.allclose(gates, expected, atol=1e-7)


def test_weighted_gates_are_the_softmax_of_closeness():
    gates = gates_from_residuals(np.array([[1.0, 2.0, 4.0]]), "weighted", 2.0)
    expected = np.exp([-0.5, -1, -2])
    assert np.allclose(gates, expected / expected.sum(), atol=1e-7)


def test_top1_is_one_hot_and_ties_go_to_the_lowest_index():
    gates = gates_from_residuals(np.array([[3.0, 1.0, 1.0]]), "top1", 1.0)
    assert gates.tolist() == [[0, 1, 0]]


def test_equal_residuals_give_equal_gates():
    gates = gates_from_residuals(np.full((1, 4), 7, np.float32), "topk", 1.0)
    assert np.allclose(gates, 0.25)


@pytest.mark.parametrize("mode", MODES)
def test_a_single_task_has_gate_one(mode):
    assert gates_from_residuals(np.array([[123.0], [0.0]]), mode, 1.0).tolist() == [[1], [1]]


@given(residuals_of(), modes, temperatures)
def test_gates_sum_to_one_and_the_closest_task_has_the_largest(residuals, mode, temperature):
    gates = gates_from_residuals(residuals, mode, temperature)
    assert np.allclose(gates.sum(axis=1), 1, atol=1e-5)
    closest = residuals.argmin(axis=1)
    assert (gates[np.arange(len(gates)), closest] == gates.max(axis=1)).all()


@given(residuals_of(), st.sampled_from(["topk", "weighted"]), temperatures, st.randoms())
def test_permuting_tasks_permutes_gates(residuals, mode, temperature, random):
    order = list(range(residuals.shape[1]))
    random.shuffle(order)
    gates = gates_from_residuals(residuals, mode, temperature)
    assert np.allclose(
        gates_from_residuals(residuals[:, order], mode, temperature), gates[:, order], atol=1e-6
    )


@given(residuals_of(), modes, temperatures, thresholds, st.integers(1, 4))
def test_a_sample_does_not_depend_on_its_batch(residuals, mode, temperature, threshold, max_tasks):
    gates = gates_from_residuals(residuals, mode, temperature)
    selection = select_tasks(gates, mode, threshold, max_tasks)
    for row in range(len(residuals)):
        alone = gates_from_residuals(residuals[row : row + 1], mode, temperature)
        assert np.array_equal(alone[0], gates[row])
        assert select_tasks(alone, mode, threshold, max_tasks).sets()[0] == selection.sets()[row]


@given(residuals_of(), modes, temperatures, st.data())
def test_only_allowed_tasks_get_gates_and_as_if_alone(residuals, mode, temperature, data):
    tasks = residuals.shape[1]
    allowed = data.draw(st.lists(st.integers(0, tasks - 1), min_size=1, unique=True))
    gates = gates_from_residuals(residuals, mode, temperature, allowed)
    columns = sorted(allowed)
    assert np.array_equal(gates[:, columns], gates_from_residuals(residuals[:, columns], mode, temperature))
    assert not np.delete(gates, columns, axis=1).any()
    for tasks_of_sample in select_tasks(gates, mode, 0.0, 3).sets():
        assert set(tasks_of_sample) <= set(allowed)


def plain_selection(gates, mode, threshold, max_tasks):
    """The definition, one sample at a time."""
    kept = [i for i, gate in enumerate(gates) if gate > np.float32(threshold) and mode != "top1"]
    if not kept:
        return [int(np.argmax(gates))]
    if mode == "topk" and len(kept) > max_tasks:
        return sorted(kept, key=lambda i: -gates[i])[:max_tasks]
    return kept


@given(residuals_of(), modes, thresholds, st.integers(1, 9))
def test_sets_and_their_order_follow_the_definition(residuals, mode, threshold, max_tasks):
    gates = gates_from_residuals(residuals, mode, 1.0)
    selection = select_tasks(gates, mode, threshold, max_tasks)
    assert selection.selected.dtype == np.bool_
    assert selection.order.dtype == np.int64
    for row in range(len(gates)):
        expected = plain_selection(gates[row], mode, threshold, max_tasks)
        assert selection.order[row, : len(expected)].tolist() == expected
        assert sorted(selection.order[row]) == list(range(gates.shape[1]))
        assert selection.sets()[row] == tuple(sorted(expected))


def test_the_cap_of_topk_keeps_the_largest_and_orders_by_gate():
    gates = np.array([[0.22, 0.26, 0.24, 0.28]], np.float32)
    selection = select_tasks(gates, "topk", 0.2, 2)
    assert selection.sets() == [(1, 3)]
    assert selection.order[0, :2].tolist() == [3, 1]
    assert select_tasks(gates, "topk", 0.2, 4).order[0].tolist() == [0, 1, 2, 3]
    assert select_tasks(gates, "weighted", 0.2, 2).sets() == [(0, 1, 2, 3)]


def test_a_gate_equal_to_the_threshold_does_not_pass():
    gates = np.array([[0.2, 0.8]], np.float32)
    assert select_tasks(gates, "topk", 0.2, 3).sets() == [(1,)]


def test_the_largest_gate_answers_alone_when_none_passes():
    gates = np.array([[0.3, 0.4, 0.3]], np.float32)
    assert select_tasks(gates, "topk", 0.9, 3).sets() == [(1,)]


TASKS = (
    TaskSpec("a", ("a0", "a1"), 0, 2),
    TaskSpec("b", ("b0",), 2, 3),
    TaskSpec("c", ("c0", "c1", "c2"), 3, 6),
)


def select_sets(*orders):
    rest = [[*order, *(i for i in range(3) if i not in order)] for order in orders]
    return Selection(np.array([[i in order for i in range(3)] for order in orders]), np.array(rest, np.int64))


def test_the_head_with_the_largest_logit_of_the_set_answers():
    logits = np.array([[1, 5, 9, 0, 2, 6], [1, 5, 9, 0, 2, 6], [1, 5, 9, 0, 2, 6]], np.float32)
    task_index, class_index = answer(logits, TASKS, select_sets([0, 1, 2], [0, 2], [0]), "max")
    assert task_index.tolist() == [1, 2, 0]
    assert class_index.tolist() == [0, 2, 1]
    assert task_index.dtype == class_index.dtype == np.int64


def test_the_head_with_the_largest_mean_logit_answers():
    logits = np.array([[-9, 10, 1, -1, -1, -1]], np.float32)
    task_index, class_index = answer(logits, TASKS, select_sets([0, 1, 2]), "mean")
    assert (task_index.tolist(), class_index.tolist()) == ([1], [0])


def test_of_equal_bids_the_first_in_order_wins():
    logits = np.array([[4, 4, 4, 1, 4, 4]] * 3, np.float32)
    task_index, class_index = answer(logits, TASKS, select_sets([0, 1, 2], [2, 1], [1, 2]), "max")
    assert task_index.tolist() == [0, 2, 1]
    assert class_index.tolist() == [0, 1, 0]
