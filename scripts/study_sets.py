"""Do sets of several tasks beat the best task alone? A table for docs/routers.md's neighbour docs/sets.md.

    python scripts/study_sets.py --data examples/zoo --out docs

The default router's scores choose the tasks of each image: the best one, or all whose gate passes a threshold (topk, at
most two or three). Sets are merged by TSV-M or as a sum weighted by the gates, and their heads compete by their largest
logit, their mean logit, or their evidence `logsumexp(28 / s_i * logits_i) - log C_i`. The threshold is the best on
validation images for each rule; figures are joint accuracy as a share of the fine-tuned models'.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from study_routers import SUITES, Suite, batches, default_of, markdown

from mass_export.head_evidence import evidence_scales
from mass_export.layer_choice import macro_average
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.routing import head_evidence
from runtime.routing import Selection, gates_from_residuals, select_tasks

THRESHOLDS = (0.2, 0.3, 0.4)
SIZES = (2, 3)
Key = tuple[tuple[int, ...], tuple[float, ...] | None]
BIDS = ("largest logit", "mean logit", "evidence")


class Sets:
    """Images of one split, the router's scores, and the logits of the sets that are asked for."""

    def __init__(self, suite: Suite, name: str, model: MassModel) -> None:
        self.split, self.model = suite.splits[name], model
        self.own = float(np.mean(list(suite.finetuned[name].values())))
        self.pixel_values = torch.from_numpy(self.split.pixel_values)
        parts = batches(self.split.pixel_values)
        self.scores = np.concatenate([model.residuals(part).numpy() for part in parts])
        self.sizes = [len(task.classes) for task in model.artifact.info.tasks]
        self._logits: dict[Key, dict[int, NDArray[np.float32]]] = {}

    def logits(self, selection: Selection, gates: NDArray[np.float32] | None) -> NDArray[np.float32]:
        """Of every head under each image's set; with gates the set's own weigh the sum. [n, sum C]"""
        found = np.empty((len(self.scores), sum(self.sizes)), np.float32)
        rows_of: dict[Key, list[int]] = {}
        for row, tasks in enumerate(selection.sets()):
            if len(tasks) == 1:
                found[row] = self.split.logits[tasks[0], row]
                continue
            share = None
            if gates is not None:  # rounded, so that few models have to be merged
                kept = gates[row, list(tasks)] / gates[row, list(tasks)].sum()
                share = tuple((np.round(kept * 8).clip(1) / 8).tolist())
            rows_of.setdefault((tasks, share), []).append(row)
        for key, rows in rows_of.items():
            known = self._logits.setdefault(key, {})
            new = [row for row in rows if row not in known]
            if new:
                known |= dict(zip(new, self.model.logits(self.pixel_values[new], *key).numpy(), strict=True))
            found[rows] = [known[row] for row in rows]
        return found

    def joint(self, selection: Selection, logits: NDArray[np.float32], bid: str) -> float:
        """Accuracy of task and class, as a share of the fine-tuned models'."""
        stops = np.cumsum(self.sizes)
        heads = [logits[:, stop - size : stop] for size, stop in zip(self.sizes, stops, strict=True)]
        if bid == "evidence":
            scaled = torch.from_numpy(logits) * evidence_scales(self.model.artifact.heads).float()
            bids = head_evidence(scaled, self.sizes).numpy()
        else:
            bids = np.stack(
                [h.max(axis=1) if bid == "largest logit" else h.mean(axis=1) for h in heads], axis=1
            )
        task = np.where(selection.selected, bids, -np.inf).argmax(axis=1)
        label = np.stack([h.argmax(axis=1) for h in heads], axis=1)[np.arange(len(task)), task]
        right = (task == self.split.task) & (label == self.split.label)
        return macro_average(right, self.split.task) / self.own


def study(suite: Suite, progress: Progress) -> list[dict[str, Any]]:
    """Rows of all rules of one suite."""
    artifact = default_of(suite.base)
    summed = dataclasses.replace(
        artifact,
        info=dataclasses.replace(
            artifact.info, merge=dataclasses.replace(artifact.info.merge, compose="sum", sum_weights="gates")
        ),
    )
    models = {"TSV-M": MassModel(artifact), "sum by gates": MassModel(summed)}
    rows: list[dict[str, Any]] = []
    for merged_by, model in models.items():
        parts = {name: Sets(suite, name, model) for name in ("val", "test")}
        if not rows:
            alone = {
                f"{name}_joint": part.joint(*_chosen(part, 0.99, 1)[:2], BIDS[0])
                for name, part in parts.items()
            }
            nothing = dict.fromkeys(("merged_by", "bid", "threshold"), "-")
            rows.append({"set": "best task alone", **nothing, "several": 0.0, **alone})
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for size, threshold in progress.track(list(itertools.product(SIZES, THRESHOLDS)), merged_by):
            chosen = {
                name: _chosen(part, threshold, size, merged_by == "sum by gates")
                for name, part in parts.items()
            }
            several = float((chosen["test"][0].selected.sum(axis=1) > 1).mean())
            for bid in BIDS:
                row = {
                    "set": f"up to {size}",
                    "merged_by": merged_by,
                    "bid": bid,
                    "threshold": str(threshold),
                }
                row |= {"several": several}
                row |= {f"{name}_joint": part.joint(*chosen[name], bid) for name, part in parts.items()}
                best = found.get((size, bid))
                if best is None or row["val_joint"] > best["val_joint"]:
                    found[size, bid] = row
        rows += found.values()
    return rows


def _chosen(
    part: Sets,
    threshold: float,
    size: int,
    weighted: bool = False,  # noqa: FBT001, FBT002
) -> tuple[Selection, NDArray[np.float32]]:
    """The sets of a rule, and the logits under them."""
    gates = gates_from_residuals(part.scores, "topk", 1.0)
    selection = select_tasks(gates, "topk", threshold, size)
    return selection, part.logits(selection, gates if weighted else None)


@click.command(help=__doc__)
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=Path("docs"), show_default=True, type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="No progress bars.")
def main(data: Path, out: Path, *, quiet: bool) -> None:
    """Write sets.md and sets.json."""
    progress = Progress(quiet=quiet)
    results = {name: study(Suite(data / f"{name}.yaml", data, progress), progress) for name in SUITES}
    (out / "sets.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    columns = {
        "set": "tasks in the set",
        "merged_by": "merged by",
        "bid": "heads compete by",
        "threshold": "threshold",
        "several": "images with several tasks",
        "test_joint": "joint, test",
        "val_joint": "joint, validation",
    }
    sections = [
        "# Sets of several tasks",
        (
            f"Made by `python scripts/study_sets.py --data {data} --out {out}` with the default router's scores. Joint "
            "accuracy as a share of the fine-tuned models', in per cent; the threshold of each row is the best on "
            "validation images. Gates of a weighted sum are rounded to eighths."
        ),
    ]
    for name, rows in results.items():
        sections += [f"## {name}", markdown(rows, columns)]
    (out / "sets.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    click.echo(f"Wrote {out / 'sets.md'}")


if __name__ == "__main__":
    main()
