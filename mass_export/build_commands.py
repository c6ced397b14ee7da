"""The commands that build: `mass merge`, `mass calibrate`, `mass export`, `mass build-engines`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mass_export.command_group import (
    ALLOW_PICKLE,
    ANY_PATH,
    DIRECTORY,
    FILE,
    QUIET,
    command,
    example,
    summarise,
)
from mass_export.engine_options import (
    PRECISION,
    describe,
    engine_options,
    refuse_engine_options,
    settings_from_options,
)
from mass_export.errors import ExportError

if TYPE_CHECKING:
    from mass_export.factor_storage import FactorDtype
    from runtime.bundle import ImageDtype
    from runtime.engine_spec import Precision


@command(
    epilog=example(
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
@QUIET
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
    summarise(out, f"{len(merged.tasks)} tasks", start)


@command(
    epilog=example(
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
@click.option(
    "--router-precision", type=click.Choice(["int8"]),
    help="fp32: the first pass alone in eight bits, for CPUs; it only chooses tasks. Classes stay fp32.",
)  # fmt: skip
@click.option(
    "--input", "image_dtype", type=click.Choice(["float32", "uint8"]), default="float32", show_default=True,
    help="What graphs take: normalised pixel_values [B, 3, H, W], or the bytes of images [B, H, W, 3].",
)  # fmt: skip
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle with the eager model.")
@click.option("--triton", type=DIRECTORY, help="Also write a model repository for NVIDIA Triton here.")
@QUIET
@engine_options
def export(
    artifact: Path,
    out: Path,
    *,
    backend: str,
    precision: Precision,
    precise_router: bool,
    router_precision: Precision | None,
    image_dtype: ImageDtype,
    no_verify: bool,
    triton: Path | None,
    quiet: bool,
    **engine: Any,
) -> None:
    """Export an artifact as ONNX graphs, and engines if wanted.

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
        router_precision=router_precision,
        image_dtype=image_dtype,
    )
    checked = "not verified" if no_verify else "verified"
    what = f"{precision} engines" if with_engines else precision
    what += f", router {router_precision}" if router_precision else ""
    if triton is not None:
        from mass_export.triton_repository import write_triton_repository  # noqa: PLC0415

        write_triton_repository(bundle, triton)
    summarise(bundle, f"{len(loaded.info.tasks)} tasks, {what}, {checked}", start)


@command("build-engines", epilog=example("mass build-engines engines/ --precision fp16"))
@click.argument("bundle", type=DIRECTORY)
@click.option("--precision", type=PRECISION, help="Of the engines; by default that of the graphs.")
@click.option("--timing-cache", type=FILE, help="TensorRT: its measurements, read and written.")
@QUIET
@engine_options
def build_engines(
    bundle: Path, precision: Precision | None, timing_cache: Path | None, *, quiet: bool, **engine: Any
) -> None:
    """Build TensorRT engines for the graphs of BUNDLE.

    Only where there are none, or old ones.
    The bundle is as it was until all are built.
    """
    from mass_export.engine_bundle import build_engines as build  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    settings = settings_from_options(precision, engine)
    for built in build(bundle, settings, progress=Progress(quiet=quiet), timing_cache=timing_cache):
        click.echo(describe(built))


@command(
    epilog=example(
        "mass calibrate merged.safetensors --pool photos/ --out calibrated.safetensors",
        "mass calibrate merged.safetensors --out calibrated.safetensors --task-images cars=cars/ dtd=dtd/",
    )
)
@click.argument("artifact", type=FILE)
@click.argument("more", nargs=-1, metavar="[TASK=FOLDER]...")
@click.option("--out", required=True, type=FILE, help="The artifact to write; may be ARTIFACT itself.")
@click.option("--pool", type=ANY_PATH, help="Unlabelled images: a folder or an .npz file.")
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
@click.option(
    "--hear-heads/--no-hear-heads",
    "hear_heads",
    default=True,
    show_default=True,
    help="With --pool: use head evidence that the merge did not trust, if it agrees with the residuals.",
)
@QUIET
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
    hear_heads: bool,
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
        hear_heads=hear_heads,
        progress=Progress(quiet=quiet),
    )
    write_artifact(out, calibrated)
    summarise(out, summary, start)


COMMANDS = (merge, calibrate, export, build_engines)
