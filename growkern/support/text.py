"""Plain-text tables for plans, reports and verifications."""

import re
from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format rows as columns of text; columns of numbers are right-aligned."""
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in rows]
    right = [
        bool(rows) and all(isinstance(row[c], int | float) for row in rows)
        for c in range(len(header))
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if r else cell.ljust(width)
            for cell, width, r in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in [list(header), ["-" * width for width in widths], *cells]
    ]
    return "\n".join(lines)


def fold(name: str) -> str:
    """Replace block indices by a star, so that the tensors of all blocks share a line."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", name)


def short(value: object, limit: int = 100) -> str:
    """Return the representation of a value on one line, cut to ``limit`` characters, for error messages."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no int of more than 4300 digits
        text = f"a {type(value).__name__} with a number of thousands of digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
