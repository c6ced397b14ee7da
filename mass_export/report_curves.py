"""The report's sections of curves: residuals by block, accuracy by rank and number of tasks, time by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any

from mass_export.report_charts import line_chart, strength_map
from mass_export.report_html import command, figure

Suite = tuple[str, Mapping[str, Any]]


def residuals_section(suites: Iterable[Suite], made_by: str) -> str:
    """Which blocks tell which tasks; nothing where that was not measured."""
    figures = []
    for title, suite in suites:
        found = suite.get("curves", {}).get("residuals")
        if not found:
            continue
        names, lead = list(suite["tasks"]), found["lead"]
        texts = [[f"{value:.1f}" for value in row] for row in lead]
        caption = (
            f"{title}: how far the residual of an image's own task lies below the tasks' mean, in standard deviations "
            "over the tasks; mean of the task's images. The darker, the clearer."
        )
        figures.append(figure(strength_map(names, lead, texts, "block"), caption))
        texts = [[f"{100 * value:.0f}" for value in row] for row in found["routed"]]
        caption = f"{title}: share of the images whose own task has the smallest residual of all, per cent."
        figures.append(figure(strength_map(names, found["routed"], texts, "block"), caption))
    if not figures:
        return ""
    note = (
        "<p>The router measures what of an image's feature each task's subspace leaves over. Here for the base model's "
        "CLS token at the mlp input of every block; the default router averages those of the last three "
        "quarters.</p>"
    )
    return f"{note}<div class=pair>{''.join(figures)}</div>{command(made_by)}"


def curves_section(suites: Iterable[Suite], made_by: str) -> str:
    """Accuracy by rank and by number of tasks."""
    figures = []
    for title, suite in suites:
        curves = suite.get("curves", {})
        if ranks := curves.get("ranks"):
            series = {
                "task unknown": [row["joint"] for row in ranks],
                "task given": [row["known"] for row in ranks],
            }
            ticks = [str(Fraction(row["rank_ratio"]).limit_denominator(64)) for row in ranks]
            chart = line_chart(
                series, "rank of the task vectors, as a share of each matrix' full rank", ticks
            )
            images = f"{curves['images_per_task']} test images a task"
            caption = f"{title}, default: share of the fine-tuned models' accuracy by rank, on {images}."
            figures.append(figure(chart, caption))
        if rows := curves.get("tasks"):
            names = [name for name in rows[0] if name != "tasks"]
            chart = line_chart(
                {f"{name}, task unknown": [row[name] for row in rows] for name in names},
                "tasks, the first of the recipe",
                [str(row["tasks"]) for row in rows],
            )
            figures.append(figure(chart, f"{title}: the same by number of tasks; the paper's layer stays."))
    return f"<div class=pair>{''.join(figures)}</div>{command(made_by)}" if figures else ""


def latency_charts(suites: Iterable[Suite]) -> str:
    """Milliseconds an image by batch: a chart for every suite that has them."""
    figures = []
    for title, suite in suites:
        by_batch = suite.get("curves", {}).get("latency_ms")
        if not by_batch:
            continue
        series = {
            f"task {known}": [row[known] for row in by_batch.values()] for known in ("unknown", "given")
        }
        largest = max(max(values) for values in series.values())
        step = 10 ** math.floor(math.log10(largest)) / 2
        chart = line_chart(
            series, "images in a batch", list(by_batch), step * math.ceil(largest / step), " ms"
        )
        figures.append(figure(chart, f"{title}, default: milliseconds for an image."))
    return f"<div class=pair>{''.join(figures)}</div>"
