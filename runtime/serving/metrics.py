"""Prometheus metrics, also a monitor of drift: routes per task, how unsure they are, and how many images are unknown.

Replicas on one node write to files in one directory (prometheus_client's multi-process mode), so that whichever of
them is asked tells the figures of all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from runtime.prediction import Prediction
from runtime.routing import gates_from_residuals

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
ANY_TASK = "any"
_LATENCY_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_MARGINS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1)
_CONFIDENCES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_UNKNOWN = (
    0.25,
    0.5,
    0.75,
    0.9,
    1,
    1.1,
    1.25,
    1.5,
    2,
    3,
    5,
    10,
)  # about 1 for known images, with a calibration


class Metrics:
    """The figures of one replica."""

    def __init__(self, node: str, registry: CollectorRegistry | None = None) -> None:
        """Register them.

        Args:
            node: label of every series: whoever is asked, the series of a node stay its own.
            registry: None for the process' own.
        """
        from prometheus_client import REGISTRY, Counter, Histogram  # noqa: PLC0415 - reads the environment

        registry = registry or REGISTRY
        self._registry = registry
        self._node = node

        def counter(name: str, text: str, *labels: str) -> Any:
            return Counter(f"mass_{name}", text, ["node", *labels], registry=registry)

        def histogram(name: str, text: str, buckets: Sequence[float], *labels: str) -> Any:
            return Histogram(f"mass_{name}", text, ["node", *labels], buckets=buckets, registry=registry)

        self._requests = counter("requests", "Requests by route and HTTP status", "route", "status")
        self._asked = counter("asked_images", "Images by the task that was asked for, or any", "task")
        self._routed = counter("routed_images", "Images by the task that answered", "task")
        self._judged = counter("judged_images", "Images with a verdict whether they are of a known task")
        self._unknown = counter("unknown_images", "Of these, the images of no known task")
        self._score = histogram(
            "unknown_score", "How badly the best task explains an image, higher is worse", _UNKNOWN
        )
        self._margin = histogram("route_margin", "Lead of the best task, 0..1, task unknown", _MARGINS)
        self._confidence = histogram("route_confidence", "How sure the router is of the task", _CONFIDENCES)
        self._latency = histogram(
            "request_seconds", "From the whole request to its answer", _LATENCY_S, "route"
        )
        self._batch = histogram("batch_images", "Images in a batch", _SIZES)
        self._batch_time = histogram("batch_seconds", "Time of a batch in the model", _LATENCY_S)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Count an answer."""
        self._requests.labels(self._node, route, str(status)).inc()
        self._latency.labels(self._node, route).observe(seconds)

    def batch(self, images: int, seconds: float) -> None:
        """Count a batch."""
        self._batch.labels(self._node).observe(images)
        self._batch_time.labels(self._node).observe(seconds)

    def predictions(self, asked: Sequence[str] | None, found: Sequence[Prediction]) -> None:
        """Count answers; margins only where there was a choice, unknown ones only where the bundle can tell."""
        for task in asked or (ANY_TASK,):
            self._asked.labels(self._node, task).inc(len(found))
        for prediction in found:
            self._routed.labels(self._node, prediction.task).inc()
            lead = route_margin(prediction)
            if lead is not None:
                self._margin.labels(self._node).observe(lead)
            if prediction.route_confidence is not None:
                self._confidence.labels(self._node).observe(prediction.route_confidence)
            if prediction.unknown is not None:
                self._score.labels(self._node).observe(prediction.unknown)
            if prediction.is_unknown is not None:
                self._judged.labels(self._node).inc()
                self._unknown.labels(self._node).inc(int(prediction.is_unknown))

    def exposition(self) -> tuple[bytes, str]:
        """All figures of this node as text, and its content type."""
        from prometheus_client import (  # noqa: PLC0415
            CONTENT_TYPE_LATEST,
            CollectorRegistry,
            generate_latest,
            multiprocess,
        )

        registry = self._registry
        if os.environ.get(DIRECTORY_VARIABLE):
            registry = CollectorRegistry()
            multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST


def route_margin(prediction: Prediction) -> float | None:
    """By how much the best task leads, 0..1; None where the task was given.

    Read from the residuals, as the gates of `topk` with temperature 1 are: those of `top1` always lead by 1.
    """
    if prediction.residuals is None or len(prediction.residuals) < 2:
        return None
    residuals = np.array([list(prediction.residuals.values())], np.float32)
    gates = np.sort(gates_from_residuals(residuals, "topk", 1.0)[0])
    return float(gates[-1] - gates[-2])
