"""The command line: `mass merge`, `mass export`. Commands are thin and import what they need as they run."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any, TextIO

import click

from mass_export.errors import MassExportError

FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)


def _example(*commands: str) -> str:
    """The end of a command's help; click keeps the lines of a paragraph that begins with a backspace."""
    return "\n".join(["\b", "Example:", *(f"  {command}" for command in commands)])


class _OneLineErrors(click.Command):
    """Shows the project's own errors as one `Error:` line with exit code 1; others keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
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


@main.command(epilog=_example("mass merge recipe.yaml --out merged.safetensors"))
@click.argument("recipe", type=FILE)
@click.option("--out", required=True, type=FILE, help="The artifact to write; an older one is replaced.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def merge(recipe: Path, out: Path, *, quiet: bool) -> None:
    """Merge the tasks of RECIPE into one artifact.

    Nothing is written unless everything succeeds.
    """
    from mass_export.artifact import check_destination, write_artifact  # noqa: PLC0415
    from mass_export.merge import merge as merge_recipe  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415
    from mass_export.recipe import load_recipe  # noqa: PLC0415

    start = time.perf_counter()
    parsed = load_recipe(recipe)
    check_destination(out, parsed.inputs())
    write_artifact(out, merge_recipe(parsed, Progress(quiet=quiet)))
    _summarise(out, f"{len(parsed.tasks)} tasks", start)


@main.command(epilog=_example("mass export --artifact merged.safetensors --out engines/"))
@click.option("--artifact", required=True, type=FILE, help="What `mass merge` wrote.")
@click.option("--out", required=True, type=DIRECTORY, help="The bundle to write; an older one is replaced.")
@click.option("--no-verify", is_flag=True, help="Do not compare the bundle with the eager model.")
@click.option("--quiet", "-q", is_flag=True, help="No progress bars.")
def export(artifact: Path, out: Path, *, no_verify: bool, quiet: bool) -> None:
    """Export an artifact as a bundle of two ONNX graphs.

    The bundle also holds their weights and a manifest, and is all that the runtime needs.

    The bundle is compared with the eager model before it gets its name; nothing is written if they differ.
    """
    from mass_export.artifact import read_artifact  # noqa: PLC0415
    from mass_export.onnx_export import export_bundle  # noqa: PLC0415
    from mass_export.progress import Progress  # noqa: PLC0415

    start = time.perf_counter()
    loaded = read_artifact(artifact)
    bundle = export_bundle(loaded, artifact, out, verify=not no_verify, progress=Progress(quiet=quiet))
    checked = "not verified" if no_verify else "verified"
    _summarise(bundle, f"{len(loaded.info.tasks)} tasks, {checked}", start)


def merge_main() -> None:
    """`mass-merge`: the merge command by itself."""
    merge.main(prog_name="mass-merge")


def export_main() -> None:
    """`mass-export`: the export command by itself."""
    export.main(prog_name="mass-export")


def _is_deliberate(error: Exception) -> bool:
    from runtime.errors import MassRuntimeError  # noqa: PLC0415 - the runtime's import takes time

    return isinstance(error, MassExportError | MassRuntimeError)


def _summarise(path: Path, what: str, start: float) -> None:
    """The last line: what was written, its size, and the time since `start`."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files) / 1e6
    elapsed_s = time.perf_counter() - start
    written = click.style(f"Wrote {path}", fg="green", bold=True)
    click.echo(f"{written}: {what}, {size:.1f} MB, in {elapsed_s:.1f} s")


def _show_warning(  # noqa: PLR0917 - the signature of warnings.showwarning
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
