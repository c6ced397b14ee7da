"""Predictions in a notebook: a small table with bars, in the notebook's own colours."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.prediction import Prediction

_SHOWN_TASKS = 5


def html_from_prediction(prediction: Prediction) -> str:
    """The answer, its alternatives, and how the router saw the tasks, as one HTML fragment."""
    rows = [_row(label, score, share_text(score)) for _, label, score in prediction.alternatives]
    heading = f"<b>{escape(prediction.label)}</b> &middot; {escape(prediction.task)}"
    if prediction.is_unknown:
        heading += " &middot; <b>of no known task?</b>"
    if prediction.route_confidence is not None:
        heading += f" &middot; route {share_text(prediction.route_confidence)}"
        gates = sorted(prediction.gates.items(), key=lambda item: -item[1])[:_SHOWN_TASKS]
        rows.append('<tr><td colspan="3" style="text-align:left;opacity:.7">gates of the tasks</td></tr>')
        rows += [_row(task, gate, f"{gate:.2f}") for task, gate in gates]
    return (
        f'<table style="border-collapse:collapse"><caption style="text-align:left">{heading}</caption>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def share_text(share: float) -> str:
    """A share as per cent."""
    return f"{100 * share:.1f}%"


def _row(name: str, share: float, text: str) -> str:
    bar = f"width:{120 * min(max(share, 0.0), 1.0):.0f}px;height:.7em;background:currentColor;opacity:.55"
    return (
        f'<tr><td style="text-align:right">{escape(name)}</td><td style="min-width:120px"><div style="{bar}">'
        f"</div></td><td>{text}</td></tr>"
    )
