"""Does the bundle compute what the eager model computes? Numbers, not opinions."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mass_export.artifact import Artifact
from mass_export.errors import VerificationError
from mass_export.image_input import mean_and_std, nearest_bytes, normalised
from mass_export.model import MassModel
from mass_export.progress import Progress
from runtime.bundle import MANIFEST_FILE, PreprocessSpec
from runtime.classifier import Classifier, ForwardResult
from runtime.engine_spec import Precision

LOGIT_TOLERANCE = 1e-3
RESIDUAL_TOLERANCE = 1e-4
UNKNOWN_TOLERANCE = 1e-3
# Half precision rounds to 3 digits: near a threshold a decision may turn, and then the logits are of another model.
HALF_LOGIT_TOLERANCE = 0.02  # of the largest logit, on images with equal sets
HALF_DECISIONS = 0.9
# Eight bits leave 1% to 3% of the largest logit on real images. This finds mistakes; measure accuracy with `mass eval`.
INT8_LOGIT_TOLERANCE = 0.1
INT8_DECISIONS = 0.75
VERIFY_BATCH = 32
RANDOM_IMAGES = 16


@dataclass(frozen=True)
class Parity:
    """Largest differences between two implementations over some images.

    Attributes:
        images: how many were compared.
        logits_max_abs: largest absolute difference of a logit, on images with equal sets.
        residuals_max_rel: largest difference of a residual, relative to the image's largest; a standardised one may
            be zero itself.
        gates_max_abs: largest absolute difference of a gate.
        equal_sets, equal_tasks, equal_classes: shares of images with the same set, task, and class, 0..1.
        largest_logit: largest absolute logit of the reference.
        unknown_max_abs: largest absolute difference of the unknown score.
    """

    images: int
    logits_max_abs: float
    residuals_max_rel: float
    gates_max_abs: float
    equal_sets: float
    equal_tasks: float
    equal_classes: float
    largest_logit: float = 0.0
    unknown_max_abs: float = 0.0

    def within_tolerance(self, precision: Precision = "fp32", router: Precision | None = None) -> bool:
        """Whether differences are rounding, and the decisions agree: all of them, or most in a narrow precision.

        Args:
            precision: of the graphs.
            router: of the first pass, if that differs.
        """
        decisions = min(self.equal_sets, self.equal_tasks, self.equal_classes)
        if router == "int8" and precision == "fp32":
            return self.logits_max_abs <= LOGIT_TOLERANCE and decisions >= INT8_DECISIONS
        if precision != "fp32":
            tolerance, share = (
                (INT8_LOGIT_TOLERANCE, INT8_DECISIONS)
                if precision == "int8"
                else (HALF_LOGIT_TOLERANCE, HALF_DECISIONS)
            )
            return self.logits_max_abs <= tolerance * self.largest_logit and decisions >= share
        return (
            self.logits_max_abs <= LOGIT_TOLERANCE
            and self.residuals_max_rel <= RESIDUAL_TOLERANCE
            and self.unknown_max_abs <= UNKNOWN_TOLERANCE
            and decisions == 1.0
        )

    def to_dict(self) -> dict[str, float]:
        """Plain numbers for JSON."""
        return asdict(self)


def verify_bundle(
    artifact: Artifact,
    bundle: Path,
    pixel_values: NDArray[np.float32] | None = None,
    *,
    progress: Progress,
) -> Parity:
    """Run a bundle and the eager model on the same images.

    Args:
        artifact: what the bundle was exported from.
        bundle: directory to check.
        pixel_values: real images, normalised; random ones are always added. [B, 3, H, W]
        progress: where to show it.

    Raises:
        VerificationError: out of tolerance; the message carries the figures.
    """
    images = sample_images(artifact)
    if pixel_values is not None:
        images = np.concatenate([pixel_values, images])
    model = MassModel(artifact)
    with Classifier(bundle, provider="cpu") as classifier:
        spec = classifier.manifest.preprocess
        given: NDArray[Any] = images
        if spec.dtype == "uint8":
            given = nearest_bytes(images, spec)
            images = normalised(given, spec)
        batches = [slice(i, i + VERIFY_BATCH) for i in range(0, len(images), VERIFY_BATCH)]
        parts = [
            compare(model.forward(torch.from_numpy(images[batch])), classifier.forward(given[batch]))
            for batch in progress.track(batches, "Comparing with the eager model")
        ]
        precision, router = classifier.manifest.precision, classifier.manifest.router_precision
    parity = combine(parts)
    if not parity.within_tolerance(precision, router):
        raise VerificationError(
            f"{bundle / MANIFEST_FILE}: the {precision} graphs differ from the eager model on {parity.images} images: "
            f"logits by {parity.logits_max_abs:.2e} (the largest is {parity.largest_logit:.3g}), residuals by "
            f"{parity.residuals_max_rel:.2e} relative, equal sets "
            f"{parity.equal_sets:.1%}, tasks {parity.equal_tasks:.1%}, classes {parity.equal_classes:.1%}. "
            "Nothing was written. This is a bug or an ill-conditioned merge: see the warnings of the merge."
        )
    return parity


def sample_images(artifact: Artifact, count: int = RANDOM_IMAGES) -> NDArray[np.float32]:
    """Random images of every smoothness, normalised as the model's. [count, 3, H, W]"""
    return random_pixel_values(artifact.info.preprocess, count)


