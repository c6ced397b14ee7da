"""An inspection as tables for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mass_export.inspection_report import Inspection, Overlap, OverlapMatrix, SizeSummary, TaskSummary
from mass_export.subspaces import StackCondition
from runtime.cores import RELATIVE_CUTOFF

MAX_HEAT_TASKS = 12
SHOWN_PAIRS = 5
SHOWN_MATRICES = 5
NAME_WIDTH = 28


def print_inspection(inspection: Inspection, console: Console) -> None:
    """Print everything but checksums, widest table 80 columns."""
    console.print(_settings(inspection))
    console.print()
    console.print(_tasks(inspection.tasks))
    console.print(_sizes(inspection.size, len(inspection.tasks)))
    if len(inspection.tasks) > 1:
        _print_overlap(inspection, console)
    console.print(_conditions(inspection))


def _table(title: str, *columns: str, caption: str | None = None) -> Table:
    """First column names, left; the rest numbers, right."""
    table = Table(
        title=title,
        box=SIMPLE_HEAD,
        title_justify="left",
        title_style="bold",
        caption=caption,
        caption_justify="left",
    )
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left", no_wrap=True, overflow="ellipsis")
    table.columns[0].max_width = 2 * NAME_WIDTH
    return table


def _settings(inspection: Inspection) -> Table:
    vision = inspection.model
    high, wide = vision["image_size"]
    tower = f"{vision['layers']} blocks, width {vision['width']}, {high} x {wide} pixels"
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        inspection.kind: inspection.path,
        "written by": inspection.producer,
        "tower": tower,
        "merge": _listed(inspection.merge),
        "router": _listed({k: v for k, v in inspection.router.items() if k not in ("taps", "calibration")}),
        "calibration": _listed(inspection.router.get("calibration") or {}),
        "made from": _files(inspection.provenance),
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, Text(value))
    return table


def _listed(settings: Mapping[str, Any]) -> str:
    def shown(value: Any) -> str:
        return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)

    return "; ".join(f"{key} {shown(value)}" for key, value in settings.items())


def _files(provenance: Mapping[str, Any]) -> str:
    """Name and the start of the checksum of the files that are not of a single task."""
    files = [
        f"{key} {value['file']} ({str(value.get('sha256', ''))[:12]})"
        for key, value in provenance.items()
        if isinstance(value, Mapping) and "file" in value
    ]
    return "; ".join(files) or "not recorded"


def _tasks(tasks: tuple[TaskSummary, ...]) -> Table:
    classes = sum(task.classes for task in tasks)
    table = _table(
        f"{len(tasks)} tasks, {classes} classes", "task", "classes", "rank", "router rank", "unused"
    )
    table.columns[-1].header = "unused triplets"
    for task in tasks:
        rank = str(task.rank_min) if task.rank_min == task.rank_max else f"{task.rank_min}-{task.rank_max}"
        unused = str(task.unused_triplets)
        table.add_row(Text(task.name), str(task.classes), rank, str(task.router_rank), unused)
    return table


def _sizes(size: SizeSummary, tasks: int) -> Table:
    table = _table("Size", "part", "parameters", "MB", "share")
    for part in size.parts:
        table.add_row(
            part.part, f"{part.parameters:,}", _mb(part.bytes), f"{part.bytes / size.total.bytes:.1%}"
        )
    table.add_section()
    table.add_row("total", f"{size.total.parameters:,}", _mb(size.total.bytes), "", style="bold")
    for name, other, ratio in (
        (f"{tasks} separate models", size.separate_models, size.ratios.bytes_to_separate_models),
        ("one model", size.one_model, size.ratios.bytes_to_one_model),
    ):
        table.add_row(name, f"{other.parameters:,}", _mb(other.bytes), f"total is {ratio:.2f}x")
    return table


def _mb(count: int) -> str:
    return f"{count / 1e6:,.2f}"


def _print_overlap(inspection: Inspection, console: Console) -> None:
    overlap, names = inspection.overlap, [task.name for task in inspection.tasks]
    if len(names) <= MAX_HEAT_TASKS:
        for title, matrix in (
            ("right bases (vh), all matrices", overlap.vh),
            ("left bases (u), all matrices", overlap.u),
            ("router's bases", overlap.router),
        ):
            chance = "unknown" if matrix.chance is None else f"{matrix.chance:.3f}"
            console.print(Text(f"Overlap of {title}", style="bold"))
            console.print(f"0 orthogonal, 1 the same; by chance {chance}", highlight=False)
            console.print(_heat(matrix, names))
    console.print(_pairs(overlap))


def _heat(matrix: OverlapMatrix, names: list[str]) -> Table:
    numbers = [str(i + 1) for i in range(len(names))]
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("task", no_wrap=True, max_width=NAME_WIDTH, overflow="ellipsis")
    for number in numbers:
        table.add_column(f"{number} ", justify="right", no_wrap=True)
    for i, name in enumerate(names):
        row = [_heat_cell(value) if i != j else Text("- ") for j, value in enumerate(matrix.mean[i])]
        table.add_row(Text(f"{numbers[i]} {name} "), *row)
    return table


def _heat_cell(value: float | None) -> Text:
    """From white at 0 to red at 1, where the terminal has colours."""
    if value is None:
        return Text(" ? ")
    faded = round(255 * (1 - value))
    return Text(f" {_short(value)} ", style=f"black on rgb(255,{faded},{faded})")


def _short(value: float | None) -> str:
    return "?" if value is None else f"{value:.2f}".removeprefix("0")


def _pairs(overlap: Overlap) -> Table:
    shown = overlap.pairs[:SHOWN_PAIRS]
    title = f"Most overlapping pairs ({len(shown)} of {len(overlap.pairs)})"
    table = _table(title, "tasks", "vh", "u", "router")
    for pair in shown:
        names = Text(" and ".join(pair.tasks))
        table.add_row(names, *(_precise(value) for value in (pair.vh, pair.u, pair.router)))
    by_chance = (_precise(of.chance) for of in (overlap.vh, overlap.u, overlap.router))
    table.add_section()
    table.add_row("random subspaces", *by_chance)
    return table


def _precise(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"


def _conditions(inspection: Inspection) -> Table:
    """The worst matrices, by what is lost and then by the condition number."""
    shared = sum(m.u.below_cutoff + m.vh.below_cutoff for m in inspection.conditioning)
    worst = sorted(inspection.conditioning, key=lambda m: max(_badness(m.u), _badness(m.vh)), reverse=True)
    total = sum(m.u.directions + m.vh.directions for m in inspection.conditioning)
    table = _table(
        f"Stacks of all tasks, the worst {min(SHOWN_MATRICES, len(worst))} of {len(worst)} matrices",
        "matrix",
        "cond U",
        "shared",
        "cond VH",
        "shared",
        caption=(
            f"{shared} of {total} directions are shared between tasks "
            f"(singular value at most {RELATIVE_CUTOFF:g} of the largest)"
        ),
    )
    for matrix in worst[:SHOWN_MATRICES]:
        cells = (_condition(side) for side in (matrix.u, matrix.vh))
        name = matrix.matrix.removeprefix("transformer.")
        table.add_row(name, *(text for pair in cells for text in pair))
    return table


def _badness(side: StackCondition) -> tuple[float, float]:
    lost = side.below_cutoff / side.directions if side.directions else 0.0
    return lost, float("inf") if side.condition is None else side.condition


def _condition(side: StackCondition) -> tuple[str, str]:
    if side.directions == 0:
        return "no directions", ""
    shown = "infinite" if side.condition is None else f"{side.condition:.3g}"
    return shown, f"{side.below_cutoff}/{side.directions}"
