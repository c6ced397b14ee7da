"""The command line: `mass merge`, `mass export`, `mass eval` and more.

Commands are thin and import what they need as they run.
"""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from mass_export.engine_options import (
    PRECISION,
    describe,
    engine_options,
    refuse_engine_options,
    settings_from_options,
)
from mass_export.errors import ExportError, MassExportError
from mass_export.serving_commands import add_serving_commands

if TYPE_CHECKING:
    from mass_export.factor_storage import FactorDtype
    from mass_export.tables import Table
    from runtime.engine_spec import Precision
    from runtime.provider import Provider

FOUND_PROBLEMS = 3
FILE = click.Path(path_type=Path, dir_okay=False)
PROVIDER = click.Choice(["auto", "cpu", "cuda", "tensorrt"])
DIRECTORY = click.Path(path_type=Path, file_okay=False)
ALLOW_PICKLE = click.option(
    "--allow-pickle", is_flag=True, help="Also read pickled modules, without running any code of them."
)


def _example(*commands: str) -> str:
    """The end of a command's help; click keeps the lines of a paragraph that begins with a backspace."""
    return "\n".join(["\b", "Example:", *(f"  {command}" for command in commands)])


class _OneLineErrors(click.Command):
    """Shows the project's own errors as one `Error:` line with exit code 1; others keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            try:
                return super().invoke(ctx)
            except Exception as error:
                if not _is_deliberate(error):
                    raise
                raise click.ClickException(" ".join(str(error).split())) from error


class _Group(_OneLineErrors, click.Group):
    """A group whose commands show errors in one line when they are run alone, too."""

    command_class = _OneLineErrors


@click.group(
    cls=_Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_example(
        "mass merge recipe.yaml --out merged.safetensors",
        "mass export --artifact merged.safetensors --out engines/",
    ),
)
@click.version_option(package_name="mass-export")
def main() -> None:
    """Merge fine-tuned CLIP vision models into one classifier (MASS) and ship it."""


@main.command(
    epilog=_example(
        "mass merge recipe.yaml --out merged.safetensors",
        "mass merge recipe.yaml --out merged.safetensors --factor-dtype float16",
        "mass merge merged.safetensors --add pets.yaml --remove cars --out changed.safetensors",
    )
)
@click.argument("recipe", type=FILE)
@click.option("--out", required=True, type=FILE, help="The artifact to write; an older one is replaced.")
@click.option(
    "--factor-dtype", type=click.Choice(["float32", "float16", "bfloat16", "int8"]),
    help="How the file holds the tasks; float32, or as before.",
)  # fmt: skip
@click.option(
    "--add", multiple=True, type=FILE, metavar="FRAGMENT", help="Recipe fragment with tasks to add."
)
@click.option("--remove", multiple=True, metavar="TASK", help="Task to remove.")
@ALLOW_PICKLE
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def merge(
    recipe: Path,
    out: Path,
    factor_dtype: FactorDtype | None,
    add: tuple[Path, ...],
    remove: tuple[str, ...],
    *,
    allow_pickle: bool,
    quiet: bool,
) -> None:
    """Merge the tasks of RECIPE into one artifact.

    With --add or --remove, RECIPE is an artifact: tasks are added to it or removed, and the factors of all others
    stay as they are, at the ranks that they have.

    OUT is written only if everything succeeds. An interrupted merge leaves a hidden directory .OUT.factors beside it,
    and the next one goes on from there.
    """
    from mass_export.merge_to_file import MergeOptions, change_file, merge_to_file  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    start = time.perf_counter()
    options = MergeOptions(factor_dtype, Progress(quiet=quiet), allow_pickle=allow_pickle)
    changed = add or remove
    merged = (
        change_file(recipe, out, add, remove, options) if changed else merge_to_file(recipe, out, options)
    )
    _summarise(out, f"{len(merged.tasks)} tasks", start)


@main.command(
    epilog=_example(
        "mass export --artifact merged.safetensors --out engines/",
        "mass export --artifact merged.safetensors --out engines/ --backend tensorrt --precision fp16",
    )
)
@click.option("--artifact", required=True, type=FILE, help="What `mass merge` wrote.")
@click.option("--out", required=True, type=DIRECTORY, help="The bundle to write; an older one is replaced.")
@click.option(
    "--backend", type=click.Choice(["onnx", "tensorrt"]), default="onnx", show_default=True,
    help="Also build TensorRT engines, beside the graphs.",
)  # fmt: skip
@click.option(
    "--precision", type=PRECISION, default="fp32", show_default=True,
    help="Of the graphs; with --backend tensorrt of the engines, and the graphs stay fp32. int8 graphs are for CPUs.",
)  # fmt: skip
@click.option(
    "--precise-router", is_flag=True,
    help="int8: attention and patches of the first pass stay fp32; larger, slower, routes more like fp32.",
)  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle with the eager model.")
@click.option("--triton", type=DIRECTORY, help="Also write a model repository for NVIDIA Triton here.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
@engine_options
def export(
    artifact: Path,
    out: Path,
    *,
    backend: str,
    precision: Precision,
    precise_router: bool,
    no_verify: bool,
    triton: Path | None,
    quiet: bool,
    **engine: Any,
) -> None:
    """Export an artifact as a bundle of two ONNX graphs, and TensorRT engines if wanted.

    The bundle also holds their weights and a manifest, and is all that the runtime needs.

    The bundle is compared with the eager model before it gets its name; nothing is written if they differ.
    """
    from mass_export.artifact import read_artifact  # noqa: PLC0415
    from mass_export.onnx_export import export_bundle  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    start = time.perf_counter()
    with_engines = backend == "tensorrt"
    if precise_router and (with_engines or precision != "int8"):
        raise ExportError(
            f"precise_router: goes with --precision int8 and --backend onnx, got {precision} and {backend}."
        )
    if not with_engines:
        refuse_engine_options(engine)
    loaded = read_artifact(artifact)
    bundle = export_bundle(
        loaded,
        artifact,
        out,
        verify=not no_verify,
        progress=Progress(quiet=quiet),
        precision="fp32" if with_engines else precision,
        engines=settings_from_options(precision, engine) if with_engines else None,
        precise_router=precise_router,
    )
    checked = "not verified" if no_verify else "verified"
    what = f"{precision} engines" if with_engines else precision
    if triton is not None:
        from mass_export.triton_repository import write_triton_repository  # noqa: PLC0415

        write_triton_repository(bundle, triton)
    _summarise(bundle, f"{len(loaded.info.tasks)} tasks, {what}, {checked}", start)


@main.command("build-engines", epilog=_example("mass build-engines engines/ --precision fp16"))
@click.argument("bundle", type=DIRECTORY)
@click.option("--precision", type=PRECISION, help="Of the engines; by default that of the graphs.")
@click.option("--timing-cache", type=FILE, help="TensorRT: its measurements, read and written.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
@engine_options
def build_engines(
    bundle: Path, precision: Precision | None, timing_cache: Path | None, *, quiet: bool, **engine: Any
) -> None:
    """Build TensorRT engines for the graphs of BUNDLE, where there are none or old ones.

    The bundle is as it was until all are built.
    """
    from mass_export.engine_bundle import build_engines as build  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    settings = settings_from_options(precision, engine)
    for built in build(bundle, settings, progress=Progress(quiet=quiet), timing_cache=timing_cache):
        click.echo(describe(built))


@main.command(
    epilog=_example(
        "mass calibrate merged.safetensors --pool photos/ --out calibrated.safetensors",
        "mass calibrate merged.safetensors --out calibrated.safetensors --task-images cars=cars/ dtd=dtd/",
    )
)
@click.argument("artifact", type=FILE)
@click.argument("more", nargs=-1, metavar="[TASK=FOLDER]...")
@click.option("--out", required=True, type=FILE, help="The artifact to write; may be ARTIFACT itself.")
@click.option("--pool", type=click.Path(path_type=Path), help="Unlabelled images: a folder or an .npz file.")
@click.option(
    "--task-images", multiple=True, metavar="TASK=FOLDER", help="Some images of a task, unlabelled."
)
@click.option("--synthetic", is_flag=True, help="Images made from noise: needs no images at all.")
@click.option("--limit", type=click.IntRange(2), help="Images per folder, at most.")
@click.option(
    "--early-stops/--no-early-stops",
    "stop_early",
    default=True,
    show_default=True,
    help="With --task-images: end the first pass of an image at the first block that is sure of it.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def calibrate(
    artifact: Path,
    more: tuple[str, ...],
    out: Path,
    pool: Path | None,
    task_images: tuple[str, ...],
    limit: int | None,
    *,
    synthetic: bool,
    stop_early: bool,
    quiet: bool,
) -> None:
    """Teach the router of ARTIFACT with images, without training.

    Give one of --pool, --task-images and --synthetic. Further TASK=FOLDER pairs may follow --task-images.
    """
    from mass_export.artifact import read_artifact, write_artifact  # noqa: PLC0415
    from mass_export.calibration_files import calibrate_from_files  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    start = time.perf_counter()
    calibrated, summary = calibrate_from_files(
        read_artifact(artifact),
        pool=pool,
        task_images=(*task_images, *more),
        synthetic=synthetic,
        limit=limit,
        stop_early=stop_early,
        progress=Progress(quiet=quiet),
    )
    write_artifact(out, calibrated)
    _summarise(out, summary, start)


@main.command("inspect", epilog=_example("mass inspect merged.safetensors", "mass inspect engines/ --json"))
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="One JSON object; see mass_export.inspection_report.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
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


@main.command(
    epilog=_example(
        "mass doctor merged.safetensors",
        "mass doctor engines/ --data examples/zoo",
        "mass doctor engines/ --images photos/ --json",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--data", type=DIRECTORY, help="Labelled images of every task: also look at how they are routed."
)
@click.option("--split", default="val", show_default=True, help="Which of them.")
@click.option(
    "--images", type=click.Path(path_type=Path), help="Unlabelled images instead: a folder or .npz file."
)
@click.option("--strict", is_flag=True, help="Exit with 3 for warnings, too.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object; see mass_export.diagnosis_report.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
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
    """Look for known ways to fail in an artifact or a bundle.

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


