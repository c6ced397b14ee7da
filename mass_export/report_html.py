"""Pieces of the report in HTML; all text is escaped here."""

from __future__ import annotations

from html import escape

from mass_export.tables import Table


def table(data: Table) -> str:
    """A table that scrolls sideways where the screen is narrow."""
    head = "".join(f"<th>{_inline(cell)}</th>" for cell in data.columns)
    first_summary = len(data.rows) - data.summary_rows
    rows = "".join(
        f"<tr{' class=summary' if i >= first_summary else ''}>"
        + "".join(f"<td>{_inline(cell)}</td>" for cell in row)
        + "</tr>"
        for i, row in enumerate(data.rows)
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _inline(cell: str) -> str:
    """Markdown's backticks as code."""
    pieces = escape(cell).split("`")
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def command(text: str) -> str:
    """The command that made what stands above."""
    return f"<pre>{escape(text)}</pre>"


def figure(content: str, caption: str) -> str:
    """A chart with its caption."""
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"
