"""What all commands of the command line share: errors in one line, examples, tables, the last line."""

from __future__ import annotations

import time
import warnings
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from mass_export.errors import MassExportError

if TYPE_CHECKING:
    from mass_export.tables import Table

FOUND_PROBLEMS = 3
FILE = click.Path(path_type=Path, dir_okay=False)
DIRECTORY = click.Path(path_type=Path, file_okay=False)
ANY_PATH = click.Path(path_type=Path)
PROVIDER = click.Choice(["auto", "cpu", "cuda", "tensorrt"])
ALLOW_PICKLE = click.option(
    "--allow-pickle", is_flag=True, help="Also read pickled modules, without running any code of them."
)
QUIET = click.option("--quiet", "-q", is_flag=True, help="No progress bars.")


def example(*commands: str) -> str:
    """The end of a command's help; click keeps the lines of a paragraph that begins with a backspace."""
    return "\n".join(["\b", "Example:", *(f"  {command}" for command in commands)])


class OneLineErrors(click.Command):
    """Shows the project's own errors as one `Error:` line with exit code 1; others keep their traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            try:
                return super().invoke(ctx)
            except Exception as error:
                if not _is_deliberate(error):
                    raise
                raise click.ClickException(" ".join(str(error).split())) from error


class Group(OneLineErrors, click.Group):
    """A group whose commands show errors in one line when they are run alone, too."""

    command_class = OneLineErrors


command = partial(click.command, cls=OneLineErrors)


def _is_deliberate(error: Exception) -> bool:
    from runtime.errors import MassRuntimeError  # noqa: PLC0415 - the runtime's import takes time

    return isinstance(error, MassExportError | MassRuntimeError)


def print_tables(*tables: Table) -> None:
    """Tables as wide as the terminal."""
    from rich.console import Console  # noqa: PLC0415

    console = Console()
    for table in tables:
        console.print(table.to_rich())


def summarise(path: Path, what: str, start: float) -> None:
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
