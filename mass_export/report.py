"""The report: the scores of the demo as one HTML page that needs nothing else, neither network nor scripts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mass_export.errors import ReportError
from mass_export.report_charts import Bar, bar_chart, heat_map, line_chart
from mass_export.report_curves import curves_section, latency_charts, residuals_section
from mass_export.report_files import read_report
from mass_export.report_html import command, figure, table
from mass_export.report_style import CSS
from mass_export.tables import (
    SUITES,
    Table,
    accuracy_table,
    confidence_sentence,
    percent,
    routing_table,
    summary_table,
)

SECTIONS = {
    "accuracy": "Accuracy",
    "tasks": "Task by task",
    "routing": "Routing",
    "residuals": "Residuals by block and task",
    "layers": "Choice of the routing layer",
    "curves": "By rank and by number of tasks",
    "images": "Images and answers",
    "parity": "Parity with the eager model",
    "sizes": "Sizes",
    "times": "Times",
    "machine": "Machine and versions",
}


def render_report(report: Mapping[str, Any]) -> str:
    """Render the report of one or more suites.

    Args:
        report: what `scripts/demo` writes as report.json.

    Returns:
        a complete HTML document.
    """
    bodies = {
        "accuracy": _accuracy(report),
        "tasks": _tasks(report),
        "routing": _routing(report),
        "residuals": residuals_section(_suites(report), report["command"]),
        "layers": _layers(report),
        "curves": curves_section(_suites(report), report["command"]),
        "images": _images(report),
        "parity": _parity(report),
        "sizes": _sizes(report),
        "times": _times(report),
        "machine": _machine(report["machine"]),
    }
    shown = {name: body for name, body in bodies.items() if body}
    links = "".join(f'<a href="#{name}">{SECTIONS[name]}</a>' for name in shown)
    sections = "".join(
        f'<section id="{name}"><h2>{SECTIONS[name]}</h2>{body}</section>' for name, body in shown.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>MASS on real image tasks</title><style>{CSS}</style></head><body><main>"
        "<h1>One model for many tasks, without being told which</h1>"
        '<p class="lead">Fine-tuned CLIP vision models, merged with MASS, exported as two ONNX graphs and run without '
        "torch on test images that no choice was made on.</p>"
        f"{_tiles(report)}<nav>{links}</nav>{sections}</main></body></html>\n"
    )


def render_report_file(path: Path) -> str:
    """The same of a file.

    Raises:
        ReportError: no such file, or not a whole report of the demo.
    """
    report = read_report(path)
    try:
        return render_report(report)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ReportError(
            f"{path}: not a whole report ({type(error).__name__}: {error}); give the report.json that the demo wrote."
        ) from error


def _entries(report: Mapping[str, Any]) -> Iterator[tuple[str, str, Mapping[str, Any], Mapping[str, Any]]]:
    """Every (suite title, configuration name, its scores, suite)."""
    for suite_name in report["suites"]:
        suite = report[suite_name]
        for name in suite["configurations"]:
            yield _suite_title(suite_name), name, suite[name], suite


def _suites(report: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any]]]:
    """Every (suite title, suite)."""
    return [(_suite_title(name), report[name]) for name in report["suites"]]


def _suite_title(name: str) -> str:
    return SUITES.get(name, name)


def _tiles(report: Mapping[str, Any]) -> str:
    tiles = [
        f"<div class=tile><b>{percent(scores['normalized_joint_accuracy'])}</b>"
        f"<span>of the fine-tuned models' accuracy, task unknown: {escape(title.lower())}, "
        f"<code>{escape(name)}</code></span></div>"
        for title, name, scores, _ in _entries(report)
    ]
    return f"<div class=tiles>{''.join(tiles)}</div>"


def _accuracy(report: Mapping[str, Any]) -> str:
    charts = []
    for suite_name in report["suites"]:
        suite = report[suite_name]
        bars = [
            Bar(
                row["label"],
                row["normalized_known_task_accuracy"] or 0.0,
                percent(row["normalized_known_task_accuracy"]),
                "--grey",
            )
            for row in suite["baselines"].values()
        ]
        for name in suite["configurations"]:
            given, unknown = (
                suite[name][f"normalized_{kind}_accuracy"] or 0.0 for kind in ("known_task", "joint")
            )
            bars.append(Bar(f"MASS {name}, task given", given, percent(given), "--third"))
            bars.append(Bar(f"MASS {name}, task unknown", unknown, percent(unknown)))
        caption = f"{_suite_title(suite_name)}: share of the fine-tuned models' average accuracy."
        charts.append(figure(bar_chart(bars, limit=1.0), caption))
    descriptions = {name: scores["description"] for _, name, scores, _ in _entries(report)}
    listed = "".join(
        f"<br><code>{escape(name)}</code>: {escape(text)}" for name, text in descriptions.items()
    )
    return (
        "<p>The headline is the joint accuracy: task and class must both be right, with nothing given but the image. "
        "The grey rows are told the task. Averages count every task once; "
        f"<em>of fine-tuned</em> divides an average by that of the fine-tuned models.{listed}</p>"
        f"{table(summary_table(report))}<div class=pair>{''.join(charts)}</div>{command(report['command'])}"
    )


def _tasks(report: Mapping[str, Any]) -> str:
    note = (
        "<p><em>MASS, class index</em> is the metric of the paper's code: the class index must be right, "
        "whichever task's head answered.</p>"
    )
    parts = [note]
    for title, name, scores, suite in _entries(report):
        parts.append(f"<h3>{escape(title)}, <code>{escape(name)}</code></h3>")
        parts.append(table(accuracy_table(scores, suite["baselines"])))
        parts.append(command(scores["commands"]["scores"]))
    return "".join(parts)


def _routing(report: Mapping[str, Any]) -> str:
    figures, tables = [], []
    for title, name, scores, _ in _entries(report):
        chart = heat_map(list(scores["tasks"]), scores["confusion"], "true task", "task that answered")
        figures.append(
            figure(
                chart,
                f"{title}, {name}: the right task answers {percent(scores['routing_accuracy'])} of the images.",
            )
        )
        tables.append(f"<h3>{escape(title)}, <code>{escape(name)}</code></h3>{table(routing_table(scores))}")
        if found := scores.get("confidence"):
            tables.append(f"<p>{confidence_sentence(found)}</p>")
        tables.append(command(scores["commands"]["scores"]))
    return f"<div class=pair>{''.join(figures)}</div>{''.join(tables)}"


def _layers(report: Mapping[str, Any]) -> str:
    figures, commands = [], []
    for title, name, scores, _ in _entries(report):
        if "layer_choice" not in scores:
            continue
        series: dict[str, list[float]] = {}
        for row in scores["layer_choice"]:
            series.setdefault(f"joint accuracy, {row['mode']} gates", []).append(row["joint_accuracy"])
            if row["mode"] == "top1":
                series.setdefault("routing accuracy", []).append(row["routing_accuracy"])
        router = scores["settings"]["router"]
        chosen = f"layer {router['layer']} with {router['mode']} gates was chosen"
        caption = f"{title}, {name}, on validation images: {chosen}."
        figures.append(figure(line_chart(series, "routing layer"), caption))
        commands.append(command(scores["commands"]["layer_choice"]))
    return f"<div class=pair>{''.join(figures)}</div>{''.join(commands)}" if figures else ""


def _images(report: Mapping[str, Any]) -> str:
    note = (
        "<p>A fixed random sample of each task's test images. Label and task are the answer with the task "
        "unknown; a red edge marks a wrong one, with the truth below it.</p>"
    )
    parts = [note]
    last_title = None
    for title, name, scores, _ in _entries(report):
        if title == last_title:  # one configuration for each suite is enough to look at
            continue
        last_title = title
        parts.append(f"<h3>{escape(title)}, <code>{escape(name)}</code></h3>")
        parts.append(f"<div class=images>{''.join(map(_image, scores['examples']))}</div>")
    return "".join(parts) + command(report["command"])


def _image(example: Mapping[str, Any]) -> str:
    answer = (example["predicted_task"], example["predicted_label"])
    truth = (example["task"], example["label"])
    right = answer == truth
    said = f"<b>{'&#10003;' if right else '&#10007;'} {escape(answer[1])}</b><span>{escape(answer[0])}</span>"
    correction = "" if right else f"<span>is {escape(truth[1])} ({escape(truth[0])})</span>"
    alt = f"{truth[1]} ({truth[0]})"
    return (
        f'<div class="image{"" if right else " wrong"}"><img src="{escape(example["image"])}" alt="{escape(alt)}">'
        f"{said}{correction}</div>"
    )


def _parity(report: Mapping[str, Any]) -> str:
    columns = (
        "",
        "Images",
        "Logits, max abs",
        "Residuals, max rel",
        "Equal sets",
        "Equal tasks",
        "Equal classes",
    )
    rows = [
        (
            f"{title}, `{name}`",
            str(parity["images"]),
            f"{parity['logits_max_abs']:.1e}",
            f"{parity['residuals_max_rel']:.1e}",
            *(percent(parity[f"equal_{kind}"]) for kind in ("sets", "tasks", "classes")),
        )
        for title, name, scores, _ in _entries(report)
        for parity in [scores["parity"]]
    ]
    commands = "".join(command(scores["commands"]["export"]) for _, _, scores, _ in _entries(report))
    return (
        "<p>Largest differences between the exported graphs in ONNX Runtime and the PyTorch model on real test images "
        f"and a few random ones.</p>{table(Table('Parity', columns, tuple(rows)))}{commands}"
    )


def _sizes(report: Mapping[str, Any]) -> str:
    figures = []
    for title, name, scores, suite in _entries(report):
        size, count = scores["sizes"], len(suite["tasks"])
        entries: Sequence[tuple[str, str, str]] = (
            ("One model", "one_model_bytes", "--grey"),
            (f"Bundle for {count} tasks", "bundle_bytes", "--accent"),
            (f"{count} models", "all_models_bytes", "--second"),
        )
        bars = [Bar(label, size[key], f"{size[key] / 1e6:.1f} MB", colour) for label, key, colour in entries]
        figures.append(
            figure(bar_chart(bars), f"{title}, {name}, all in float32; the bundle with heads and graphs.")
        )
    return f"<div class=pair>{''.join(figures)}</div>{command(report['command'])}"


def _times(report: Mapping[str, Any]) -> str:
    columns = (
        "", "Choose and merge", "Export", "Verify", "Classify test images",
        "ms/image, batch 1", "task given", "ms/image, batch 32", "task given",
    )  # fmt: skip
    rows = [
        (
            f"{title}, `{name}`",
            *(f"{times[key]:.1f} s" for key in ("choose_and_merge_s", "export_s", "verify_s", "classify_s")),
            *(
                f"{times['latency_ms'][batch][known]:.2f}"
                for batch in ("1", "32")
                for known in ("unknown", "given")
            ),
        )
        for title, name, scores, _ in _entries(report)
        for times in [scores["times"]]
    ]
    return (
        "<p>Classifying runs every test image twice, with the task unknown and given. Latencies are float32 on the CPU "
        f"without preprocessing, {escape(str(report['machine']['processors']))} processors, best of three runs over "
        f"128 images; the whole demo took {report['total_time_s']:.0f} s.</p>"
        f"{table(Table('Times', columns, tuple(rows)))}{latency_charts(_suites(report))}{command(report['command'])}"
    )


def _machine(machine: Mapping[str, Any]) -> str:
    facts = {
        "Processor": f"{machine['processor']} ({machine['processors']} usable)",
        "Memory": f"{machine['memory_gib']} GiB",
        "System": f"{machine['system']}, Python {machine['python']}",
        **machine["versions"],
    }
    return table(Table("Machine", ("", ""), tuple((name, str(value)) for name, value in facts.items())))
