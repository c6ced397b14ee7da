"""Real images with a bundle's answers, to look at. They are a fixed random sample of each task's images."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from mass_export.datasets import load_labelled_images
from mass_export.spec import TaskInfo
from runtime.classifier import Classifier
from runtime.preprocess import ImageSource, load_image

EXAMPLES_PER_TASK = 8
LARGEST_SIDE = 64


def example_answers(
    bundle: Path, data: Path, split: str, per_task: int = EXAMPLES_PER_TASK
) -> list[dict[str, Any]]:
    """Truth and answer (task unknown) of a few images of every task, with the image as a data URI."""
    examples = []
    with Classifier(bundle) as classifier:
        for task in classifier.manifest.tasks:
            images = load_labelled_images(data, TaskInfo(task.name, task.classes), split).sample(per_task)
            answers = zip(images.sources, images.labels, classifier.predict(images.sources), strict=True)
            for source, label, prediction in answers:
                examples.append(
                    {
                        "task": task.name,
                        "label": task.classes[label],
                        "predicted_task": prediction.task,
                        "predicted_label": prediction.label,
                        "score": prediction.score,
                        "image": data_uri(source),
                    }
                )
    return examples


def data_uri(source: ImageSource) -> str:
    """A small PNG."""
    image = load_image(source).convert("RGB")
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    png = io.BytesIO()
    image.save(png, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(png.getvalue()).decode()}"
