"""How right is a bundle? Accuracies on labelled images, each with a name that says what was known.

All of them are shares of the images of a task; averages are over tasks, each task counting once. Beside them
the accuracy of each task's own fine-tuned model on the same images can stand, to divide by: the average
`normalized_joint_accuracy` is the average joint accuracy divided by the average fine-tuned accuracy, and
`mean_normalized_joint_accuracy` is the average of the tasks' own ratios.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.datasets import DEFAULT_SPLIT, LabelledImages, load_labelled_images
from mass_export.progress import Progress
from mass_export.spec import TaskInfo
from runtime.bundle import PreprocessSpec
from runtime.classifier import Classifier
from runtime.prediction import route_shares
from runtime.provider import Provider

BINS = 10


@dataclass(frozen=True)
class TaskScores:
    """What a bundle gets right on the images of one task, or on average over tasks.

    Attributes:
        images: how many there are.
        joint_accuracy: task and class are both right, nothing given. The headline.
        reference_accuracy: the class index is right, whichever task's head answered (the metric of the
            paper's code; a wrong head can score).
        known_task_accuracy: the class is right when the task is given.
        routing_accuracy: the right task answered.
        top_gate_accuracy: the right task has the largest gate.
        kept_accuracy: the right task is in the selected set.
        mean_tasks_selected: size of the selected set.
        verified_share: images whose second-best task was run as well, because the route was unsure.
    """

    images: int
    joint_accuracy: float
    reference_accuracy: float
    known_task_accuracy: float
    routing_accuracy: float
    top_gate_accuracy: float
    kept_accuracy: float
    mean_tasks_selected: float
    verified_share: float = 0.0


@dataclass(frozen=True)
class Confidence:
    """How far a route's confidence can be trusted, over all images.

    Attributes:
        mean: of the confidence; as large as the share of right routes if it is a probability.
        error: expected calibration error, the mean distance of confidence and share of right routes over ten bins of
            equal width (Guo et al. 2017, eq. 3).
        auroc: area under the ROC curve of telling right routes from wrong ones by it; None if all are alike.
    """

    mean: float
    error: float
    auroc: float | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of a bundle on a split.

    Attributes:
        split: of the images.
        tasks: scores by task name, in the bundle's order.
        average: over tasks.
        confusion: images of each task (row) that each task answered (column). [T][T]
        finetuned: accuracy of each task's own model on the same images, or None where that is not known.
        confidence: of the routes; None with one task.
    """

    split: str
    tasks: Mapping[str, TaskScores]
    average: TaskScores
    confusion: tuple[tuple[int, ...], ...]
    finetuned: Mapping[str, float] | None = None
    confidence: Confidence | None = None

    @property
    def normalized_joint_accuracy(self) -> float | None:
        """Average joint accuracy divided by the average fine-tuned accuracy."""
        return self._ratio("joint_accuracy")

    @property
    def normalized_known_task_accuracy(self) -> float | None:
        """The same for the accuracy with the task given."""
        return self._ratio("known_task_accuracy")

    @property
    def mean_normalized_joint_accuracy(self) -> float | None:
        """Average over tasks of joint accuracy divided by the task's fine-tuned accuracy."""
        if self.finetuned is None or min(self.finetuned.values()) == 0:
            return None
        return _mean([scores.joint_accuracy / self.finetuned[name] for name, scores in self.tasks.items()])

    def _ratio(self, score: str) -> float | None:
        if self.finetuned is None or not sum(self.finetuned.values()):
            return None
        return float(getattr(self.average, score)) / _mean(list(self.finetuned.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the averages at the top, the tasks below."""
        ratios = {
            name: value
            for name in (
                "normalized_joint_accuracy",
                "normalized_known_task_accuracy",
                "mean_normalized_joint_accuracy",
            )
            if (value := getattr(self, name)) is not None
        }
        tasks = {}
        for name, scores in self.tasks.items():
            tasks[name] = asdict(scores)
            if self.finetuned is not None:
                own = self.finetuned[name]
                tasks[name]["finetuned_accuracy"] = own
                tasks[name]["normalized_joint_accuracy"] = scores.joint_accuracy / own if own else None
        return {
            "split": self.split,
            **ratios,
            **asdict(self.average),
            "tasks": tasks,
            "confusion": [list(row) for row in self.confusion],
            "confidence": None if self.confidence is None else asdict(self.confidence),
        }


@dataclass(frozen=True)
class Answers:
    """What a bundle said about the images of one task, the task unknown except in `known_class_index`.

    Attributes:
        labels: true classes. [N]
        task_index: the task that answered. [N]
        class_index: the class it gave. [N]
        known_class_index: the class given by the true task alone. [N]
        top_gate: task with the largest gate. [N]
        selected: the sets. [N, T] bool
        verified: whether two tasks were run one by one. [N] bool
        confidence: of the route; NaN with one task. [N]
    """

    labels: NDArray[np.int64]
    task_index: NDArray[np.int64]
    class_index: NDArray[np.int64]
    known_class_index: NDArray[np.int64]
    top_gate: NDArray[np.int64]
    selected: NDArray[np.bool_]
    verified: NDArray[np.bool_]
    confidence: NDArray[np.float64]

    def scores(self, task: int) -> TaskScores:
        """Scores when all images are of the task with this index."""
        right_class, right_task = self.class_index == self.labels, self.task_index == task
        return TaskScores(
            images=len(self.labels),
            joint_accuracy=_share(right_class & right_task),
            reference_accuracy=_share(right_class),
            known_task_accuracy=_share(self.known_class_index == self.labels),
            routing_accuracy=_share(right_task),
            top_gate_accuracy=_share(self.top_gate == task),
            kept_accuracy=_share(self.selected[:, task]),
            mean_tasks_selected=float(self.selected.sum(axis=1).mean()),
            verified_share=_share(self.verified),
        )


def evaluate_bundle(
    bundle: Path,
    data: Path,
    *,
    split: str = DEFAULT_SPLIT,
    finetuned: Mapping[str, float] | None = None,
    provider: Provider = "auto",
    images_per_task: int | None = None,
    progress: Progress,
) -> Evaluation:
    """Classify every labelled image with the task unknown, and again with the task given.

    Args:
        bundle: directory of the exported bundle.
        data: directory of labelled images, see `mass_export.datasets`.
        split: such as `test` or `val`.
        finetuned: accuracy of each task's own model on the same images, to normalise by.
        provider: of the runtime.
        images_per_task: at most so many images of each task, a fixed random sample; None for all.
        progress: where to show it.

    Raises:
        DataError: images of a task are missing or do not fit.
        BundleError: the bundle is damaged.
    """
    with Classifier(bundle, provider=provider) as classifier:
        tasks = [TaskInfo(task.name, task.classes) for task in classifier.manifest.tasks]
        spec = classifier.manifest.preprocess
        answers = []
        for task in progress.track(tasks, f"Classifying {split} images"):
            images = load_labelled_images(data, task, split)
            chosen = images if images_per_task is None else images.sample(images_per_task)
            answers.append(classify(classifier, task.name, chosen, spec))
    return evaluation_from_answers([task.name for task in tasks], answers, split, finetuned)


def classify(classifier: Classifier, task: str, images: LabelledImages, spec: PreprocessSpec) -> Answers:
    """Run all images of one task through a bundle.

    Where the task unknown led to exactly the true task, the task given leads to the same pass, which is not repeated.
    """
    parts = []
    index, columns = classifier.tasks.index(task), list(range(len(classifier.tasks)))
    for pixel_values, labels in images.batches(spec):
        unknown = classifier.forward(pixel_values)
        known_class_index = unknown.class_index.copy()
        others = np.flatnonzero((unknown.selected.sum(axis=1) > 1) | ~unknown.selected[:, index])
        if len(others):
            known_class_index[others] = classifier.forward(pixel_values[others], tasks=[task]).class_index
        _, shares = route_shares(unknown.residuals, columns, classifier.router.confidence_scale)
        rows = np.arange(len(labels))
        parts.append(
            (
                labels,
                unknown.task_index,
                unknown.class_index,
                known_class_index,
                unknown.gates.argmax(axis=1),
                unknown.selected,
                unknown.verified,
                np.full(len(labels), np.nan) if shares is None else shares[rows, unknown.task_index],
            )
        )
    return Answers(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def evaluation_from_answers(
    names: list[str], answers: list[Answers], split: str, finetuned: Mapping[str, float] | None = None
) -> Evaluation:
    """Score the answers of every task, in the bundle's order."""
    scores = {
        name: answer.scores(index) for index, (name, answer) in enumerate(zip(names, answers, strict=True))
    }
    fields = [asdict(task_scores) for task_scores in scores.values()]
    means = {name: _mean([row[name] for row in fields]) for name in fields[0] if name != "images"}
    counts = [np.bincount(answer.task_index, minlength=len(names)) for answer in answers]
    return Evaluation(
        split=split,
        tasks=scores,
        average=TaskScores(images=sum(row["images"] for row in fields), **means),
        confusion=tuple(tuple(int(n) for n in row) for row in counts),
        finetuned=finetuned,
        confidence=_confidence(answers),
    )


def _confidence(answers: list[Answers]) -> Confidence | None:
    confidence = np.concatenate([answer.confidence for answer in answers])
    right = np.concatenate([answer.task_index == index for index, answer in enumerate(answers)])
    if np.isnan(confidence).any():
        return None
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    sums = [np.bincount(bins, values, BINS) for values in (confidence, right.astype(np.float64))]
    error = float(np.abs(sums[0] - sums[1]).sum() / len(right))
    return Confidence(float(confidence.mean()), error, area_under_roc(confidence[right], confidence[~right]))


def area_under_roc(positive: NDArray[np.floating[Any]], negative: NDArray[np.floating[Any]]) -> float | None:
    """How often a positive value exceeds a negative one, ties counting half; None without either.

    Args:
        positive: [n]
        negative: [m]

    Example:
        >>> area_under_roc(np.array([0.9, 0.4]), np.array([0.5, 0.1]))
        0.75
    """
    if not len(positive) or not len(negative):
        return None
    ranked = np.sort(negative)
    below, upto = (np.searchsorted(ranked, positive, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(negative)))


def _share(right: NDArray[np.bool_]) -> float:
    return float(right.mean())


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
