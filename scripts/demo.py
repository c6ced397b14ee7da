"""Run the zoo from checkpoints to a report: see `scripts/demo`, which sets up what this needs."""

from __future__ import annotations

import time
import warnings
from pathlib import Path

import click

from mass_export.command_group import show_warning
from mass_export.machine import describe_machine
from mass_export.progress import Progress
from mass_export.report import render_report
from mass_export.report_files import write_json, write_text
from mass_export.suite import run_suite
from mass_export.tables import SUITES, summary_table

ZOO = Path("examples/zoo")


@click.command()
@click.option(
    "--zoo", default=ZOO, show_default=True, type=click.Path(path_type=Path), help="Recipes and data."
)
@click.option("--out", default=Path("demo"), show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--suite", "suites", multiple=True, default=list(SUITES), show_default=True, help="Recipes to run."
)
def main(zoo: Path, out: Path, suites: tuple[str, ...]) -> None:
    """Merge, export, verify and classify; write report.json and report.html; print the table."""
    warnings.showwarning = show_warning
    start = time.perf_counter()
    report = {"command": "./scripts/demo", "suites": list(suites), "machine": describe_machine()}
    for suite in suites:
        click.secho(f"{SUITES.get(suite, suite)}: {zoo / suite}.yaml", bold=True, err=True)
        report[suite] = run_suite(zoo / f"{suite}.yaml", zoo, out / suite, progress=Progress())
    report["total_time_s"] = time.perf_counter() - start
    write_json(out / "report.json", report)
    write_text(out / "report.html", render_report(report))
    click.echo(summary_table(report).to_markdown())
    click.echo(
        f"\n{report['total_time_s']:.0f} s. Wrote {out / 'report.json'} and {out / 'report.html'}", err=True
    )


if __name__ == "__main__":
    main()
