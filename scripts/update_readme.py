"""Put the demo's table into the README, and the figures behind it into the zoo (`examples/zoo/results.json`)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from mass_export.report_files import read_report, write_json, write_text
from mass_export.tables import summary_table

BLOCK = re.compile(r"(?<=<!-- results:begin -->\n).*?(?=<!-- results:end -->)", re.DOTALL)
UNSTABLE = ("baselines_time_s", "curves", "curves_time_s")
LARGE = ("examples", "commands", "times")  # images, and what differs from run to run


def results_from_report(report: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of a report without images, commands and times."""
    results = {"suites": report["suites"], "machine": report["machine"]}
    for name in report["suites"]:
        suite = {key: value for key, value in report[name].items() if key not in UNSTABLE}
        for configuration in suite["configurations"]:
            scores = suite[configuration]
            suite[configuration] = {key: value for key, value in scores.items() if key not in LARGE}
        results[name] = suite
    return results


def with_table(readme: str, results: Mapping[str, Any]) -> str:
    """The README with the table of these figures between its markers."""
    if not BLOCK.search(readme):
        raise click.ClickException("README.md: the markers <!-- results:begin --> and end are missing.")
    return BLOCK.sub(lambda _: summary_table(results).to_markdown() + "\n", readme)


@click.command()
@click.option("--report", default="demo/report.json", show_default=True, type=click.Path(path_type=Path))
@click.option(
    "--results", default="examples/zoo/results.json", show_default=True, type=click.Path(path_type=Path)
)
@click.option("--readme", default="README.md", show_default=True, type=click.Path(path_type=Path))
def main(report: Path, results: Path, readme: Path) -> None:
    """Run after scripts/demo."""
    figures = results_from_report(read_report(report))
    write_text(readme, with_table(readme.read_text(encoding="utf-8"), figures))
    write_json(results, figures)
    click.echo(f"Wrote {readme} and {results}")


if __name__ == "__main__":
    main()
