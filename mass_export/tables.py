"""Tables of scores as plain text cells; shown on a terminal, in Markdown or in the report.

They are made from the plain data of `Evaluation.to_dict` and `baselines_to_dict`, which is what JSON files hold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from runtime.prediction import Prediction

SUITES = {"core": "Core eight", "hard": "Hard ten"}
SHORT = {
    "finetuned": "Fine-tuned",
    "base": "Base",
    "task_arithmetic": "Task arithmetic",
    "tsvm": "TSV-M alone",
}


@dataclass(frozen=True)
class Table:
    """A header and rows of text; the first column names the row.

    Attributes:
        title: says what the table holds.
        columns: header.
        rows: each as long as the header.
        summary_rows: how many of the last rows are averages.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    summary_rows: int = 0

    def to_markdown(self) -> str:
        """GitHub's Markdown, columns aligned for readers of the text."""
        widths = [max(len(row[i]) for row in (self.columns, *self.rows)) for i in range(len(self.columns))]

        def line(cells: Sequence[str]) -> str:
            padded = [
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            ]
            return f"| {' | '.join(padded)} |"

        rule = [f"{'-' * w}" if i == 0 else f"{'-' * (w - 1)}:" for i, w in enumerate(widths)]
        return "\n".join([line(self.columns), line(rule), *map(line, self.rows)])

    def to_rich(self) -> RichTable:
        """For a terminal."""
        from rich import box  # noqa: PLC0415 - not needed where nothing is shown
        from rich.table import Table as RichTable  # noqa: PLC0415

        table = RichTable(
            title=self.title or None,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            padding=(0, 1, 0, 0),
        )
        for i, column in enumerate(self.columns):
            table.add_column(column, justify="left" if i == 0 else "right", overflow="fold", no_wrap=i == 0)
        for i, row in enumerate(self.rows):
            first_summary = len(self.rows) - self.summary_rows
            table.add_row(
                *row, style="bold" if i >= first_summary else "", end_section=i == first_summary - 1
            )
        return table


def percent(share: float | None) -> str:
    """One decimal, or a dash for what is not known."""
    return "-" if share is None else f"{100 * share:.1f}%"


def accuracy_table(evaluation: Mapping[str, Any], baselines: Mapping[str, Any] | None) -> Table:
    """Accuracy by task: the baselines' (task given) beside MASS with the task given and unknown."""
    known = dict(baselines or {})
    columns = (
        "Task",
        *(SHORT[name] for name in known),
        "MASS, task given",
        "MASS",
        "MASS, class index",
    )
    rows = [
        (
            task,
            *(percent(row["tasks"][task]) for row in known.values()),
            percent(scores["known_task_accuracy"]),
            percent(scores["joint_accuracy"]),
            percent(scores["reference_accuracy"]),
        )
        for task, scores in evaluation["tasks"].items()
    ]
    average = (
        "Average",
        *(percent(row["known_task_accuracy"]) for row in known.values()),
        percent(evaluation["known_task_accuracy"]),
        percent(evaluation["joint_accuracy"]),
        percent(evaluation["reference_accuracy"]),
    )
    normalized = (
        "Of fine-tuned",
        *(percent(row["normalized_known_task_accuracy"]) for row in known.values()),
        percent(evaluation.get("normalized_known_task_accuracy")),
        percent(evaluation.get("normalized_joint_accuracy")),
        "-",
    )
    summary = [average, normalized] if known else [average]
    return Table("Accuracy", columns, tuple(rows + summary), summary_rows=len(summary))


def routing_table(evaluation: Mapping[str, Any]) -> Table:
    """How often the right task answers, has the largest gate, and is in the selected set."""
    columns = (
        "Task",
        "Right task answers",
        "Has the largest gate",
        "Is in the set",
        "Tasks in the set",
        "Verified",
    )
    rows = [
        (
            task,
            percent(scores["routing_accuracy"]),
            percent(scores["top_gate_accuracy"]),
            percent(scores["kept_accuracy"]),
            f"{scores['mean_tasks_selected']:.2f}",
            percent(scores.get("verified_share", 0.0)),
        )
        for task, scores in [*evaluation["tasks"].items(), ("Average", evaluation)]
    ]
    return Table("Routing", columns, tuple(rows), summary_rows=1)


def confidence_sentence(confidence: Mapping[str, Any]) -> str:
    """How far the confidence of routes can be trusted."""
    mean, error, auroc = (percent(confidence[key]) for key in ("mean", "error", "auroc"))
    told = "" if confidence["auroc"] is None else f"; it tells right from wrong routes with AUROC {auroc}"
    return f"Route confidence: {mean} on average, calibration error {error}{told}."


def layer_table(scores: Sequence[Mapping[str, Any]]) -> Table:
    """What every routing layer achieves on validation images."""
    columns = ("Layer", "Gates", "Routing", "Kept in the set", "Joint accuracy")
    rows = [
        (
            str(score["layer"]),
            str(score["mode"]),
            percent(score["routing_accuracy"]),
            percent(score["kept_accuracy"]),
            percent(score["joint_accuracy"]),
        )
        for score in scores
    ]
    return Table("Routing layers, on validation images", columns, tuple(rows))


def answers_table(names: Sequence[str], predictions: Sequence[Prediction]) -> Table:
    """What is on some images: the answer, how sure it is, and what else it might be."""
    columns = ("Image", "Task", "Route", "Label", "Score", "Next")
    rows = []
    for name, found in zip(names, predictions, strict=True):
        further = ", ".join(f"{label} {percent(score)}" for _, label, score in found.alternatives[1:])
        task = f"{found.task} (unknown?)" if found.is_unknown else found.task
        rows.append(
            (name, task, percent(found.route_confidence), found.label, percent(found.score), further or "-")
        )
    return Table("", columns, tuple(rows))


def summary_table(report: Mapping[str, Any]) -> Table:
    """The comparison over all suites of a report: average accuracy, and its share of the fine-tuned models'."""
    suites = report["suites"]
    columns = ["", "Task"]
    for suite in suites:
        columns += [SUITES.get(suite, suite), "of fine-tuned", "routed right"]
    rows: list[tuple[str, ...]] = []
    first = report[suites[0]]
    for name, baseline in first["baselines"].items():
        row = [baseline["label"], "given"]
        for suite in suites:
            scores = report[suite]["baselines"][name]
            row += [
                percent(scores["known_task_accuracy"]),
                percent(scores["normalized_known_task_accuracy"]),
                "-",
            ]
        rows.append(tuple(row))
    for name in first["configurations"]:
        rows.append(_mass_row(report, suites, name, f"MASS `{name}`", "known_task"))
        rows.append(_mass_row(report, suites, name, f"MASS `{name}`", "joint"))
    return Table("Accuracy on test images", tuple(columns), tuple(rows))


def _mass_row(
    report: Mapping[str, Any], suites: Sequence[str], configuration: str, label: str, score: str
) -> tuple[str, ...]:
    row = [label, "unknown" if score == "joint" else "given"]
    for suite in suites:
        scores = report[suite][configuration]
        routed = percent(scores["routing_accuracy"]) if score == "joint" else "-"
        row += [
            percent(scores[f"{score}_accuracy"]),
            percent(scores.get(f"normalized_{score}_accuracy")),
            routed,
        ]
    return tuple(row)
