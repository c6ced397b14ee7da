from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
import pytest

from runtime.bundle import RouterSpec, TaskSpec
from runtime.prediction import ForwardResult, Prediction, predictions_from_result

TASKS = (
    TaskSpec("cars", ("suv", "sedan"), 0, 2),
    TaskSpec("birds", ("owl",), 2, 3),
    TaskSpec("x<y", ("z",), 3, 4),
)
ROUTER = RouterSpec(
    "top1",
    0.0,
    1.0,
    1,
    "max",
    confidence_scale=2.0,
    layers=(1,),
    site="mlp",
    token="cls",  # noqa: S106
    norm="l2",
)


def result(residuals, answers):
    count = len(answers)
    gates = np.eye(3, dtype=np.float32)[answers]
    return ForwardResult(
        None if residuals is None else np.array(residuals, np.float32),
        gates,
        gates > 0,
        np.tile(np.array([1, 2, 3, 4], np.float32), (count, 1)),
        np.array(answers),
        np.zeros(count, np.int64),
        np.zeros(count, np.bool_),
    )


def test_margin_and_confidence_follow_their_formulas():
    first, second = predictions_from_result(
        result([[1.0, 2.5, 3.0], [0.5, 0.4, 2.0]], [0, 0]), TASKS, 5, router=ROUTER
    )
    assert first.route_margin == pytest.approx(1.5)
    shares = np.exp([-2.0, -5.0, -6.0])
    assert first.route_confidence == pytest.approx(shares[0] / shares.sum(), rel=1e-6)
    # where another task answers than the best (verification), the confidence is that task's
    shares = np.exp(-2 * np.float32([0.5, 0.4, 2.0]))
    assert second.route_confidence == pytest.approx(shares[0] / shares.sum(), rel=1e-6)
    assert second.route_confidence < 0.5


def test_tasks_that_may_not_answer_have_no_share():
    (found,) = predictions_from_result(
        result([[1.0, 2.5, 0.1]], [0]), TASKS, 5, allowed=(0, 1), router=ROUTER
    )
    assert found.route_confidence == pytest.approx(1 / (1 + np.exp(-3.0)))
    assert found.route_margin == pytest.approx(1.5)


def test_a_given_task_has_neither_margin_nor_confidence():
    (found,) = predictions_from_result(result(None, [1]), TASKS, 5, allowed=(1,), router=ROUTER)
    assert found.route_margin is found.route_confidence is None


class Balanced(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text = [], []

    def handle_starttag(self, tag, _attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("is_unknown", [None, False, True])
def test_a_notebook_shows_answer_alternatives_and_gates_escaped(is_unknown):
    prediction = Prediction(
        "x<y", "a&b", 0.75, (("x<y", "a&b", 0.75), ("x<y", "c", 0.25)),
        {"x<y": 0.9, "cars": 0.1}, {"x<y": 1.0, "cars": 2.0},
        route_margin=1.0, route_confidence=0.8, unknown=3.0, is_unknown=is_unknown,
    )  # fmt: skip
    html = prediction._repr_html_()
    page = Balanced()
    page.feed(html)
    assert page.open == []
    text = " ".join(page.text)
    for shown in ("a&b", "x<y", "75.0%", "25.0%", "route 80.0%", "0.90", "cars"):
        assert shown in text
    assert ("no known task" in text) == (is_unknown is True)
    assert not re.search(r"#[0-9a-f]{3,6}|https?:", html)  # the notebook's own colours, no network
