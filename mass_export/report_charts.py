"""The figures of the report as inline SVG, coloured by its style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

STRONG_SHARE = 0.55  # from here on a cell is dark enough for light text
LINE_COLOURS = ("--accent", "--second", "--third", "--grey")


@dataclass(frozen=True)
class Bar:
    """One bar: its value, how the value is written, and the CSS variable of its colour."""

    label: str
    value: float
    text: str
    colour: str = "--accent"


def heat_map(names: Sequence[str], counts: Sequence[Sequence[int]], rows: str, columns: str) -> str:
    """Shares of every row, in per cent; the diagonal is what is right."""
    size, left, top = 40, 84, 84
    edge = size * len(names)
    label = f"{escape(rows)} against {escape(columns)}"
    parts = [f'<svg viewBox="0 0 {left + edge + 26} {top + edge + 22}" role="img" aria-label="{label}">']
    parts += _column_names(names, left, top, size)
    for i, row in enumerate(counts):
        total, y = sum(row) or 1, top + i * size
        parts.append(_row_name(names[i], left, y, size))
        for j, count in enumerate(row):
            share = count / total
            title = f"{names[i]} answered by {names[j]}: {count} of {total}"
            text = f"{100 * share:.0f}" if share >= 0.005 else "<1"
            cell = _cell(left + j * size, y, size, size, share, text if count else "")
            parts.append(f"<g><title>{escape(title)}</title>{cell}</g>")
    parts.append(
        f'<text class="soft" x="0" y="{top + edge + 17}">rows: {escape(rows)}; columns: {escape(columns)}; '
        "per cent of the row</text></svg>"
    )
    return "".join(parts)


def bar_chart(bars: Sequence[Bar], limit: float | None = None) -> str:
    """Horizontal bars from zero to `limit`, or to the largest value."""
    label_width, width, height = 244, 560, 28
    limit = max(bar.value for bar in bars) if limit is None else limit
    room = width - label_width - 62
    parts = [f'<svg viewBox="0 0 {width} {height * len(bars)}" role="img" aria-label="bars">']
    for i, bar in enumerate(bars):
        y, length = i * height, max(2.0, room * bar.value / limit if limit else 0.0)
        parts.append(
            f'<text x="{label_width - 10}" y="{y + 18}" text-anchor="end">{escape(bar.label)}</text>'
            f'<rect x="{label_width}" y="{y + 4}" width="{length:.1f}" height="20" rx="4" '
            f'style="fill: var({bar.colour})"/>'
            f'<text x="{label_width + length + 8:.1f}" y="{y + 18}">{escape(bar.text)}</text>'
        )
    return "".join(parts) + "</svg>"


def line_chart(
    series: Mapping[str, Sequence[float]],
    x_label: str,
    ticks: Sequence[str] | None = None,
    limit: float | None = None,
    unit: str = "",
) -> str:
    """Values at evenly spaced places with a legend; a line for each series.

    Args:
        series: name -> values.
        x_label: below the axis.
        ticks: names of the places; their numbers by default.
        limit: of the vertical axis, which begins at zero; without it values are shares and it ends at 100%.
        unit: of the vertical axis, with a limit.
    """
    left, top, width, height = 64, 12, 380, 180
    count = max(len(values) for values in series.values())
    ticks = [str(i) for i in range(count)] if ticks is None else ticks
    step = width / max(count - 1, 1)
    box = f"0 0 {left + width + 24} {top + height + 44 + 20 * len(series)}"
    parts = [f'<svg viewBox="{box}" role="img" aria-label="by {escape(x_label)}">']
    for fifth in range(6):
        y = top + height * (1 - fifth / 5)
        text = f"{20 * fifth}%" if limit is None else f"{limit * fifth / 5:.3g}{unit}"
        parts.append(
            f'<line class="frame" x1="{left}" x2="{left + width}" y1="{y}" y2="{y}"/>'
            f'<text class="soft" x="{left - 8}" y="{y + 4}" text-anchor="end">{escape(text)}</text>'
        )
    for i, tick in enumerate(ticks):
        x = left + i * step
        parts.append(
            f'<text class="soft" x="{x}" y="{top + height + 18}" text-anchor="middle">{escape(tick)}</text>'
        )
    parts.append(f'<text class="soft" x="{left}" y="{top + height + 38}">{escape(x_label)}</text>')
    for row, (name, values) in enumerate(series.items()):
        colour = f"var({LINE_COLOURS[row % len(LINE_COLOURS)]})"
        points = [(left + i * step, top + height * (1 - v / (limit or 1.0))) for i, v in enumerate(values)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" style="fill: none; stroke: {colour}; stroke-width: 2.5"/>')
        for (x, y), value in zip(points, values, strict=True):
            shown = f"{100 * value:.1f}%" if limit is None else f"{value:.3g}{unit}"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" style="fill: {colour}"><title>{escape(name)}: '
                f"{escape(shown)}</title></circle>"
            )
        y_legend = top + height + 58 + 20 * row
        parts.append(
            f'<rect x="{left}" y="{y_legend - 10}" width="14" height="10" rx="3" style="fill: {colour}"/>'
            f'<text x="{left + 22}" y="{y_legend}">{escape(name)}</text>'
        )
    return "".join(parts) + "</svg>"


def strength_map(
    columns: Sequence[str], values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], rows: str
) -> str:
    """Values of any scale as shades, from the smallest (at most 0) to the largest; row 0 is the lowest."""
    width, height, left, top = 46, 30, 84, 84
    edge = height * len(values)
    low, high = min(0.0, *map(min, values)), max(map(max, values))
    span = (high - low) or 1.0
    box = f"0 0 {left + width * len(columns) + 26} {top + edge + 22}"
    parts = [f'<svg viewBox="{box}" role="img" aria-label="by {escape(rows)} and task">']
    parts += _column_names(columns, left, top, width)
    for i, row in enumerate(values):
        y = top + (len(values) - 1 - i) * height
        parts.append(_row_name(f"{rows} {i}", left, y, height))
        for j, value in enumerate(row):
            parts.append(_cell(left + j * width, y, width, height, (value - low) / span, texts[i][j]))
    return "".join(parts) + "</svg>"


def _column_names(names: Sequence[str], left: int, top: int, width: int) -> list[str]:
    places = [left + (j + 0.5) * width + 4 for j in range(len(names))]
    return [
        f'<text transform="translate({x} {top - 8}) rotate(-50)">{escape(name)}</text>'
        for x, name in zip(places, names, strict=True)
    ]


def _row_name(name: str, left: int, y: int, height: int) -> str:
    return f'<text x="{left - 8}" y="{y + height / 2 + 4}" text-anchor="end">{escape(name)}</text>'


def _cell(x: int, y: int, width: int, height: int, share: float, text: str) -> str:
    """A rectangle as strong as its share, 0..1, with a text on it or none."""
    cell = (
        f'<rect class="cell" x="{x + 1}" y="{y + 1}" width="{width - 2}" height="{height - 2}" rx="4" '
        f'fill-opacity="{0.05 + 0.95 * share:.3f}"/>'
    )
    if not text:
        return cell
    style = ' class="strong"' if share >= STRONG_SHARE else ""
    place = f'x="{x + width / 2}" y="{y + height / 2 + 4}" text-anchor="middle"'
    return f"{cell}<text{style} {place}>{escape(text)}</text>"
