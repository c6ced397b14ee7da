"""How well each router does on a zoo, and what it may know for it: tables and pictures for docs/routers.md.

    pip install -e ".[study]"
    python scripts/study_routers.py --data examples/zoo --out docs

Each task's own second pass is run once on all images; a router then only says whose answer counts. Tables show test
images, with validation images, on which choices were made, beside them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import matplotlib as mpl
import numpy as np
import torch
from numpy.typing import NDArray

from mass_export.artifact import Artifact
from mass_export.baselines import evaluate_baselines
from mass_export.calibration_features import tap_features
from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.datasets import load_labelled_images
from mass_export.head_evidence import judge_heads
from mass_export.heads import Head
from mass_export.layer_choice import macro_average
from mass_export.merge import merge
from mass_export.model import MassModel
from mass_export.progress import Progress
from mass_export.recipe import Recipe, load_recipe
from mass_export.router_spec import RouterSettings, default_router
from mass_export.routing import is_sure, log_posterior, projection_residuals
from mass_export.synthetic_images import synthetic_images
from runtime.bundle import TaskSpec
from runtime.routing import answer
from runtime.verification import verify_routes

mpl.use("svg")
from matplotlib import pyplot as plt

IMAGE_COUNTS = (5, 10, 20, 40, 80)
POOL_IMAGES = 300
SUBSETS = 5
SUITES = ("core", "hard")
UNSURE = {"verify_margin": 1.0, "verify_prior": 1.0}
# Short names of the rows that the picture names.
NAMED = {
    "paper, block": "paper",
    "**default**": "default",
    "**pool**": "pool",
    "**task images**": "task images",
}


@dataclasses.dataclass(frozen=True)
class Split:
    """Images of one split and what each task's own model says of them.

    Attributes:
        pixel_values: [n, 3, H, W]
        task, label: the truth. [n]
        logits: of every head, by the task whose model ran. [T, n, sum C]
    """

    pixel_values: NDArray[np.float32]
    task: NDArray[np.int64]
    label: NDArray[np.int64]
    logits: NDArray[np.float32]


class Suite:
    """A recipe's tasks, routed in many ways."""

    def __init__(self, path: Path, data: Path, progress: Progress) -> None:
        self.recipe, self.progress = load_recipe(path), progress
        depth = self.recipe.vision.layers
        self.base = merge(self.with_router(RouterSettings(layers=tuple(range(depth))), "zeroshot"), progress)
        self.splits = {name: self._split(data, name) for name in ("val", "test")}
        self.finetuned = {
            name: evaluate_baselines(self.recipe, data, split=name, progress=progress)[0].tasks
            for name in self.splits
        }

    def with_router(self, router: RouterSettings, base_merge: Any, **changes: Any) -> Recipe:
        """The recipe with other settings."""
        settings = dataclasses.replace(self.recipe.merge, base_merge=base_merge)
        return dataclasses.replace(self.recipe, router=router, merge=settings, **changes)

    def _split(self, data: Path, name: str) -> Split:
        parts = [load_labelled_images(data, task, name) for task in self.base.info.tasks]
        pixel_values = np.concatenate([part.pixel_values(self.recipe.preprocess) for part in parts])
        model = MassModel(self.base)
        logits = [
            np.concatenate([model.logits(batch, (t,)).numpy() for batch in batches(pixel_values)])
            for t in self.progress.track(list(range(len(parts))), f"Second passes, {name}")
        ]
        return Split(
            pixel_values,
            np.repeat(np.arange(len(parts)), [len(part) for part in parts]),
            np.concatenate([part.labels for part in parts]),
            np.stack(logits),
        )

    def score(
        self, artifact: Artifact, tasks: Sequence[int] | None = None, splits: Sequence[str] = ("val", "test")
    ) -> dict[str, float]:
        """Normalised joint accuracy and routing, on validation and test images of these tasks.

        Args:
            artifact: whose router is asked; it holds just these tasks.
            tasks: of the suite; None for all.
            splits: which images.
        """
        tasks = list(range(len(self.recipe.tasks))) if tasks is None else list(tasks)
        model, found = MassModel(artifact), {}
        for name in splits:
            rows = self.rows_of(name, tasks)
            parts = batches(self.splits[name].pixel_values[rows])
            scores = np.concatenate([model.residuals(part).numpy() for part in parts])
            found |= self.figures(name, artifact, tasks, rows, scores)
        return found

    def blocks_of(self, artifact: Artifact) -> float:
        """Blocks of the first pass, on average over the test images; the last one that is read counts half."""
        info = artifact.info
        if info.router.evidence:
            return float(info.vision.layers)
        last = max(tap.layer for tap in info.read_taps()) + 0.5
        if info.calibration is None or not info.calibration.stops:
            return last
        calibration, taps = artifact.calibration, info.calibration.discriminant
        assert calibration is not None
        assert calibration.stop_weight is not None
        assert calibration.stop_bias is not None
        features = tap_features(artifact, self.splits["test"].pixel_values, taps, self.progress)
        read = np.full(len(self.splits["test"].task), last)
        for index, stop in reversed(list(enumerate(info.calibration.stops))):
            z = torch.cat([features[tap] for tap in info.calibration.taps_before(stop)], dim=1).float()
            weight = calibration.stop_weight[index, :, : z.shape[1]]
            posterior = log_posterior(z, weight, calibration.stop_bias[index])
            read[is_sure(-posterior, info.calibration.stop_margin).numpy()] = stop + 0.5
        return float(read.mean())

    def rows_of(self, name: str, tasks: Sequence[int]) -> NDArray[np.int64]:
        """Images of these tasks in a split."""
        return np.flatnonzero(np.isin(self.splits[name].task, tasks))

    def figures(
        self, name: str, artifact: Artifact, tasks: list[int], rows: NDArray[np.int64], scores: Any
    ) -> dict[str, float]:
        """The same from scores that are there. [n, T]"""
        split, model = self.splits[name], MassModel(artifact)
        specs, columns = self._specs(tasks)

        def run(which: NDArray[np.int64], sets: list[tuple[int, ...]]) -> NDArray[np.float32]:
            chosen = [tasks[members[0]] for members in sets]
            return split.logits[chosen, rows[which]][:, columns]

        _, selection = model.route(scores)
        logits = run(np.arange(len(rows)), selection.sets())
        selection, verified = verify_routes(
            selection, logits, scores, allowed=None, settings=artifact.info.router, tasks=specs, run=run
        )
        task, label = answer(logits, specs, selection, "max")
        truth = np.searchsorted(tasks, split.task[rows])
        routed = task == truth
        right = routed & (label == split.label[rows])
        own = np.mean([self.finetuned[name][self.recipe.tasks[t].name] for t in tasks])
        return {
            f"{name}_joint": macro_average(right, truth) / float(own),
            f"{name}_routed": macro_average(routed, truth),
            f"{name}_verified": float(verified.mean()),
        }

    def _specs(self, tasks: list[int]) -> tuple[list[TaskSpec], NDArray[np.int64]]:
        """Where the heads of some tasks stand once only their logits are kept, and which these are."""
        starts = np.cumsum([0, *(len(t.classes) for t in self.recipe.tasks)])
        columns = np.concatenate([np.arange(starts[t], starts[t + 1]) for t in tasks])
        specs, start = [], 0
        for t in tasks:
            classes = self.recipe.tasks[t].classes
            specs.append(TaskSpec(self.recipe.tasks[t].name, classes, start, start + len(classes)))
            start += len(classes)
        return specs, columns


