"""Many small batches through one classifier: does memory stay flat, and do answers stay what they were at first?

    python scripts/soak.py engines/ --data examples/zoo --batches 100000

Batches of 1 to 4 test images with random task sets run in several threads; each is compared with the answers that its
images had alone, before. Every 1000 batches another classifier is opened, used and closed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import Classifier
from runtime.preprocess import pixel_values_from_images

POOL_IMAGES = 48
EVERY = 1000
WARM_UP = 0.2  # of the batches, before which allocators may still grow


def resident_mb() -> float:
    """Memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


class Soak:
    """The jobs, their answers when run alone, and what was seen since."""

    def __init__(self, bundle: Path, data: Path) -> None:
        self.bundle = bundle
        self.classifier = Classifier(bundle, "cpu", num_threads=1)
        sources: list[NDArray[np.uint8]] = []
        each = POOL_IMAGES // len(self.classifier.tasks)
        for task in self.classifier.tasks:
            with np.load(data / "data" / task / "test.npz") as arrays:
                sources += list(arrays["images"][:each])
        self.images = pixel_values_from_images(sources, self.classifier.manifest.preprocess)
        names = self.classifier.tasks
        pairs = [list(pair) for pair in itertools.combinations(names, 2)]
        self.choices: list[list[str] | None] = [None] * 3 + [[name] for name in names] + pairs[:8]  # type: ignore[assignment]
        self.alone = [
            [self.classifier.forward(image[None], tasks) for image in self.images] for tasks in self.choices
        ]
        self.lock = threading.Lock()
        self.images_done = self.other_answers = 0
        self.worst = 0.0

    def run(self, number: int) -> None:
        """One batch, of the number's own random choice."""
        rng = np.random.default_rng(number)
        rows = rng.integers(0, len(self.images), rng.integers(1, 5))
        choice = int(rng.integers(len(self.choices)))
        found = self.classifier.forward(self.images[rows], self.choices[choice])
        other, worst = 0, 0.0
        for place, row in enumerate(rows.tolist()):
            expected = self.alone[choice][row]
            other += found.task_index[place] != expected.task_index[0]
            other += found.class_index[place] != expected.class_index[0]
            worst = max(worst, float(np.abs(found.logits[place] - expected.logits[0]).max()))
        with self.lock:
            self.images_done += len(rows)
            self.other_answers += int(other)
            self.worst = max(self.worst, worst)

    def reopen(self) -> None:
        """Open, use and close another classifier."""
        with Classifier(self.bundle, "cpu", num_threads=1) as other:
            other.forward(self.images[:2])


def main() -> None:
    """Run and print the figures; exit code 1 where an answer changed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, default=Path("examples/zoo"))
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    soak = Soak(options.bundle, options.data)
    start = time.perf_counter()
    memory: list[tuple[int, float]] = []
    with ThreadPoolExecutor(options.threads) as pool:
        for first in range(0, options.batches, EVERY):
            list(pool.map(soak.run, range(first, min(first + EVERY, options.batches))))
            soak.reopen()
            memory.append((first + EVERY, resident_mb()))
    kept = np.array(memory[int(WARM_UP * len(memory)) :])
    slope = float(np.polyfit(kept[:, 0], kept[:, 1], 1)[0]) * 10_000 if len(kept) > 1 else float("nan")
    report: dict[str, Any] = {
        "batches": options.batches,
        "images": soak.images_done,
        "threads": options.threads,
        "seconds": round(time.perf_counter() - start, 1),
        "classifiers opened and closed besides": len(memory),
        "answers that changed": soak.other_answers,
        "largest difference of a logit from alone": soak.worst,
        "resident MB": {
            "after 1000": memory[0][1],
            "at the end": memory[-1][1],
            "most": max(m for _, m in memory),
        },
        "MB per 10,000 batches after the first fifth": round(slope, 3),
    }
    print(json.dumps(report, indent=1))
    raise SystemExit(soak.other_answers > 0)


if __name__ == "__main__":
    main()
