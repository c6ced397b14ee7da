from __future__ import annotations

import json

import numpy as np
import pytest

from mass_export.datasets import load_labelled_images
from mass_export.errors import DataError
from mass_export.evaluation import Answers, evaluate_bundle, evaluation_from_answers
from mass_export.progress import Progress
from runtime import Classifier

QUIET = Progress(quiet=True)


def answers(labels, task_index, class_index, selected, known=None):
    selected = np.array(selected, bool)
    return Answers(
        labels=np.array(labels),
        task_index=np.array(task_index),
        class_index=np.array(class_index),
        known_class_index=np.array(class_index if known is None else known),
        top_gate=selected.argmax(axis=1),
        selected=selected,
        verified=selected.sum(axis=1) > 1,
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
