"""The commands that look: `mass classify`, `inspect`, `doctor`, `eval`, `bench`, `choose-layer`, `report`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from mass_export.command_group import (
    ALLOW_PICKLE,
    ANY_PATH,
    DIRECTORY,
    FILE,
    FOUND_PROBLEMS,
    PROVIDER,
    QUIET,
    command,
    example,
    print_tables,
)

if TYPE_CHECKING:
    from runtime.provider import Provider


@command(
    epilog=example(
        "mass classify --bundle engines/ cat.jpg",
        "mass classify --bundle engines/ photos/ --json > answers.json",
        "mass classify --bundle engines/ plate.png --task plates --top-k 3",
    )
)
@click.argument("images", type=ANY_PATH, nargs=-1, required=True)
@click.option("--bundle", required=True, type=DIRECTORY, help="What `mass export` wrote.")
@click.option("--task", "tasks", multiple=True, metavar="NAME", help="Only this task may answer; repeatable.")
@click.option(
    "--top-k", type=click.IntRange(1), default=3, show_default=True, help="Labels for each image, at most."
)
@click.option("--provider", type=PROVIDER, default="auto", show_default=True, help="Where the bundle runs.")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, as of `python -m runtime --json`.")
@QUIET
def classify(
    images: tuple[Path, ...],
    bundle: Path,
    tasks: tuple[str, ...],
    top_k: int,
    provider: Provider,
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Say what is on IMAGES: files, or folders of them.

    Without --task the task is found, too: a first pass over an image picks it, a second one answers.
    """
    import json  # noqa: PLC0415

    from mass_export.image_pool import image_files  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.tables import answers_table  # noqa: PLC0415
    from runtime.classifier import Classifier  # noqa: PLC0415

    files = [file for image in images for file in image_files(image)]
    with Classifier(bundle, provider) as classifier:
        coming = classifier.predict_iter(files, tasks or None, top_k)
        predictions = list(Progress(quiet=quiet).track(coming, "Classifying", total=len(files)))
    if as_json:
        named = zip(files, predictions, strict=True)
        click.echo(json.dumps([{"image": str(file), **found.to_dict()} for file, found in named], indent=1))
    else:
        print_tables(answers_table([str(file) for file in files], predictions))


@command("inspect", epilog=example("mass inspect merged.safetensors", "mass inspect engines/ --json"))
@click.argument("path", type=ANY_PATH)
@click.option("--json", "as_json", is_flag=True, help="One JSON object; see mass_export.inspection_report.")
@QUIET
def inspect_command(path: Path, *, as_json: bool, quiet: bool) -> None:
    """Show what an artifact or a bundle holds.

    Tasks, ranks, settings, and sizes against separate models and one model. Overlap of the tasks' subspaces, 0 to
    1, and condition numbers: where tasks share directions, the merge counts these once.
    """
    from mass_export.inspection import inspect  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    inspection = inspect(path, Progress(quiet=quiet))
    if as_json:
        from mass_export.inspection_report import json_from_inspection  # noqa: PLC0415

        click.echo(json_from_inspection(inspection))
        return
    from rich.console import Console  # noqa: PLC0415

    from mass_export.inspection_tables import print_inspection  # noqa: PLC0415

    print_inspection(inspection, Console())


