"""What `mass doctor` reports, as data and on a terminal."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.console import Console

FORMAT = "mass-diagnosis"
SCHEMA_VERSION = 1

Severity = Literal["problem", "warning", "note"]
Outcome = Literal["problem", "warning", "note", "ok"]
SEVERITIES: tuple[Severity, ...] = ("problem", "warning", "note")

_STYLES = {"problem": "bold red", "warning": "yellow", "note": "cyan", "ok": "green"}


@dataclass(frozen=True)
class Finding:
    """One signature that was seen.

    Attributes:
        check: name of the check that found it.
        severity: `problem` (answers are wrong), `warning` (they may be), `note` (worth knowing).
        subjects: tasks, matrices or files that it is about.
        seen: what was measured, in a sentence or two.
        advice: what to try.
    """

    check: str
    severity: Severity
    subjects: tuple[str, ...]
    seen: str
    advice: str


@dataclass(frozen=True)
class Check:
    """A check that was made, and the worst that it found."""

    name: str
    outcome: Outcome


@dataclass(frozen=True)
class Diagnosis:
    """Everything that `mass doctor` says.

    Attributes:
        kind: `artifact` or `bundle`.
        path: as it was given.
        tasks: names.
        images: how many were routed; None without any.
        checks: made, in order.
        findings: the worst first.
    """

    format: str
    schema_version: int
    kind: str
    path: str
    tasks: tuple[str, ...] = ()
    images: int | None = None
    checks: tuple[Check, ...] = ()
    findings: tuple[Finding, ...] = ()

    def with_check(self, name: str, found: Sequence[Finding]) -> Diagnosis:
        """The same with one more check and what it found."""
        outcome: Outcome = "ok"
        if found:
            outcome = min((finding.severity for finding in found), key=SEVERITIES.index)
        findings = sorted((*self.findings, *found), key=lambda finding: SEVERITIES.index(finding.severity))
        return dataclasses.replace(
            self, checks=(*self.checks, Check(name, outcome)), findings=tuple(findings)
        )

    @property
    def worst(self) -> Outcome:
        """The worst finding's severity, or `ok`."""
        return self.findings[0].severity if self.findings else "ok"


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """Print what was checked, then each finding with what to try."""
    from rich.box import SIMPLE_HEAD  # noqa: PLC0415 - not needed where nothing is shown
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    counted = f", {diagnosis.images} images routed" if diagnosis.images is not None else ""
    title = f"{diagnosis.kind} {diagnosis.path}: {len(diagnosis.tasks)} tasks{counted}"
    console.print(Text(title, style="bold"))
    marks = Text(", ").join(Text(f"{c.name} {c.outcome}", style=_STYLES[c.outcome]) for c in diagnosis.checks)
    console.print(marks)
    if not diagnosis.findings:
        console.print(Text("Nothing found.", style="bold green"))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_lines=True)
    table.add_column("", no_wrap=True)
    table.add_column("what was seen", overflow="fold", ratio=3)
    table.add_column("what to try", overflow="fold", ratio=2)
    for finding in diagnosis.findings:
        mark = Text(f"{finding.severity}\n{finding.check}", style=_STYLES[finding.severity])
        table.add_row(mark, Text(finding.seen), Text(finding.advice))
    console.print(table)
