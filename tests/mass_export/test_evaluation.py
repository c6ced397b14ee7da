from __future__ import annotations

import json

import numpy as np
import pytest

from mass_export.datasets import load_labelled_images
from mass_export.discriminant import fit_confidence_scale
from mass_export.errors import DataError
from mass_export.evaluation import Answers, area_under_roc, evaluate_bundle, evaluation_from_answers
from mass_export.progress import Progress
from runtime import Classifier

QUIET = Progress(quiet=True)


def answers(labels, task_index, class_index, selected, known=None, confidence=None):
    selected = np.array(selected, bool)
    return Answers(
        labels=np.array(labels),
        task_index=np.array(task_index),
        class_index=np.array(class_index),
        known_class_index=np.array(class_index if known is None else known),
        top_gate=selected.argmax(axis=1),
        selected=selected,
        verified=selected.sum(axis=1) > 1,
        confidence=np.array([np.nan] * len(labels) if confidence is None else confidence, float),
    )


@pytest.fixture
def two_tasks():
    first = answers([0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1], [[1, 0], [1, 1], [1, 1], [0, 1]], [0, 1, 1, 1])
    second = answers([2, 2], [1, 1], [2, 2], [[0, 1], [0, 1]])
    return evaluation_from_answers(["a", "b"], [first, second], "test", {"a": 0.5, "b": 1.0})


def test_joint_accuracy_needs_task_and_class_right_but_the_reference_metric_only_the_index(two_tasks):
    scores = two_tasks.tasks["a"]
    assert scores.joint_accuracy == 0.25
    assert scores.reference_accuracy == 0.5
    assert scores.known_task_accuracy == 0.75


def test_routing_counts_the_answering_task_and_kept_counts_the_set(two_tasks):
    scores = two_tasks.tasks["a"]
    assert scores.routing_accuracy == 0.5
    assert scores.top_gate_accuracy == 0.75
    assert scores.kept_accuracy == 0.75
    assert scores.mean_tasks_selected == 1.5
    assert scores.verified_share == 0.5


def test_every_task_counts_once_in_the_average_however_many_images_it_has(two_tasks):
    assert two_tasks.average.joint_accuracy == (0.25 + 1.0) / 2
    assert two_tasks.average.images == 6


def test_the_normalised_score_is_the_ratio_of_averages_with_the_mean_of_ratios_beside_it(two_tasks):
    assert two_tasks.normalized_joint_accuracy == pytest.approx((0.25 + 1.0) / 1.5)
    assert two_tasks.mean_normalized_joint_accuracy == pytest.approx((0.5 + 1.0) / 2)
    assert two_tasks.normalized_known_task_accuracy == pytest.approx((0.75 + 1.0) / 1.5)


def test_rows_of_the_confusion_matrix_are_true_tasks(two_tasks):
    assert two_tasks.confusion == ((2, 2), (0, 2))


def test_without_fine_tuned_accuracies_no_normalised_score_is_claimed(two_tasks):
    plain = evaluation_from_answers(["b"], [answers([0], [0], [0], [[1]])], "test").to_dict()
    assert not [name for name in plain if name.startswith("normalized")]
    assert "normalized_joint_accuracy" not in plain["tasks"]["b"]
    assert "normalized_joint_accuracy" in two_tasks.to_dict()["tasks"]["a"]


def test_scores_survive_json(two_tasks):
    data = json.loads(json.dumps(two_tasks.to_dict()))
    assert data["joint_accuracy"] == 0.625
    assert data["tasks"]["a"]["finetuned_accuracy"] == 0.5
    assert data["confusion"] == [[2, 2], [0, 2]]


def test_the_bundle_is_scored_as_its_own_predictions_say(pico_bundle):
    _, data, bundle = pico_bundle(router={"layer": 1})
    evaluation = evaluate_bundle(bundle, data, progress=QUIET)
    with Classifier(bundle, provider="cpu") as classifier:
        for row, task in enumerate(classifier.manifest.tasks):
            images = load_labelled_images(data, task)
            said = classifier.predict(images.sources)
            told = classifier.predict(images.sources, tasks=[task.name])
            truth = [task.classes[label] for label in images.labels]
            scores = evaluation.tasks[task.name]
            joint = [p.task == task.name and p.label == label for p, label in zip(said, truth, strict=True)]
            assert scores.joint_accuracy == pytest.approx(np.mean(joint))
            known = [p.label == label for p, label in zip(told, truth, strict=True)]
            assert scores.known_task_accuracy == pytest.approx(np.mean(known))
            answered = [sum(p.task == name for p in said) for name in classifier.tasks]
            assert list(evaluation.confusion[row]) == answered


def test_images_of_every_task_must_be_there(pico_bundle):
    _, data, bundle = pico_bundle()
    (data / "data/task1/test.npz").unlink()
    with pytest.raises(DataError, match="no images of task 'task1'"):
        evaluate_bundle(bundle, data, progress=QUIET)


def test_confidence_is_compared_with_how_often_routes_are_right():
    first = answers([0] * 4, [0, 0, 0, 1], [0] * 4, [[1, 0]] * 4, confidence=[0.95, 0.95, 0.95, 0.55])
    second = answers([0], [0], [0], [[1, 0]], confidence=[0.95])
    found = evaluation_from_answers(["a", "b"], [first, second], "test").confidence
    assert found.mean == pytest.approx(0.87)
    # of four routes at .95 three are right, and the one at .55 is wrong
    assert found.error == pytest.approx((4 * abs(0.95 - 0.75) + 0.55) / 5)
    assert found.auroc == pytest.approx((0.5 + 1.0) / 2)


def test_without_a_first_pass_nothing_is_said_of_confidence(two_tasks):
    assert two_tasks.confidence is None
    assert two_tasks.to_dict()["confidence"] is None


def test_area_under_roc_counts_ties_half():
    assert area_under_roc(np.array([0.9, 0.5]), np.array([0.5, 0.1])) == pytest.approx(3.5 / 4)
    assert area_under_roc(np.array([0.9]), np.array([])) is None


def test_the_fitted_scale_makes_scores_probabilities():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20000, 3))
    shares = np.exp(2.5 * scores)
    shares /= shares.sum(axis=1, keepdims=True)
    labels = (rng.random((len(scores), 1)) > shares.cumsum(axis=1)).sum(axis=1)
    assert fit_confidence_scale(scores, labels) == pytest.approx(2.5, rel=0.05)
    assert fit_confidence_scale(scores / 50, labels) == pytest.approx(125, rel=0.05)
    assert fit_confidence_scale(scores, scores.argmax(axis=1)) == pytest.approx(1e3)  # never wrong
