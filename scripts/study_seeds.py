"""Is a router better than the paper's everywhere? Three fine-tunings of the zoo, and subsets that leave tasks out.

    python scripts/train_zoo.py download                            # once; the committed towers are the first seed
    python scripts/train_zoo.py finetune --seed 1 --tag seed1
    python scripts/train_zoo.py finetune --seed 2 --tag seed2
    python scripts/train_zoo.py finetune package --base build/zoo/words.safetensors --tag words \
        --out build/zoo/on_words                                    # another base: before it saw such pictures
    python scripts/study_seeds.py --data examples/zoo --zoo words=build/zoo/on_words --out docs

The paper's router gets the block that is best on validation images of the same tasks; the others choose nothing. Heads
are the zoo's, and once more with what they know about tasks removed (`without_task_component`).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import platform
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from study_routers import (
    POOL_IMAGES,
    Suite,
    best_single_layer,
    default_of,
    markdown,
    of_tasks,
    without_task_component,
)

from mass_export.calibration_pool import calibrate_pool
from mass_export.calibration_task_images import calibrate_task_images
from mass_export.merge import merge
from mass_export.progress import Progress
from mass_export.router_spec import RouterSettings

LEVELS = ("default", "pool", "task_images")
IMAGES_PER_TASK = 40
NINES, FOURS, PAIRS = 5, 5, 8


def recipe_with_towers(recipe: Path, towers: Path | None, out: Path) -> Path:
    """The recipe with the checkpoints of another training; paths become absolute."""
    data = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    data["model"], data["base"] = (str((recipe.parent / data[key]).resolve()) for key in ("model", "base"))
    for task in data["tasks"]:
        checkpoint = recipe.parent / task["checkpoint"]
        task["checkpoint"] = str(((towers or checkpoint.parent) / checkpoint.name).resolve())
        task["head"]["file"] = str((recipe.parent / task["head"]["file"]).resolve())
        task["classes"] = str((recipe.parent / task["classes"]).resolve())
    out.write_text(yaml.safe_dump(data), encoding="utf-8")
    return out


def subsets(T: int, core: int, rng: np.random.Generator) -> dict[str, list[tuple[int, ...]]]:
    """Suites of the ten tasks: the core, all, and some of nine, four and two."""
    everything = tuple(range(T))
    pairs = list(itertools.combinations(everything, 2))
    fours = list(itertools.combinations(everything, 4))
    return {
        "core eight": [tuple(range(core))],
        "hard ten": [everything],
        "all but one": [tuple(t for t in everything if t != out) for out in rng.permutation(T)[:NINES]],
        "four tasks": [fours[i] for i in rng.permutation(len(fours))[:FOURS]],
        "two tasks": [pairs[i] for i in rng.permutation(len(pairs))[:PAIRS]],
    }


def levels(suite: Suite, tasks: Sequence[int], *, centred: bool, seed: int = 0) -> dict[str, float]:
    """Joint accuracy of each level on test images, as a share of fine-tuned."""
    depth, rng = suite.recipe.vision.layers, np.random.default_rng(seed)
    base = of_tasks(suite.base, tasks)
    if centred:
        base = dataclasses.replace(base, heads=without_task_component(base.heads))
    default = default_of(base)
    val = suite.splits["val"]
    orders = {t: rng.permutation(np.flatnonzero(val.task == t)) for t in tasks}
    pool = rng.permutation(np.concatenate(list(orders.values())))[:POOL_IMAGES]
    images = {
        suite.recipe.tasks[t].name: val.pixel_values[rows[:IMAGES_PER_TASK]] for t, rows in orders.items()
    }
    artifacts = {
        "default": default,
        "pool": calibrate_pool(default, val.pixel_values[pool], progress=suite.progress),
        "task_images": calibrate_task_images(default, images, progress=suite.progress)[0],
    }
    recipe = suite.with_router(
        RouterSettings(layers=tuple(range(depth)), mode="top1"),
        "tsvm",
        tasks=tuple(suite.recipe.tasks[t] for t in tasks),
    )
    paper = best_single_layer(suite, merge(recipe, suite.progress), tasks)
    return {"paper": paper["test_joint"], "evidence": default.info.router.evidence} | {
        name: suite.score(artifact, tasks, ("test",))["test_joint"] for name, artifact in artifacts.items()
    }


def measure(
    data: Path, towers: Path | None, tag: str, scratch: Path, progress: Progress
) -> list[dict[str, Any]]:
    """One row for each subset and kind of heads of one fine-tuning."""
    scratch.mkdir(parents=True, exist_ok=True)
    suite = Suite(recipe_with_towers(data / "hard.yaml", towers, scratch / f"{tag}.yaml"), data, progress)
    core = len(yaml.safe_load((data / "core.yaml").read_text(encoding="utf-8"))["tasks"])
    chosen = subsets(len(suite.recipe.tasks), core, np.random.default_rng(0))
    jobs = [(kind, tasks, False) for kind, of_kind in chosen.items() for tasks in of_kind]
    jobs += [(kind, tasks, True) for kind in ("core eight", "hard ten") for tasks in chosen[kind]]
    rows = []
    for kind, tasks, centred in progress.track(jobs, f"Subsets, {tag}"):
        names = [suite.recipe.tasks[t].name for t in tasks]
        row = {"seed": tag, "suite": kind, "tasks": names, "centred": centred}
        rows.append(row | levels(suite, tasks, centred=centred))
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each suite and kind of heads: means, and the paired differences from the paper's router in points."""
    table = []
    for centred in (False, True):
        for kind in dict.fromkeys(row["suite"] for row in rows):
            of_kind = [row for row in rows if row["suite"] == kind and row["centred"] == centred]
            if not of_kind:
                continue
            heads = "task component removed" if centred else "own"
            line: dict[str, Any] = {"suite": kind, "heads": heads, "cases": len(of_kind)}
            line["paper"] = float(np.mean([row["paper"] for row in of_kind]))
            for level in LEVELS:
                gains = 100 * np.array([row[level] - row["paper"] for row in of_kind])
                line[level] = float(np.mean([row[level] for row in of_kind]))
                line[f"{level}_gain"] = (
                    f"{gains.mean():+.1f} ± {gains.std(ddof=1) if len(gains) > 1 else 0:.1f}, least {gains.min():+.1f}"
                )
            table.append(line)
    return table


