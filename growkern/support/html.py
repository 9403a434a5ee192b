"""HTML of tables for notebooks: no scripts and no colors, so that the page's own theme applies; every text is escaped."""

from collections.abc import Sequence
from html import escape


def html_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as an HTML table; numbers are right-aligned, with separators of thousands.

    Args:
        header: Title of every column.
        rows: Cells of every row.
    """
    lines = [_row("th", [(title, "left") for title in header])]
    for row in rows:
        cells = [(cell, "right" if isinstance(cell, int | float) else "left") for cell in row]
        lines.append(
            _row("td", [(f"{c:,}" if isinstance(c, int) else str(c), side) for c, side in cells])
        )
    return f"<table>{''.join(lines)}</table>"


def _row(tag: str, cells: Sequence[tuple[str, str]]) -> str:
    """Format a row: the text of each cell, and the side to which it is aligned."""
    made = [
        f'<{tag} style="text-align:{side};padding-right:1em">{escape(text)}</{tag}>'
        for text, side in cells
    ]
    return f"<tr>{''.join(made)}</tr>"


def html_page(title: str, *parts: str) -> str:
    """Join parts that are HTML already under a title that is not."""
    return f"<div><p><b>{escape(title)}</b></p>{''.join(parts)}</div>"


def html_lines(lines: Sequence[str]) -> str:
    """Format texts as paragraphs."""
    return "".join(f"<p>{escape(line)}</p>" for line in lines)


def html_more(title: str, part: str) -> str:
    """Fold a part that is HTML already under a title that is not; a click shows it."""
    return f"<details><summary>{escape(title)}</summary>{part}</details>"
