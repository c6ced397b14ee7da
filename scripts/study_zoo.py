"""What each setting of the method does on the zoo: tables and pictures for docs/zoo.md.

    pip install -e ".[study]"
    python scripts/study_zoo.py --data examples/zoo --out docs

Reported on test images; the routing layer is chosen on validation images, once per base merge.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray

from mass_export.artifact import Artifact
from mass_export.baselines import evaluate_baselines
from mass_export.datasets import load_labelled_images
from mass_export.layer_choice import (
    LogitTable,
    bases_by_layer,
    best_layer,
    residuals_by_layer,
    score_layers,
)
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.recipe import Recipe, load_recipe
from mass_export.router_spec import RouterSettings
from runtime.routing import gates_from_residuals, select_tasks

mpl.use("svg")
from matplotlib import pyplot as plt

RATIOS = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
BASE_MERGES = ("tsvm", "isotropic", "mean", "zeroshot")


class Suite:
    """The test images of a recipe's tasks, and the fine-tuned models' accuracy on them."""

    def __init__(self, path: Path, data: Path, progress: Progress) -> None:
        self.recipe = dataclasses.replace(load_recipe(path), router=RouterSettings(layer=0))
        self.data, self.progress = data, progress
        images = [
            load_labelled_images(data, task, "test") for task in merge(self.recipe, progress).info.tasks
        ]
        self.pixel_values = np.concatenate([part.pixel_values(self.recipe.preprocess) for part in images])
        self.labels = np.concatenate([part.labels for part in images])
        self.truth = np.repeat(np.arange(len(images)), [len(part) for part in images])
        rows = evaluate_baselines(self.recipe, data, split="test", progress=progress)
        self.finetuned = float(np.mean(list(rows[0].tasks.values())))
        self.tables: dict[str, tuple[Artifact, LogitTable, NDArray[np.float32]]] = {}

    def table(self, recipe: Recipe) -> tuple[Artifact, LogitTable, NDArray[np.float32]]:
        """Artifact, cached second passes, residuals of every block [layers, n, T]."""
        key = repr((recipe.merge, recipe.rank_ratio, [t.rank_ratio for t in recipe.tasks]))
        if key not in self.tables:
            artifact = merge(recipe, self.progress)
            bases = bases_by_layer(recipe, artifact)
            residuals = residuals_by_layer(artifact, bases, self.pixel_values, self.progress)
            self.tables[key] = artifact, LogitTable(MassModel(artifact), self.pixel_values), residuals
        return self.tables[key]

    def score(self, recipe: Recipe, layer: int, **router: Any) -> dict[str, float]:
        """Figures of one setting, averaged over tasks; accuracies also as shares of the fine-tuned models'."""
        _, logits, residuals = self.table(recipe)
        settings = dataclasses.replace(recipe.router, **router)
        gates = gates_from_residuals(residuals[layer], settings.mode, settings.temperature)
        selection = select_tasks(gates, settings.mode, settings.threshold, settings.max_tasks)
        logits.fill([selection], self.progress)
        task, label = logits.answers(selection)
        right = (task == self.truth) & (label == self.labels)
        return {
            "layer": layer,
            "routed": self.mean(residuals[layer].argmin(axis=1) == self.truth),
            "kept": self.mean(selection.selected[np.arange(len(task)), self.truth]),
            "tasks_selected": self.mean(selection.selected.sum(axis=1)),
            "joint": self.mean(right),
            "normalized_joint": self.mean(right) / self.finetuned,
        }

    def known(self, recipe: Recipe) -> float:
        """Known-task accuracy as a share of the fine-tuned models'."""
        _, logits, _ = self.table(recipe)
        gates = np.eye(len(recipe.tasks), dtype=np.float32)[self.truth]
        selection = select_tasks(gates, "top1", 0.0, 1)
        logits.fill([selection], self.progress)
        return self.mean(logits.answers(selection)[1] == self.labels) / self.finetuned

    def mean(self, values: NDArray[Any]) -> float:
        """Mean over tasks of the means over their images."""
        return float(np.mean([values[self.truth == t].mean() for t in range(int(self.truth.max()) + 1)]))


def study(suite: Suite) -> dict[str, Any]:
    """Every table of one suite."""
    recipe = suite.recipe
    paper = dataclasses.replace(recipe, merge=dataclasses.replace(recipe.merge, base_merge="tsvm"))

    def merged(**changes: Any) -> Recipe:
        return dataclasses.replace(paper, merge=dataclasses.replace(paper.merge, **changes))

    def ratio(value: float) -> Recipe:
        tasks = tuple(dataclasses.replace(t, rank_ratio=value, rank=None) for t in paper.tasks)
        return dataclasses.replace(paper, rank_ratio=value, tasks=tasks)

    chosen = best_layer(score_layers(paper, suite.data, progress=suite.progress))
    layer = chosen.layer
    by_layer = [
        {"mode": mode, **suite.score(paper, i, mode=mode)}
        for mode in ("top1", "topk")
        for i in range(recipe.vision.layers)
    ]
    compose = [
        {"compose": name, "max_tasks": most, **suite.score(merged(compose=name), layer, max_tasks=most)}
        for name in ("tsvm", "sum")
        for most in (1, 2, 3)
    ]
    modes = [
        {"mode": "topk", **suite.score(paper, layer, mode="topk")},
        {"mode": "top1", **suite.score(paper, layer, mode="top1")},
        *(
            {
                "mode": f"weighted, temperature {t}",
                **suite.score(paper, layer, mode="weighted", temperature=t),
            }
            for t in (1.0, 0.3, 0.1)
        ),
    ]
    bases = []
    for name in BASE_MERGES:
        best = best_layer(
            score_layers(merged(base_merge=name), suite.data, modes=("top1",), progress=suite.progress)
        )
        bases.append({"base_merge": name, **suite.score(merged(base_merge=name), best.layer, mode="top1")})
    ranks = [
        {
            "rank_ratio": value,
            "known_task": suite.known(ratio(value)),
            **suite.score(ratio(value), layer, mode="top1"),
        }
        for value in RATIOS
    ]
    return {
        "tasks": [task.name for task in recipe.tasks],
        "images": len(suite.labels),
        "finetuned": suite.finetuned,
        "layer_chosen_on_validation": {"layer": layer, "mode": chosen.mode},
        "known_task": suite.known(paper),
        "by_layer": by_layer,
        "compose": compose,
        "modes": modes,
        "base_merges": bases,
        "ranks": ranks,
    }


