"""What half precision changes, in numbers: decisions against a reference, and how far values are from overflowing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mass_export.precision_emulation import LARGEST_HALF, LARGEST_STREAM
from mass_export.progress import Progress
from mass_export.verify import Parity, combine, compare
from runtime.bundle import FIRST_PASS, SECOND_PASS
from runtime.classifier import Classifier, ForwardResult
from runtime.cores import CoreCache
from runtime.manifest import read_manifest
from runtime.onnx_session import OnnxSession
from runtime.second_pass import run_second_pass

LARGEST_FP16 = 65504.0
CHECK_BATCH = 32


@dataclass(frozen=True)
class Extremes:
    """Largest magnitudes of a pass over some images.

    Attributes:
        half: of the values that are rounded to half, before they are; fp16 holds 65504 at most.
        stream: of the residual stream, which is fp32.
    """

    half: float
    stream: float

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


def check_decisions(
    bundle: Path,
    images: NDArray[np.float32],
    reference: Callable[[NDArray[np.float32]], ForwardResult],
    progress: Progress,
) -> Parity:
    """Run a bundle on the CPU and compare it with a reference, batch by batch."""
    starts = range(0, len(images), CHECK_BATCH)
    with Classifier(bundle, "cpu") as classifier:
        return combine(
            [
                compare(
                    reference(images[i : i + CHECK_BATCH]), classifier.forward(images[i : i + CHECK_BATCH])
                )
                for i in progress.track(starts, "Comparing")
            ]
        )


def measure_extremes(emulated: Path, images: NDArray[np.float32]) -> dict[str, Extremes]:
    """Largest values of both passes, for each single task and for the first two together.

    Args:
        emulated: bundle of `mass_export.precision_emulation`.
        images: normalised. [B, 3, H, W]
    """
    manifest = read_manifest(emulated)
    first = _Recorded(emulated / manifest.passes[FIRST_PASS].file)
    first.run({manifest.preprocess.input_name: images})
    first.close()
    second = _Recorded(emulated / manifest.passes[SECOND_PASS].file)
    matrices = manifest.matrices if manifest.compose == "tsvm" else ()
    cores, T = CoreCache(emulated, matrices, 2), len(manifest.tasks)
    for tasks in ((0,), (T - 1,), (0, 1)[:T]):
        gates = np.full((len(images), T), 1 / T, np.float32)
        run_second_pass(second, manifest, cores, pixel_values=images, sets=[tasks] * len(images), gates=gates)
    second.close()
    return {FIRST_PASS: first.extremes(), SECOND_PASS: second.extremes()}


class _Recorded(OnnxSession):
    """Keeps the largest of what the graph says about itself."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._half = self._stream = 0.0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        outputs = super().run(feeds)
        self._half = max(self._half, float(outputs[LARGEST_HALF]))
        self._stream = max(self._stream, float(outputs[LARGEST_STREAM]))
        return outputs

    def extremes(self) -> Extremes:
        return Extremes(self._half, self._stream)
