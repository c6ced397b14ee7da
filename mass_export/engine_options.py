"""The options of the command line that say how engines are built, for `build-engines` and `export`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from mass_export.engine_bundle import BuiltEngine
    from runtime.engine_settings import EngineSettings
    from runtime.engine_spec import Precision

Command = TypeVar("Command", bound=Callable[..., Any])

PRECISION = click.Choice(["fp32", "fp16", "bf16", "int8"])
RANGE = (click.IntRange(1), click.IntRange(1), click.IntRange(1))

OPTIONS = (
    click.option(
        "--flavour",
        type=click.Choice(["tensorrt", "tensorrt_rtx"]),
        help="What builds: TensorRT, on the GPU that the engines are for, or TensorRT-RTX, anywhere. "
        "By default what is installed.",
    ),
    click.option(
        "--batch", type=RANGE, default=(1, 8, 32), show_default=True, help="Smallest, best, largest batch."
    ),
    click.option(
        "--slots", type=RANGE, help="The same for the size of task sets; by default what the router can give."
    ),
    click.option(
        "--compute-capability",
        multiple=True,
        metavar="X.Y",
        help="TensorRT-RTX: a GPU to build for; repeatable.",
    ),
    click.option("--workspace-mib", type=click.IntRange(1), help="Scratch memory of a layer, at most."),
    click.option("--optimization-level", type=click.IntRange(0, 5), help="How much build time to spend."),
    click.option("--version-compatible", is_flag=True, help="Engines also for later versions of TensorRT."),
    click.option("--hardware-compatible", is_flag=True, help="TensorRT: engines also for later GPUs."),
    click.option(
        "--weight-stripped",
        is_flag=True,
        help="Leave the weights to the ONNX files; TensorRT-RTX needs a GPU for this.",
    ),
    click.option(
        "--calibration-images",
        type=click.Path(path_type=Path),
        help="int8: folder, image or .npz file, of which up to 256 images set the scales; without it, random "
        "images do.",
    ),
    click.option("--tf32", is_flag=True, help="fp32: let products round their inputs to TF32."),
)


def engine_options(command: Command) -> Command:
    """Add the options to a command; they arrive as keyword arguments of `settings_from_options`."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def settings_from_options(precision: Precision | None, options: dict[str, Any]) -> EngineSettings:
    """The settings that the options of a command say."""
    from runtime.engine_settings import EngineSettings  # noqa: PLC0415

    return EngineSettings(precision=precision, **options)


def refuse_engine_options(options: dict[str, Any]) -> None:
    """Options of engines where none are built are a mistake of the user's."""
    context = click.get_current_context()
    default = click.core.ParameterSource.DEFAULT
    given = [name for name in options if context.get_parameter_source(name) != default]
    if given:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{named}: only with --backend tensorrt.")


def describe(engine: BuiltEngine) -> str:
    """One line for one engine."""
    key = engine.spec.key
    target = ", ".join(key.compute_capability) or "Ampere and later"
    took = f" in {engine.build_s:.1f} s" if engine.build_s else ""
    return (
        f"{engine.spec.pass_name}: {engine.note}{took}, {engine.nbytes / 1e6:.1f} MB "
        f"({key.flavour} {key.version}, {key.precision}, {target})"
    )