def draw(results: dict[str, Any], out: Path) -> None:
    """Routing and joint accuracy by layer; accuracy by rank ratio."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3), sharey=True, squeeze=False)
    for ax, (name, result) in zip(axes[0], results.items(), strict=True):
        for mode, style in (("top1", "-"), ("topk", "--")):
            rows = [row for row in result["by_layer"] if row["mode"] == mode]
            layers = [row["layer"] for row in rows]
            ax.plot(
                layers, [row["normalized_joint"] for row in rows], style, marker="o", label=f"joint, {mode}"
            )
            if mode == "top1":
                ax.plot(layers, [row["routed"] for row in rows], ":", marker="s", label="right task first")
        ax.axvline(result["layer_chosen_on_validation"]["layer"], color="0.8", zorder=0)
        ax.set(title=name, xlabel="routing layer")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("share of the fine-tuned models'")
    fig.tight_layout()
    fig.savefig(out / "accuracy_by_layer.svg", metadata={"Date": None})
    fig, axes = plt.subplots(1, len(results), figsize=(4.2 * len(results), 3), sharey=True, squeeze=False)
    for ax, (name, result) in zip(axes[0], results.items(), strict=True):
        ratios = [row["rank_ratio"] for row in result["ranks"]]
        ax.plot(ratios, [row["known_task"] for row in result["ranks"]], marker="o", label="task known")
        joint = [row["normalized_joint"] for row in result["ranks"]]
        ax.plot(ratios, joint, marker="s", label="task unknown, top-1")
        ax.set_xscale("log", base=2)
        ax.set(title=name, xlabel="rank ratio")
        ax.legend(frameon=False, fontsize=8)
    axes[0][0].set_ylabel("share of the fine-tuned models'")
    fig.tight_layout()
    fig.savefig(out / "accuracy_by_rank.svg", metadata={"Date": None})


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table; shares in per cent."""
    keys = list(rows[0])

    def cell(key: str, value: Any) -> str:
        if not isinstance(value, float) or key in ("tasks_selected", "rank_ratio"):
            return f"{value:.3g}" if isinstance(value, float) else str(value)
        return f"{100 * value:.1f}"

    lines = ["| " + " | ".join(key.replace("_", " ") for key in keys) + " |", "|" + "---|" * len(keys)]
    lines += ["| " + " | ".join(cell(key, row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines)


def page(results: dict[str, Any], machine: str) -> str:
    """docs/zoo.md."""
    parts = [
        "# What each setting does, on the zoo",
        (
            "Made by `python scripts/study_zoo.py --data examples/zoo --out docs` "
            f"({machine}). Accuracies in per cent, averaged over tasks; *normalized* is the share of the fine-tuned "
            "models' own accuracy. Test images; the routing layer is chosen on validation images. Unless a row says "
            "otherwise: base merge tsvm, compose tsvm, rank ratio 1/T, top-k gates with threshold 0.2."
        ),
        "![Accuracy by routing layer](accuracy_by_layer.svg)",
        "![Accuracy by rank ratio](accuracy_by_rank.svg)",
    ]
    titles = {
        "by_layer": "Routing layer",
        "compose": "Composition and number of tasks",
        "modes": "Gates",
        "base_merges": "First pass (layer chosen on validation for each)",
        "ranks": "Rank ratio (top-1)",
    }
    for name, result in results.items():
        chosen = result["layer_chosen_on_validation"]
        parts.append(
            f"## {name}: {', '.join(result['tasks'])}\n\n{result['images']} test images; the fine-tuned models "
            f"average {100 * result['finetuned']:.1f}. Layer chosen on validation: {chosen['layer']} "
            f"({chosen['mode']}). With the right task given: {100 * result['known_task']:.1f} normalized."
        )
        parts += [f"### {title}\n\n{markdown(result[key])}" for key, title in titles.items()]
    return "\n\n".join(parts) + "\n"


@click.command(help=__doc__)
@click.option("--data", default="examples/zoo", type=click.Path(path_type=Path))
@click.option("--out", default="docs", type=click.Path(path_type=Path))
@click.option("--suite", "suites", multiple=True, default=("core", "hard"), show_default=True)
def main(data: Path, out: Path, suites: tuple[str, ...]) -> None:
    """Run the study."""
    progress = Progress()
    results = {name: study(Suite(data / f"{name}.yaml", data, progress)) for name in suites}
    out.mkdir(exist_ok=True)
    (out / "zoo_study.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, out)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, fp32"
    (out / "zoo.md").write_text(page(results, machine))
    click.echo(f"Wrote {out / 'zoo.md'}")


if __name__ == "__main__":
    main()