def batches(pixel_values: NDArray[np.float32], size: int = 256) -> Iterator[torch.Tensor]:
    """Batches as tensors."""
    for start in range(0, len(pixel_values), size):
        yield torch.from_numpy(pixel_values[start : start + size])


def routed_by(artifact: Artifact, **settings: Any) -> Artifact:
    """The artifact with other router settings; bases are cut to `rank`."""
    router = dataclasses.replace(artifact.info.router, **settings)
    bases = artifact.router_bases
    if router.rank is not None:
        bases = tuple({name: vh[: router.rank] for name, vh in of_task.items()} for of_task in bases)
    return dataclasses.replace(
        artifact, info=dataclasses.replace(artifact.info, router=router), router_bases=bases
    )


def default_of(base: Artifact) -> Artifact:
    """The default router of an artifact that reads the base at every mlp input."""
    half = max(1, base.router_bases[0][base.info.taps()[0].parameter].shape[0] // 2)
    evidence = 1.0 if judge_heads(base.heads).helps else 0.0
    return routed_by(base, **default_settings(base, half), evidence=evidence)


def default_settings(base: Artifact, rank: int) -> dict[str, Any]:
    """Of the default router but for head evidence."""
    router = default_router(base.info.vision.layers, rank)
    return {name: getattr(router, name) for name in ("layers", "standardize", "mode", "rank")}


def of_tasks(artifact: Artifact, tasks: Sequence[int]) -> Artifact:
    """The artifact with some of its tasks; the first pass stays."""

    def pick(parts: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(parts[t] for t in tasks)

    info = artifact.info
    info = dataclasses.replace(
        info, tasks=pick(info.tasks), rank_ratios=pick(info.rank_ratios), ranks=pick(info.ranks)
    )
    return dataclasses.replace(
        artifact,
        info=info,
        tasks=pick(artifact.tasks),
        router_bases=pick(artifact.router_bases),
        heads=pick(artifact.heads),
    )


def without_task_component(heads: Sequence[Head]) -> tuple[Head, ...]:
    """Class vectors less the mean of their head, at their old length."""
    changed = []
    for head in heads:
        centred = head.weight - head.weight.mean(dim=0)
        length = head.weight.norm(dim=1, keepdim=True)
        changed.append(Head(centred / centred.norm(dim=1, keepdim=True) * length, head.bias))
    return tuple(changed)


def best_single_layer(suite: Suite, artifact: Artifact, tasks: Sequence[int] | None = None) -> dict[str, Any]:
    """The paper's router with top-1 gates at the block that is best on validation images."""
    tasks = list(range(len(suite.recipe.tasks))) if tasks is None else list(tasks)
    rows: list[dict[str, Any]] = [{"layer": tap.layer} for tap in artifact.info.taps()]
    for name in suite.splits:
        chosen = suite.rows_of(name, tasks)
        features = tap_features(
            artifact, suite.splits[name].pixel_values[chosen], artifact.info.taps(), Progress(quiet=True)
        )
        for row, tap in zip(rows, artifact.info.taps(), strict=True):
            bases = [of_task[tap.parameter].double() for of_task in artifact.routing_bases]
            residuals = projection_residuals(features[tap], bases, "l2").numpy()
            alone = routed_by(artifact, layers=(tap.layer,), mode="top1")
            row.update(suite.figures(name, alone, tasks, chosen, residuals))
    best = max(rows, key=lambda row: row["val_joint"])
    return best | {"blocks": best["layer"] + 0.5}


def study(suite: Suite, seed: int = 0) -> dict[str, Any]:
    """All tables of one suite."""
    depth, T = suite.recipe.vision.layers, len(suite.recipe.tasks)
    layers = tuple(range(depth))
    plain = RouterSettings(layers=layers, mode="top1")
    merged = merge(suite.with_router(plain, "tsvm"), suite.progress)
    base = dataclasses.replace(suite.base, info=dataclasses.replace(suite.base.info, router=plain))
    half = max(1, base.router_bases[0][base.info.taps()[0].parameter].shape[0] // 2)
    by_tasks = routed_by(base, standardize="tasks", rank=half)
    default = routed_by(base, **default_settings(base, half), evidence=1.0)
    no_heads = routed_by(default, evidence=0.0)
    rng = np.random.default_rng(seed)
    val = suite.splits["val"]
    pool = val.pixel_values[rng.permutation(len(val.task))[:POOL_IMAGES]]
    orders = [rng.permutation(np.flatnonzero(val.task == t)) for t in range(T)]

    def images(count: int) -> dict[str, NDArray[np.float32]]:
        names = [task.name for task in suite.recipe.tasks]
        return {name: val.pixel_values[order[:count]] for name, order in zip(names, orders, strict=True)}

    def calibrated(count: int, **settings: Any) -> Artifact:
        return calibrate_task_images(default, images(count), progress=suite.progress, **settings)[0]

    quiet = {"progress": suite.progress}
    rows: list[tuple[str, str, Artifact]] = [
        ("all blocks, summed; merged", "nothing", merged),
        ("all blocks, summed; base", "nothing", base),
        ("all blocks, standardised; merged", "nothing", routed_by(merged, standardize="tasks")),
        ("all blocks, standardised; base", "nothing", routed_by(base, standardize="tasks")),
        ("the same, half rank", "nothing", by_tasks),
        ("the same, and head evidence", "nothing", routed_by(by_tasks, evidence=2.0)),
        ("relative to the feature, half rank", "nothing", routed_by(by_tasks, standardize="length")),
        ("the same, last three quarters", "nothing", no_heads),
        ("the same, quarter rank", "nothing", routed_by(no_heads, rank=max(1, half // 2))),
        ("the same, full rank", "nothing", routed_by(base, **default_settings(base, 2 * half))),
        ("half rank, mlp and attention inputs", "nothing", _both_sites(suite, half)),
        ("mlp and attention inputs, and head evidence", "nothing", _both_sites(suite, half, evidence=1.0)),
        ("half rank, mean of all tokens", "nothing", routed_by(no_heads, token="mean")),  # noqa: S106
        (
            "half rank, calibrated on synthetic images",
            "nothing",
            calibrate_pool(no_heads, synthetic_images(no_heads), synthetic=True, **quiet),
        ),
        ("**default**: last three quarters, head evidence", "nothing", default),
        ("default, verified where unsure", "nothing", routed_by(default, **UNSURE)),
        (
            "half rank, bias removed on a pool",
            f"{POOL_IMAGES} images",
            calibrate_pool(no_heads, pool, pseudo_labels=False, **quiet),
        ),
        (
            "the same, heads heard, and its own answers",
            f"{POOL_IMAGES} images",
            calibrate_pool(no_heads, pool, **quiet),
        ),
        (
            "**pool**: default and its own answers",
            f"{POOL_IMAGES} images",
            calibrate_pool(default, pool, **quiet),
        ),
        ("discriminant", "40 images a task", calibrated(40, verify=False, stop_early=False)),
        ("the same, verified where unsure", "40 images a task", calibrated(40, stop_early=False)),
        ("**task images**: verified, early stops", "40 images a task", calibrated(40)),
    ]
    single = {"merged": best_single_layer(suite, merged), "base": best_single_layer(suite, base)}
    table = [
        {"router": f"paper, block {row['layer']}; {name}", "knows": "nothing", **without(row, "layer")}
        for name, row in single.items()
    ]
    table += [
        {"router": name, "knows": knows, **suite.score(artifact), "blocks": suite.blocks_of(artifact)}
        for name, knows, artifact in suite.progress.track(rows, "Routers")
    ]
    centred = dataclasses.replace(default, heads=without_task_component(default.heads))
    return {
        "tasks": [task.name for task in suite.recipe.tasks],
        "depth": depth,
        "rank_ratio": suite.recipe.tasks[0].rank_ratio,
        "table": table,
        "images_per_task": [
            {"images": n, **suite.score(a), "blocks": suite.blocks_of(a)}
            for n in IMAGE_COUNTS
            for a in [calibrated(n)]
        ],
        "head_test": {
            "own heads": dataclasses.asdict(judge_heads(default.heads)),
            "task component removed": dataclasses.asdict(judge_heads(centred.heads)),
        },
        "centred_evidence": suite.score(centred),
    }


def _both_sites(suite: Suite, rank: int, evidence: float = 0.0) -> Artifact:
    router = dataclasses.replace(
        default_router(suite.recipe.vision.layers, rank), site="both", evidence=evidence
    )
    return merge(suite.with_router(router, "zeroshot"), suite.progress)


def without(row: dict[str, Any], key: str) -> dict[str, Any]:
    """The row less one entry."""
    return {name: value for name, value in row.items() if name != key}


def with_costs(result: dict[str, Any]) -> None:
    """Add what each router costs on images that need one task, as a multiple of one plain pass (MASS.md's counting).

    First pass: the share of blocks that it reads. Second pass: 1 plus the low-rank branches, 4/3 of the tasks' rank
    ratio. An image that is verified runs the second pass twice.
    """
    depth, ratio = result["depth"], result["rank_ratio"]
    for row in (*result["table"], *result["images_per_task"]):
        second = 1 + 4 / 3 * ratio
        row["cost"] = row["blocks"] / depth + second * (1 + row["test_verified"])


def frontier(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows than which none is both cheaper and better, cheapest first."""
    best, kept = -1.0, []
    for row in sorted(rows, key=lambda row: (row["cost"], -row["test_joint"])):
        if row["test_joint"] > best:
            best = row["test_joint"]
            kept.append(row)
    return kept


def draw_costs(results: dict[str, Any], out: Path) -> None:
    """Accuracy against cost, a panel for each suite; colours by what the router knows, the frontier as a line."""
    fig, panels = plt.subplots(1, len(SUITES), figsize=(8.4, 3.4))
    colours = {"nothing": "C0", "300 images": "C2", "40 images a task": "C3"}
    for panel, name in zip(panels, SUITES, strict=True):
        rows = [row for row in results[name]["table"] if row["test_joint"] > 0.75]
        for knows, colour in colours.items():
            chosen = [row for row in rows if row["knows"] == knows]
            panel.scatter(
                [row["cost"] for row in chosen],
                [row["test_joint"] for row in chosen],
                s=18,
                color=colour,
                label=knows,
            )
        line = frontier(rows)
        panel.plot([r["cost"] for r in line], [r["test_joint"] for r in line], color="0.6", lw=1, zorder=0)
        for row in rows:
            label = next((short for start, short in NAMED.items() if row["router"].startswith(start)), None)
            if label is not None and not row["router"].endswith("base"):
                panel.annotate(
                    label,
                    (row["cost"], row["test_joint"]),
                    textcoords="offset points",
                    xytext=(6, 3 if label == "pool" else -10),
                    fontsize=8,
                )
        panel.set(title=name, xlabel="cost, plain passes", ylabel="joint accuracy / fine-tuned")
    panels[0].legend(frameon=False, title="may know", fontsize=8)
    fig.tight_layout()
    fig.savefig(out / "router_costs.svg", metadata={"Date": None})


def by_number_of_tasks(suite: Suite, seed: int = 0) -> list[dict[str, Any]]:
    """Paper's and default router on random subsets of the tasks."""
    depth, T = suite.recipe.vision.layers, len(suite.recipe.tasks)
    rng = np.random.default_rng(seed)
    rows = []
    for count in suite.progress.track([n for n in (2, 4, 8, 10) if n <= T], "Subsets"):
        subsets = [sorted(rng.permutation(T)[:count].tolist()) for _ in range(SUBSETS if count < T else 1)]
        for tasks in subsets:
            chosen = tuple(suite.recipe.tasks[t] for t in tasks)
            recipe = suite.with_router(
                RouterSettings(layers=tuple(range(depth)), mode="top1"), "tsvm", tasks=chosen
            )
            paper = best_single_layer(suite, merge(recipe, suite.progress), tasks)
            default = default_of(of_tasks(suite.base, tasks))
            rows.append(
                {
                    "T": count,
                    "tasks": [suite.recipe.tasks[t].name for t in tasks],
                    "paper": paper["test_joint"],
                    "default": suite.score(default, tasks)["test_joint"],
                    "evidence": default.info.router.evidence,
                }
            )
    return rows


def draw(results: dict[str, Any], out: Path) -> None:
    """Accuracy by number of tasks, and by number of images a task."""
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    fig, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3), sharey=True)
    for name, marker in (("paper", "s"), ("default", "o")):
        rows = results["by_number_of_tasks"]
        counts = sorted({row["T"] for row in rows})
        means = [np.mean([row[name] for row in rows if row["T"] == n]) for n in counts]
        left.plot(counts, means, marker=marker, label=name)
        left.scatter([row["T"] for row in rows], [row[name] for row in rows], s=8, color="0.7", zorder=0)
    left.set(xlabel="tasks", ylabel="joint accuracy / fine-tuned", title="subsets of the ten tasks")
    left.legend(frameon=False)
    for name in ("core", "hard"):
        rows = results[name]["images_per_task"]
        right.plot([r["images"] for r in rows], [r["test_joint"] for r in rows], marker="o", label=name)
    right.set(xlabel="images a task", title="discriminant, verified where unsure")
    right.set_xscale("log", base=2)
    right.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(out / "routers.svg", metadata={"Date": None})


def markdown(rows: Sequence[dict[str, Any]], columns: dict[str, str]) -> str:
    """A table; shares as per cent."""

    def cell(key: str, value: Any) -> str:
        if isinstance(value, float) and key in ("blocks", "cost"):
            return f"{value:.1f}" if key == "blocks" else f"{value:.2f}"
        return f"{100 * value:.1f}" if isinstance(value, float) else str(value)

    lines = [f"| {' | '.join(columns.values())} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(key, row.get(key, '-')) for key in columns)} |" for row in rows]
    return "\n".join(lines)


def measure(data: Path, progress: Progress) -> dict[str, Any]:
    """Every figure of both suites."""
    suites = {name: Suite(data / f"{name}.yaml", data, progress) for name in SUITES}
    results: dict[str, Any] = {name: study(suite) for name, suite in suites.items()}
    return results | {"by_number_of_tasks": by_number_of_tasks(suites["hard"])}


@click.command()
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--out", default=Path("docs"), show_default=True, type=click.Path(path_type=Path))
@click.option("--quiet", is_flag=True, help="No progress bars.")
@click.option("--redraw", is_flag=True, help="Tables and picture from the routers.json that is there.")
def main(data: Path, out: Path, *, quiet: bool, redraw: bool) -> None:
    """Write routers.md, routers.svg and routers.json."""
    out.mkdir(parents=True, exist_ok=True)
    figures = out / "routers.json"
    if not redraw:
        figures.write_text(
            json.dumps(measure(data, Progress(quiet=quiet)), indent=1) + "\n", encoding="utf-8"
        )
    results: dict[str, Any] = json.loads(figures.read_text(encoding="utf-8"))
    for name in SUITES:
        with_costs(results[name])
    draw(results, out)
    draw_costs(results, out)
    table = {
        "router": "router",
        "knows": "knows",
        "test_joint": "joint, test",
        "test_routed": "routed, test",
        "val_joint": "joint, validation",
        "test_verified": "verified",
        "blocks": "blocks read",
        "cost": "cost",
    }
    counts = {"images": "images a task", **{k: v for k, v in table.items() if k not in ("router", "knows")}}
    sections = [
        "# Routers, and what they may know",
        (
            f"Made by `python scripts/study_routers.py --data {data} --out {out}` ({platform.machine()}, "
            f"{os.cpu_count()} processors, fp32). Joint accuracy is a share of the fine-tuned models' accuracy, in per "
            "cent, averaged over tasks. *Blocks read* is the mean length of the first pass. *Cost* is that of both "
            "passes as a multiple of one plain pass, counted, not timed: blocks read over depth, plus 1 + 4/3 of the "
            "rank ratio for each second pass, of which a verified image runs two."
        ),
        "![Accuracy by number of tasks and by images a task](routers.svg)",
        "![Accuracy against cost](router_costs.svg)",
        (
            "The grey line joins the routers than which none is both cheaper and better. Which is the default, and "
            "why: [method.md](method.md#which-router)."
        ),
    ]
    for name in SUITES:
        result = results[name]
        tests = ", ".join(
            f"{kind}: {100 * row['accuracy']:.0f}% and {row['gap']:.2f}"
            for kind, row in result["head_test"].items()
        )
        sections += [
            f"## {name}: {', '.join(result['tasks'])}",
            markdown(result["table"], table),
            markdown(result["images_per_task"], counts),
            (
                f"Test of the heads (accuracy, gap): {tests}. Had evidence been used all the same with the task "
                f"component removed: {100 * result['centred_evidence']['test_joint']:.1f}."
            ),
        ]
    summary = []
    for count in sorted({row["T"] for row in results["by_number_of_tasks"]}):
        rows = [row for row in results["by_number_of_tasks"] if row["T"] == count]
        summary.append(
            {
                "T": count,
                "subsets": len(rows),
                "paper": float(np.mean([r["paper"] for r in rows])),
                "default": float(np.mean([r["default"] for r in rows])),
                "worst": f"{100 * min(r['default'] - r['paper'] for r in rows):+.1f}",
            }
        )
    sections += [
        "## By number of tasks",
        "Random subsets of the ten; the paper's block is chosen for each on validation images.",
        markdown(
            summary,
            {
                "T": "tasks",
                "subsets": "subsets",
                "paper": "paper",
                "default": "default",
                "worst": "smallest gain, points",
            },
        ),
    ]
    (out / "routers.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    click.echo(f"Wrote {out / 'routers.md'}")


if __name__ == "__main__":
    main()
