#!/usr/bin/env python3
"""Rebuilds the example zoo from nothing: packages, corpus, base, ten fine-tuned towers, committed files.

    scripts/train_zoo.py                     # everything that is not there yet
    scripts/train_zoo.py finetune --task mnist
    scripts/train_zoo.py finetune --seed 1 --tag seed1    # more towers, beside the committed ones
    scripts/train_zoo.py finetune package --base build/zoo/words.safetensors --tag words --out build/zoo/on_words

Every stage skips what it finds done in the cache; an interrupted training goes on from its last checkpoint.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

# Before torch is imported: one thread a process, two processes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import click

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY / "examples" / "zoo"))

from build.arrays import TaskArrays  # noqa: E402 - the zoo is not an installed package
from build.contrast import ContrastSettings, adapt  # noqa: E402
from build.corpus import build_corpus  # noqa: E402
from build.downloads import Sources  # noqa: E402
from build.finetune import SETTINGS, finetune  # noqa: E402
from build.package import package_zoo  # noqa: E402
from build.pretrain import PretrainSettings, pretrain  # noqa: E402
from build.tasks import TASKS, build_task  # noqa: E402

STAGES = ("download", "corpus", "pretrain", "adapt", "finetune", "package")


@click.command(help=__doc__)
@click.argument("stages", nargs=-1, type=click.Choice(STAGES))
@click.option(
    "--cache",
    type=click.Path(path_type=Path),
    default=REPOSITORY / "build" / "zoo",
    help="Downloads and training.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=REPOSITORY / "examples" / "zoo", help="The zoo."
)
@click.option(
    "--task", "tasks", multiple=True, type=click.Choice(TASKS), help="Only this task (may be repeated)."
)
@click.option("--seed", default=0, show_default=True, help="Of weights, batches and augmentation.")
@click.option(
    "--tag", default="committed", show_default=True, help="Folder of the fine-tuned towers in the cache."
)
@click.option(
    "--steps", type=int, help="Other number of steps than the zoo's, for the training stages that are run."
)
@click.option(
    "--base",
    "other_base",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Fine-tune and package another base than the cache's.",
)
@click.option("--processes", default=2, show_default=True, help="Processes of one thread each.")
def main(
    stages: tuple[str, ...],
    cache: Path,
    out: Path,
    tasks: tuple[str, ...],
    seed: int,
    tag: str,
    steps: int | None,
    other_base: Path | None,
    processes: int,
) -> None:
    """Runs the stages in their order."""
    stages = stages or STAGES
    tasks = tasks or TASKS
    words, base, trained = cache / "words.safetensors", cache / "base.safetensors", cache / "finetuned" / tag
    if "download" in stages:
        for task in tasks:
            arrays_of(task, cache)
    if "corpus" in stages:
        build_corpus(Sources(cache), cache / "corpus", processes)
    if "pretrain" in stages:
        settings = PretrainSettings(seed=seed, processes=processes)
        settings = settings if steps is None else replace(settings, steps=steps)
        pretrain(cache / "corpus", cache / "pretrain", words, settings)
    if "adapt" in stages:
        contrast = ContrastSettings(seed=seed)
        contrast = contrast if steps is None else replace(contrast, steps=steps)
        adapt({task: arrays_of(task, cache) for task in TASKS}, words, cache / "adapt", base, contrast)
    base = other_base or base
    if "finetune" in stages:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            jobs = [pool.submit(finetune_task, task, cache, base, trained, seed, steps) for task in tasks]
            for job in jobs:
                job.result()
    if "package" in stages:
        package_zoo({task: arrays_of(task, cache) for task in TASKS}, base, trained, out)


def arrays_of(task: str, cache: Path) -> TaskArrays:
    """A task's images, built once."""
    path = cache / "arrays" / f"{task}.npz"
    if not path.is_file():
        build_task(task, Sources(cache)).save(path)
    return TaskArrays.load(path)


def finetune_task(task: str, cache: Path, base: Path, trained: Path, seed: int, steps: int | None) -> None:
    """One task's tower, in a process of its own."""
    import torch  # noqa: PLC0415 - the parent process does not need it

    torch.set_num_threads(1)
    settings = SETTINGS[task] if steps is None else replace(SETTINGS[task], steps=steps)
    finetune(task, arrays_of(task, cache), base, trained, seed=seed, settings=settings)


if __name__ == "__main__":
    main()
