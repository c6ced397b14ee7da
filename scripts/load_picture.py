"""The picture of docs/serving.md, from what `load_test.py` measured.

python scripts/load_picture.py docs/serving
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

mpl.use("svg")
from matplotlib import pyplot as plt


def read(folder: Path, stage: str) -> dict[str, Any]:
    """A stage's figures; empty if it was not measured."""
    file = folder / f"{stage}.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    return found


def draw_faults(ax: Any, faults: dict[str, Any]) -> None:
    """Latency of every answered request, by phase; errors below."""
    for index, phase in enumerate(faults["phases"]):
        good = np.array([a[:2] for a in phase["answers"] if a[2] == 200])
        other = np.array([a[0] for a in phase["answers"] if a[2] != 200])
        if len(good):
            ax.plot(good[:, 0], 1000 * good[:, 1], ".", ms=1.5, color="C0", alpha=0.4, rasterized=True)
        ax.plot(other, np.full(len(other), 1.5), "|", ms=6, color="C3", alpha=0.4, rasterized=True)
        ax.axvline(phase["start_s"], color="0.85", lw=0.8, zorder=0)
        ax.text(phase["start_s"] + 0.3, 0.99 - 0.055 * (index % 3), phase["phase"], fontsize=7,
                transform=ax.get_xaxis_transform(), va="top")  # fmt: skip
    ax.set(yscale="log", ylabel="latency, ms", title="Under faults (red: answered with an error)")
    memory = np.array(faults["memory_mib"])
    right = ax.twinx()
    right.plot(memory[:, 0], memory[:, 1], color="C2", lw=1)
    right.set(ylabel="memory of the replicas, MiB", ylim=(0, None))
    right.spines.right.set_visible(True)
    ax.set_xlabel("s")


def draw_cost(ax: Any, throughput: dict[str, Any]) -> None:
    """Processor time of an image: the model's and what serving adds."""
    names = ["one_image", "eight_images"]
    rows = [throughput[name]["cpu_ms_per_image"] for name in names]
    for place, row in enumerate(rows):
        ax.bar(place - 0.2, row["direct"], 0.35, color="0.7", label="direct loop" if not place else None)
        ax.bar(place + 0.2, row["replicas"], 0.35, color="C0", label="replica" if not place else None)
        ax.bar(
            place + 0.2,
            row["proxy"],
            0.35,
            bottom=row["replicas"],
            color="C1",
            label="proxy" if not place else None,
        )
    ax.set(xticks=range(len(names)), xticklabels=["1 image a request", "8 images a request"])
    ax.set(ylabel="processor time per image, ms", title="What serving costs")
    ax.legend(frameon=False, fontsize=8)


def main(folder: Path) -> None:
    """Draw what there is."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    throughput, faults = read(folder, "throughput"), read(folder, "faults")
    panels = [(draw_cost, throughput, 1)] if throughput else []
    panels += [(draw_faults, faults, 2.4)] if faults else []
    ratios = [width for *_, width in panels]
    fig, axes = plt.subplots(
        1, len(panels), figsize=(4 * sum(ratios), 3.6), squeeze=False, gridspec_kw={"width_ratios": ratios}
    )
    for ax, (draw, figures, _) in zip(axes[0], panels, strict=True):
        draw(ax, figures)
    fig.tight_layout()
    fig.savefig(folder / "load.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