@command(
    epilog=example(
        "mass doctor merged.safetensors",
        "mass doctor engines/ --data examples/zoo",
        "mass doctor engines/ --images photos/ --json",
    )
)
@click.argument("path", type=ANY_PATH)
@click.option(
    "--data", type=DIRECTORY, help="Labelled images of every task: also look at how they are routed."
)
@click.option("--split", default="val", show_default=True, help="Which of them.")
@click.option("--images", type=ANY_PATH, help="Unlabelled images instead: a folder or .npz file.")
@click.option("--strict", is_flag=True, help="Exit with 3 for warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; see mass_export.diagnosis_report.")
@QUIET
def doctor(
    path: Path,
    data: Path | None,
    split: str,
    images: Path | None,
    *,
    strict: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Look for known ways to fail in an artifact or bundle.

    Damaged files, task vectors that are zero, alike or of another base, too low a rank, ill-conditioned stacks, heads
    of unlike scale; with images also a router that always takes the same task, tasks that are never found, ties.

    Exit code: 0 without problems, 3 with problems, 1 if PATH or the images cannot be read.
    """
    from mass_export.diagnosis import diagnose, json_from_diagnosis  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    diagnosis = diagnose(path, Progress(quiet=quiet), data=data, split=split, images=images)
    if as_json:
        click.echo(json_from_diagnosis(diagnosis))
    else:
        from rich.console import Console  # noqa: PLC0415

        from mass_export.diagnosis_report import print_diagnosis  # noqa: PLC0415

        print_diagnosis(diagnosis, Console())
    failing = ("problem", "warning") if strict else ("problem",)
    if diagnosis.worst in failing:
        click.get_current_context().exit(FOUND_PROBLEMS)


@command("eval", epilog=example("mass eval --bundle engines/ --data examples/zoo --json scores.json"))
@click.option("--bundle", required=True, type=DIRECTORY, help="What `mass export` wrote.")
@click.option("--data", required=True, type=DIRECTORY, help="Labelled images of every task.")
@click.option(
    "--recipe", type=FILE, help="What was merged, for the baselines; by default it is looked for in DATA."
)
@click.option("--split", default="test", show_default=True, help="Which images.")
@click.option("--json", "json_path", type=FILE, help="Write the scores here, too.")
@click.option("--provider", type=PROVIDER, default="auto", show_default=True, help="Where the bundle runs.")
@ALLOW_PICKLE
@QUIET
def evaluate(
    bundle: Path,
    data: Path,
    recipe: Path | None,
    split: str,
    json_path: Path | None,
    provider: Provider,
    *,
    allow_pickle: bool,
    quiet: bool,
) -> None:
    """Score a bundle on labelled images, beside the baselines.

    Images lie in DATA/data/TASK/SPLIT.npz (arrays images and labels) or in DATA/TASK/SPLIT/CLASS/.
    """
    from mass_export.baselines import (  # noqa: PLC0415
        baselines_to_dict,
        evaluate_baselines,
        find_recipe,
        require_same_tasks,
    )
    from mass_export.evaluation import evaluate_bundle  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.recipe import load_recipe  # noqa: PLC0415
    from mass_export.report_files import write_json  # noqa: PLC0415
    from mass_export.tables import accuracy_table, confidence_sentence, routing_table  # noqa: PLC0415
    from runtime.manifest import read_manifest  # noqa: PLC0415

    progress, manifest = Progress(quiet=quiet), read_manifest(bundle)
    found = find_recipe(manifest, data) if recipe is None else recipe
    parsed = None if found is None else load_recipe(found, allow_pickle=allow_pickle)
    baselines, finetuned = None, None
    if parsed is not None:
        require_same_tasks(parsed, manifest)
        rows = evaluate_baselines(parsed, data, split=split, progress=progress)
        baselines, finetuned = baselines_to_dict(rows), rows[0].tasks
    evaluation = evaluate_bundle(
        bundle, data, split=split, finetuned=finetuned, provider=provider, progress=progress
    )
    scores = evaluation.to_dict()
    print_tables(accuracy_table(scores, baselines), routing_table(scores))
    if scores["confidence"] is not None:
        click.echo(confidence_sentence(scores["confidence"]))
    if baselines is None:
        click.echo(f"No recipe of this bundle in {data}: without --recipe there are no baselines.", err=True)
    if json_path is not None:
        write_json(json_path, {"bundle": str(bundle), **scores, "baselines": baselines})


@command(
    epilog=example(
        "mass bench --bundle engines/",
        "mass bench --bundle engines/ --artifact merged.safetensors --batch 1 --json",
    )
)
@click.option("--bundle", required=True, type=DIRECTORY, help="What `mass export` wrote.")
@click.option("--artifact", type=FILE, help="What it was exported from, to time PyTorch as well.")
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    help="Images in a call; 1, 8 and 32 by default.",
)
@click.option("--rounds", default=15, show_default=True, type=click.IntRange(1), help="Timed calls of each.")
@click.option("--threads", type=click.IntRange(1), help="Threads; every processor by default.")
@click.option("--clock", type=click.Choice(["wall", "cpu"]), default="wall", show_default=True,
              help="cpu: processor time, for a busy machine; needs --threads 1.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="One JSON object; see mass_export.bench.")
@QUIET
def bench(
    bundle: Path,
    artifact: Path | None,
    batches: tuple[int, ...],
    rounds: int,
    threads: int | None,
    clock: Literal["wall", "cpu"],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time a bundle on this CPU against a plain CLIP pass.

    All calls take turns in one process; medians are shown with the 10th and 90th percentile.
    """
    from mass_export.bench import (  # noqa: PLC0415
        BenchSettings,
        bench_bundle,
        bench_table,
        json_from_bench,
        start_table,
    )
    from mass_export.progress import Progress  # noqa: PLC0415

    settings = BenchSettings(batches=batches or (1, 8, 32), rounds=rounds, threads=threads, clock=clock)
    result = bench_bundle(bundle, artifact, settings, Progress(quiet=quiet))
    if as_json:
        click.echo(json_from_bench(result), nl=False)
    else:
        print_tables(bench_table(result), start_table(result))


@command("choose-layer", epilog=example("mass choose-layer examples/zoo/core.yaml --data examples/zoo"))
@click.argument("recipe", type=FILE)
@click.option("--data", required=True, type=DIRECTORY, help="Labelled images of every task.")
@click.option("--split", default="val", show_default=True, help="Which images; not those that you report on.")
@click.option("--json", "json_path", type=FILE, help="Write the scores here, too.")
@ALLOW_PICKLE
@QUIET
def choose_layer(
    recipe: Path, data: Path, split: str, json_path: Path | None, *, allow_pickle: bool, quiet: bool
) -> None:
    """Score every block as the routing layer of RECIPE."""
    from mass_export.layer_choice import best_layer, score_layers  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.recipe import load_recipe  # noqa: PLC0415
    from mass_export.report_files import write_json  # noqa: PLC0415
    from mass_export.tables import layer_table  # noqa: PLC0415

    parsed = load_recipe(recipe, allow_pickle=allow_pickle)
    scores = score_layers(parsed, data, split=split, progress=Progress(quiet=quiet))
    best = best_layer(scores)
    print_tables(layer_table([score.to_dict() for score in scores]))
    click.echo(f"Best: router: {{layer: {best.layer}, mode: {best.mode}}}")
    if json_path is not None:
        write_json(json_path, {"best": best.to_dict(), "layers": [score.to_dict() for score in scores]})


@command(epilog=example("mass report demo/report.json --out demo/report.html"))
@click.argument("scores", type=FILE)
@click.option("--out", required=True, type=FILE, help="The page to write; an older one is replaced.")
def report(scores: Path, out: Path) -> None:
    """Turn the demo's JSON file SCORES into one HTML page."""
    from mass_export.report import render_report_file  # noqa: PLC0415
    from mass_export.report_files import write_text  # noqa: PLC0415

    write_text(out, render_report_file(scores))
    click.echo(f"{click.style(f'Wrote {out}', fg='green', bold=True)}: {out.stat().st_size / 1e6:.1f} MB")


COMMANDS = (classify, inspect_command, doctor, evaluate, bench, choose_layer, report)