@click.command(help=__doc__)
@click.option("--data", default=Path("examples/zoo"), show_default=True, type=click.Path(path_type=Path))
@click.option("--towers", default=Path("build/zoo/finetuned"), type=click.Path(path_type=Path))
@click.option("--tag", "tags", multiple=True, default=["committed", "seed1", "seed2"], show_default=True)
@click.option("--zoo", "zoos", multiple=True, help="NAME=FOLDER of a zoo on another base; may be repeated.")
@click.option("--out", default=Path("docs"), show_default=True, type=click.Path(path_type=Path))
@click.option("--processes", default=2, show_default=True, help="Of one thread each; a seed is one's work.")
def main(
    data: Path, towers: Path, tags: tuple[str, ...], zoos: tuple[str, ...], out: Path, processes: int
) -> None:
    """Write seeds.md and seeds.json."""
    out.mkdir(parents=True, exist_ok=True)
    work = [(data, None if tag == "committed" else towers / tag / "checkpoints", tag) for tag in tags]
    work += [(Path(folder), None, name) for name, _, folder in (zoo.partition("=") for zoo in zoos)]
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = []
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(measure, *job, towers, Progress(quiet=True)) for job in work]
        for job in Progress().track(jobs, "Seeds"):
            rows += job.result()
    (out / "seeds.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    command = f"--data {data} {''.join(f'--zoo {zoo} ' for zoo in zoos)}--out {out}"
    (out / "seeds.md").write_text(page(rows, tags, command), encoding="utf-8")
    click.echo(f"Wrote {out / 'seeds.md'}")


def page(rows: Sequence[dict[str, Any]], tags: Sequence[str], command: str) -> str:
    """The tables: all seeds of the zoo together, then each zoo on another base."""
    columns = {"suite": "suite", "heads": "heads", "cases": "cases", "paper": "paper"}
    for level in LEVELS:
        columns |= {level: level, f"{level}_gain": "gain, points"}
    least = {level: min(rows, key=lambda row, level=level: row[level] - row["paper"]) for level in LEVELS}
    losses = [
        f"- `{level}`: {100 * (row[level] - row['paper']):+.1f} points, {row['seed']}, {row['suite']} "
        f"({', '.join(row['tasks'])}{', heads without task component' if row['centred'] else ''})"
        for level, row in least.items()
    ]
    sections = [
        "# Seeds, subsets, another base",
        (
            f"Made by `python scripts/study_seeds.py {command}` ({platform.machine()}, {os.cpu_count()} processors, "
            "fp32). Joint accuracy on test images, task unknown, as a share of the fine-tuned models', in per cent, "
            "averaged over cases (a fine-tuning and a subset); gains over the paper's router are paired: mean ± "
            "standard deviation over the cases, and the smallest. The paper's router is given the block that is best "
            "on validation images of each case."
        ),
        f"## The zoo, fine-tuned {len(tags)} times",
        markdown(summary([row for row in rows if row["seed"] in tags]), columns),
    ]
    for other in dict.fromkeys(row["seed"] for row in rows if row["seed"] not in tags):
        sections += [
            f"## On another base: {other}",
            markdown(summary([row for row in rows if row["seed"] == other]), columns),
        ]
    sections.append("Smallest gain of each level:\n\n" + "\n".join(losses))
    return "\n\n".join(sections) + "\n"


if __name__ == "__main__":
    main()
