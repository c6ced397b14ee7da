"""The work of a replica without its server: images of many requests, each with its own tasks, in one batch."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import MANIFEST_FILE
from runtime.classifier import Classifier
from runtime.errors import InputError
from runtime.prediction import Prediction, predictions_from_result
from runtime.preprocess import ImageSource, pixel_values_from_images
from runtime.provider import Provider
from runtime.serving.images import image_from_bytes

WARM_UP_SIZES = (1, 2)


@dataclass(frozen=True, eq=False)
class Work:
    """Images of one request, or a part of them.

    Attributes:
        pixel_values: preprocessed, as the bundle takes them. [n, ..]
        tasks: that may answer, None for all.
        top_k: alternatives for each image, at most.
    """

    pixel_values: NDArray[Any]
    tasks: tuple[str, ...] | None
    top_k: int

    def __len__(self) -> int:
        return len(self.pixel_values)

    def parts(self, size: int) -> list[Work]:
        """The same work in pieces of at most `size` images."""
        starts = range(0, len(self), size)
        return [dataclasses.replace(self, pixel_values=self.pixel_values[i : i + size]) for i in starts]


class Engine:
    """A classifier, warmed up, with what requests need beside it. Thread-safe.

    Attributes:
        classifier: the model.
        digest: of the bundle's manifest, which holds the checksums of all files: the bundle's version.
    """

    def __init__(
        self, bundle: str, *, provider: str = "auto", threads: int | None = None, batch_size: int = 32
    ) -> None:
        """Load, check and run a bundle once with each kind of request.

        Raises:
            BundleError: the bundle is missing or damaged.
            BackendError: the provider is not available, or the bundle does not run.
        """
        self.digest = bundle_digest(bundle)
        self.classifier = Classifier(
            bundle, cast("Provider", provider), num_threads=threads, batch_size=batch_size
        )
        self.tasks = self.classifier.tasks
        for size in {*WARM_UP_SIZES, batch_size}:
            spec = self.classifier.manifest.preprocess
            empty = np.zeros((size, *spec.input_shape), spec.dtype)
            self.classifier.forward(empty)
        self.classifier.forward(empty[:1], [self.tasks[0]])

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width that the model takes."""
        return self.classifier.manifest.preprocess.image_size

    def work(
        self,
        images: Sequence[tuple[str, bytes]],
        tasks: Sequence[str] | None,
        top_k: int,
        max_pixels: int,
    ) -> Work:
        """Decode and preprocess (name, content) pairs.

        Raises:
            InputError: naming every image that cannot be read, or an unknown task.
        """
        allowed = self.known_tasks(tasks)
        rows, faults = [], []
        for name, data in images:
            try:
                image: ImageSource = image_from_bytes(data, f"image {name}", max_pixels)
                rows.append(pixel_values_from_images([image], self.classifier.manifest.preprocess))
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError(" ".join(faults))
        return Work(rows[0] if len(rows) == 1 else np.concatenate(rows), allowed, top_k)

    def known_tasks(self, tasks: Sequence[str] | None) -> tuple[str, ...] | None:
        """In the bundle's order, once each; None stays None.

        Raises:
            InputError: a name is unknown.
        """
        if not tasks:
            return None
        unknown = sorted(set(tasks) - set(self.tasks))
        if unknown:
            raise InputError(f"tasks: unknown {', '.join(unknown)}; this bundle has {', '.join(self.tasks)}.")
        return tuple(name for name in self.tasks if name in tasks)

    def run(self, batch: Sequence[Work]) -> list[list[Prediction]]:
        """Classify a batch whose requests may ask for different tasks; predictions of each, in order."""
        groups: dict[tuple[str, ...] | None, list[int]] = {}
        for index, work in enumerate(batch):
            groups.setdefault(work.tasks, []).append(index)
        order = [index for members in groups.values() for index in members]
        parts = [(sum(len(batch[i]) for i in members), tasks) for tasks, members in groups.items()]
        images = [batch[index].pixel_values for index in order]
        results = self.classifier.forward_parts(
            images[0] if len(images) == 1 else np.concatenate(images), parts
        )
        known, router = self.classifier.manifest.tasks, self.classifier.router
        found: list[list[Prediction]] = [[] for _ in batch]
        for (tasks, members), result in zip(groups.items(), results, strict=True):
            allowed = None if tasks is None else [self.tasks.index(name) for name in tasks]
            top_k = max(batch[index].top_k for index in members)
            named = iter(predictions_from_result(result, known, top_k, allowed=allowed, router=router))
            for index in members:
                found[index] = [_cut(next(named), batch[index].top_k) for _ in range(len(batch[index]))]
        return found

    def close(self) -> None:
        """Release the model."""
        self.classifier.close()

    def description(self) -> dict[str, Any]:
        """What a client may want to know."""
        manifest = self.classifier.manifest
        return {
            "tasks": {task.name: list(task.classes) for task in manifest.tasks},
            "image_size": list(self.image_size),
            "provider": self.classifier.provider,
            "bundle": self.digest,
        }


def bundle_digest(bundle: str | Path) -> str:
    """Short name of a bundle's content; empty while there is no manifest."""
    try:
        return hashlib.sha256((Path(bundle) / MANIFEST_FILE).read_bytes()).hexdigest()[:12]
    except OSError:
        return ""


def _cut(prediction: Prediction, top_k: int) -> Prediction:
    if len(prediction.alternatives) <= top_k:
        return prediction
    return dataclasses.replace(prediction, alternatives=prediction.alternatives[:top_k])