def random_pixel_values(spec: PreprocessSpec, count: int) -> NDArray[Any]:
    """The same for preprocessing alone, as bytes if it says so. [count, 3, H, W] float32 or [count, H, W, 3] uint8"""
    rng = np.random.default_rng(0)
    H, W = spec.image_size
    mean, std = mean_and_std(spec)
    images = np.empty((count, 3, H, W), dtype=np.float32)
    for i in range(count):
        cells = 2 ** (1 + i % 5)  # from broad patches to fine noise
        images[i] = (enlarged(rng.random((3, cells, cells), dtype=np.float32), H, W) - mean) / std
    return images if spec.dtype == "float32" else nearest_bytes(images, spec)


def enlarged(cells: NDArray[Any], H: int, W: int) -> NDArray[Any]:
    """Every cell as a patch of equal pixels: [3, n, m] -> [3, H, W], any dtype."""
    rows, columns = (
        np.arange(size) * count // size for size, count in zip((H, W), cells.shape[1:], strict=True)
    )
    return cells[:, rows][:, :, columns]


def compare(expected: ForwardResult, actual: ForwardResult) -> Parity:
    """Differences of one batch; `expected` is the reference."""
    residuals = 0.0
    if expected.residuals is not None and actual.residuals is not None:
        scale = np.maximum(np.abs(expected.residuals).max(axis=1, keepdims=True), 1e-6)
        residuals = float(np.max(np.abs(actual.residuals - expected.residuals) / scale))
    unknown = 0.0
    if expected.unknown is not None:
        if actual.unknown is None:
            raise VerificationError("the bundle has no unknown score, but the eager model has one.")
        unknown = float(np.max(np.abs(actual.unknown - expected.unknown)))
    same_model = (actual.selected == expected.selected).all(axis=1)
    logits = np.abs(actual.logits - expected.logits)[same_model]
    return Parity(
        images=len(expected.task_index),
        logits_max_abs=float(logits.max(initial=0.0)),
        residuals_max_rel=residuals,
        gates_max_abs=float(np.max(np.abs(actual.gates - expected.gates))),
        equal_sets=float(np.mean(same_model)),
        equal_tasks=float(np.mean(actual.task_index == expected.task_index)),
        equal_classes=float(np.mean(actual.class_index == expected.class_index)),
        largest_logit=float(np.abs(expected.logits).max()),
        unknown_max_abs=unknown,
    )


def combine(parts: list[Parity]) -> Parity:
    """Worst differences and pooled shares over batches."""
    total = sum(part.images for part in parts)

    def share(name: str) -> float:
        return float(sum(getattr(part, name) * part.images for part in parts)) / total

    return Parity(
        images=total,
        logits_max_abs=max(part.logits_max_abs for part in parts),
        residuals_max_rel=max(part.residuals_max_rel for part in parts),
        gates_max_abs=max(part.gates_max_abs for part in parts),
        equal_sets=share("equal_sets"),
        equal_tasks=share("equal_tasks"),
        equal_classes=share("equal_classes"),
        largest_logit=max(part.largest_logit for part in parts),
        unknown_max_abs=max(part.unknown_max_abs for part in parts),
    )
