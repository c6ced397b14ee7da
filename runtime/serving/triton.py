"""The two steps between and behind the graphs, for Triton's Python backend: see `mass_export.triton_repository`.

In an ensemble every tensor has one shape for the whole batch, so all sets are padded to the most tasks that a set may
have. A padded slot has weight 0 and a core of zeros: it adds exactly nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle import Manifest
from runtime.cores import CoreCache
from runtime.manifest import read_manifest
from runtime.prediction import ForwardResult, predictions_from_result
from runtime.routing import Selection, answer, gates_from_residuals, select_tasks

CORE_CACHE_SETS = 256


def slots_per_sample(manifest: Manifest) -> int:
    """Tasks of the largest set."""
    tasks = len(manifest.tasks)
    return {"top1": 1, "topk": min(manifest.router.max_tasks, tasks), "weighted": tasks}[manifest.router.mode]


class _Routes:
    """What both steps compute from the residuals."""

    def __init__(self, bundle: Path) -> None:
        self.manifest = read_manifest(bundle)

    def select(self, residuals: NDArray[np.float32]) -> tuple[NDArray[np.float32], Selection]:
        """Gates [B, T] and sets."""
        router = self.manifest.router
        gates = gates_from_residuals(residuals, router.mode, router.temperature)
        return gates, select_tasks(gates, router.mode, router.threshold, router.max_tasks)


class Routing(_Routes):
    """From the first pass to the second."""

    def __init__(self, bundle: Path) -> None:
        """Map the bases of a bundle."""
        super().__init__(bundle)
        matrices = self.manifest.matrices if self.manifest.compose == "tsvm" else ()
        self._cores = CoreCache(bundle, matrices, CORE_CACHE_SETS)

    def __call__(self, residuals: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """Inputs of the second pass beside the images.

        Args:
            residuals: of the first pass. [B, T] float32

        Returns:
            gates [B, T] float32, slots [B, K] int64, weights [B, K] float32, and each core [B, K*R, K*R] float32
        """
        gates, selection = self.select(residuals)
        count, width = len(residuals), slots_per_sample(self.manifest)
        slots, weights = np.zeros((count, width), np.int64), np.zeros((count, width), np.float32)
        cores: dict[str, NDArray[Any]] = {}
        by_gates = self.manifest.compose == "sum" and self.manifest.router.sum_weights == "gates"
        for row, tasks in enumerate(selection.sets()):
            slots[row, : len(tasks)] = tasks
            share = gates[row, list(tasks)] if by_gates else np.ones(len(tasks), np.float32)
            weights[row, : len(tasks)] = share / share.sum()
            if self.manifest.compose == "tsvm":
                for name, core in self._cores.get(tasks).items():
                    side = len(core) // len(tasks) * width
                    padded = cores.setdefault(name, np.zeros((count, side, side), np.float32))
                    padded[row, : len(core), : len(core)] = core
        return {"gates": gates, "slots": slots, "weights": weights, **cores}


class Answers(_Routes):
    """From the second pass to names."""

    def __call__(
        self,
        residuals: NDArray[np.float32],
        logits: NDArray[np.float32],
        unknown: NDArray[np.float32] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Name the answers.

        Args:
            residuals: of the first pass. [B, T] float32
            logits: of the second. [B, sum C] float32
            unknown: of the first pass, where it has it. [B, 1] float32

        Returns:
            task [B, 1] and label [B, 1] of bytes, score [B, 1] float32; with `unknown` and a threshold of the bundle
            is_unknown [B, 1] bool
        """
        gates, selection = self.select(residuals)
        tasks = self.manifest.tasks
        task_index, class_index = answer(logits, tasks, selection, self.manifest.router.head_choice)
        verified = np.zeros(len(logits), np.bool_)
        result = ForwardResult(
            residuals, gates, selection.selected, logits, task_index, class_index, verified
        )
        found = predictions_from_result(result, tasks, 1)
        named: dict[str, NDArray[Any]] = {
            "task": np.array([[prediction.task.encode()] for prediction in found], object),
            "label": np.array([[prediction.label.encode()] for prediction in found], object),
            "score": np.array([[prediction.score] for prediction in found], np.float32),
        }
        threshold = self.manifest.router.unknown_threshold
        if unknown is not None and threshold is not None:
            named["is_unknown"] = unknown > threshold
        return named
