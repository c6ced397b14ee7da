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


def draw_cost(ax: Any, stages: dict[str, dict[str, Any]], title: str) -> None:
    """Processor time of an image: alone, and what serving adds, by proxy and images in a request."""
    rows = [
        (f"{images}{proxy}", stage[f"{name}"]["cpu_ms_per_image"])
        for proxy, stage in stages.items()
        for images, name in (("1 image", "one_image"), ("8 images", "eight_images"))
    ]
    for place, (_, row) in enumerate(rows):
        below = 0.0
        ax.bar(place - 0.2, row["direct"], 0.35, color="0.7", label=None if place else "direct loop")
        for part, color in (("replicas", "C0"), ("proxy", "C1"), ("clients", "C4")):
            ax.bar(place + 0.2, row[part], 0.35, bottom=below, color=color, label=None if place else part)
            below += row[part]
    ax.set(xticks=range(len(rows)), xticklabels=[name for name, _ in rows], title=title)
    ax.set(ylabel="processor time per image, ms")
    ax.legend(frameon=False, fontsize=8)


def draw_overhead(ax: Any, rows: list[dict[str, float]]) -> None:
    """Latency of one client's requests, by images in a request."""
    sizes = [row["images"] for row in rows]
    for name, color in (("direct", "0.5"), ("served", "C0")):
        ax.plot(sizes, [row[f"{name}_ms"] for row in rows], "o-", ms=3, color=color, label=name)
    ax.set(xscale="log", xticks=sizes, xticklabels=[f"{size:g}" for size in sizes], ylim=(0, None))
    ax.minorticks_off()
    ax.set(xlabel="images in a request", ylabel="ms", title="One client")
    ax.legend(frameon=False, fontsize=8)


def main(folder: Path) -> None:
    """Draw what there is."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig = plt.figure(figsize=(11, 7), layout="constrained")
    grid = fig.add_gridspec(2, 5)
    for columns, name, title in ((slice(0, 2), "", "Zoo"), (slice(2, 4), "_b32", "ViT-B/32")):
        found = {
            "": read(folder, f"throughput{name}"),
            "\nHAProxy": read(folder, f"throughput{name}_haproxy"),
        }
        draw_cost(
            fig.add_subplot(grid[0, columns]), {key: value for key, value in found.items() if value}, title
        )
    draw_overhead(fig.add_subplot(grid[0, 4]), read(folder, "throughput")["overhead"])
    draw_faults(fig.add_subplot(grid[1, :]), read(folder, "faults"))
    fig.savefig(folder / "load.svg", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