@main.command("eval", epilog=_example("mass eval --bundle engines/ --data examples/zoo --json scores.json"))
@click.option("--bundle", required=True, type=DIRECTORY, help="What `mass export` wrote.")
@click.option("--data", required=True, type=DIRECTORY, help="Labelled images of every task.")
@click.option(
    "--recipe", type=FILE, help="What was merged, for the baselines; by default it is looked for in DATA."
)
@click.option("--split", default="test", show_default=True, help="Which images.")
@click.option("--json", "json_path", type=FILE, help="Write the scores here, too.")
@click.option("--provider", type=PROVIDER, default="auto", show_default=True, help="Where the bundle runs.")
@ALLOW_PICKLE
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
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
    from mass_export.tables import accuracy_table, routing_table  # noqa: PLC0415
    from runtime.bundle import read_manifest  # noqa: PLC0415

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
    _print_tables(accuracy_table(scores, baselines), routing_table(scores))
    if baselines is None:
        click.echo(f"No recipe of this bundle in {data}: without --recipe there are no baselines.", err=True)
    if json_path is not None:
        write_json(json_path, {"bundle": str(bundle), **scores, "baselines": baselines})


@main.command(
    epilog=_example(
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
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
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
    """Time a bundle on this CPU, as multiples of a plain CLIP pass.

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
        _print_tables(bench_table(result), start_table(result))


@main.command(epilog=_example("mass choose-layer examples/zoo/core.yaml --data examples/zoo"))
@click.argument("recipe", type=FILE)
@click.option("--data", required=True, type=DIRECTORY, help="Labelled images of every task.")
@click.option("--split", default="val", show_default=True, help="Which images; not those that you report on.")
@click.option("--json", "json_path", type=FILE, help="Write the scores here, too.")
@ALLOW_PICKLE
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def choose_layer(
    recipe: Path, data: Path, split: str, json_path: Path | None, *, allow_pickle: bool, quiet: bool
) -> None:
    """Score every block of the model as the routing layer of RECIPE, and name the best."""
    from mass_export.layer_choice import best_layer, score_layers  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.recipe import load_recipe  # noqa: PLC0415
    from mass_export.report_files import write_json  # noqa: PLC0415
    from mass_export.tables import layer_table  # noqa: PLC0415

    parsed = load_recipe(recipe, allow_pickle=allow_pickle)
    scores = score_layers(parsed, data, split=split, progress=Progress(quiet=quiet))
    best = best_layer(scores)
    _print_tables(layer_table([score.to_dict() for score in scores]))
    click.echo(f"Best: router: {{layer: {best.layer}, mode: {best.mode}}}")
    if json_path is not None:
        write_json(json_path, {"best": best.to_dict(), "layers": [score.to_dict() for score in scores]})


@main.command(epilog=_example("mass report demo/report.json --out demo/report.html"))
@click.argument("scores", type=FILE)
@click.option("--out", required=True, type=FILE, help="The page to write; an older one is replaced.")
def report(scores: Path, out: Path) -> None:
    """Turn the JSON file SCORES of the demo into one self-contained HTML page."""
    from mass_export.report import render_report  # noqa: PLC0415
    from mass_export.report_files import read_report, write_text  # noqa: PLC0415

    write_text(out, render_report(read_report(scores)))
    click.echo(f"{click.style(f'Wrote {out}', fg='green', bold=True)}: {out.stat().st_size / 1e6:.1f} MB")


add_serving_commands(main, _example)


def merge_main() -> None:
    """`mass-merge`: the merge command by itself."""
    merge.main(prog_name="mass-merge")


def export_main() -> None:
    """`mass-export`: the export command by itself."""
    export.main(prog_name="mass-export")


def _is_deliberate(error: Exception) -> bool:
    from runtime.errors import MassRuntimeError  # noqa: PLC0415 - the runtime's import takes time

    return isinstance(error, MassExportError | MassRuntimeError)


def _print_tables(*tables: Table) -> None:
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    for table in tables:
        console.print(table.to_rich())


def _summarise(path: Path, what: str, start: float) -> None:
    """The last line: what was written, its size, and the time since `start`."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    elapsed_s = time.perf_counter() - start
    written = click.style(f"Wrote {path}", fg="green", bold=True)
    click.echo(f"{written}: {what}, {size:.1f} MB, in {elapsed_s:.1f} s")


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Warnings for the user in one line; those for developers as Python shows them."""
    if issubclass(category, UserWarning):
        click.echo(f"{click.style('Warning:', fg='yellow', bold=True)} {message}", err=True, file=file)
    else:
        text = warnings.formatwarning(message, category, filename, lineno, line)
        click.echo(text, err=True, file=file, nl=False)


if __name__ == "__main__":
    main()
