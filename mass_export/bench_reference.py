"""What a bundle is compared with in PyTorch: the eager model, and the way the reference implementation works.

The reference (the authors' code of arXiv 2504.05342) runs the *whole* merged encoder for its routing features, then,
for each group of images with the same tasks, builds a merged model out of the factors and runs it. `cached` keeps the
merged models of all groups; `uncached` builds them in every call. Routes are given: each image has one task, in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mass_export.artifact import Artifact, read_artifact
from mass_export.model import MassModel
from mass_export.vit import encode

Thing = Callable[[NDArray[np.float32]], Any]


def eager_things(artifact_path: Path, threads: int) -> dict[str, Thing]:
    """`eager`, `reference_cached` and `reference_uncached`, each a function of pixel values [B, 3, H, W]."""
    torch.set_num_threads(threads)
    artifact = read_artifact(artifact_path)
    model, kept, rebuilt = MassModel(artifact), MergedModels(artifact), MergedModels(artifact, keep=False)
    first_pass = artifact.merged or artifact.base

    @torch.inference_mode()
    def eager(images: NDArray[np.float32]) -> Any:
        pixel_values = torch.from_numpy(images)
        return model.residuals(pixel_values), kept.logits(pixel_values)

    @torch.inference_mode()
    def reference(images: NDArray[np.float32], models: MergedModels) -> Any:
        pixel_values = torch.from_numpy(images)
        return encode(first_pass, pixel_values, artifact.info.vision), models.logits(pixel_values)

    return {
        "eager": eager,
        "reference_cached": lambda images: reference(images, kept),
        "reference_uncached": lambda images: reference(images, rebuilt),
    }


class MergedModels:
    """One dense model for each task, made when it is needed."""

    def __init__(self, artifact: Artifact, *, keep: bool = True) -> None:
        self._artifact = artifact
        self._keep = keep
        self._made: dict[int, dict[str, Tensor]] = {}
        self._heads = torch.cat([head.weight for head in artifact.heads])

    def logits(self, pixel_values: Tensor) -> Tensor:
        """Image b under task b mod T, one run for each task. -> [B, sum C]"""
        T = len(self._artifact.tasks)
        logits = torch.empty(len(pixel_values), len(self._heads))
        for task in range(min(T, len(pixel_values))):
            feature = encode(self._model(task), pixel_values[task::T], self._artifact.info.vision)
            logits[task::T] = feature @ self._heads.T
        return logits

    def _model(self, task: int) -> dict[str, Tensor]:
        if task in self._made:
            return self._made[task]
        factors = self._artifact.tasks[task]
        params = {}
        for name, parameter in self._artifact.base.items():
            low_rank = factors.matrices.get(name)
            params[name] = parameter + (low_rank.delta() if low_rank is not None else factors.vectors[name])
        if self._keep:
            self._made[task] = params
        return params
