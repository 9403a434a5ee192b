"""Plain-text tables for plans, reports and verifications."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

ENOUGH = 4  # times the characters of a cut text: white space on the way is joined


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
    """Return the representation of a value on one line, cut to ``limit`` characters, for error messages; time and memory are bounded."""
    text = ""
    try:
        for part in _parts(value):
            text += part
            if len(text) > ENOUGH * limit:
                break
    except ValueError:  # Python prints no int of more than 4300 digits
        return f"a {type(value).__name__} with a number of thousands of digits"
    return one_line(text, limit)


def _parts(value: Any) -> Iterator[str]:
    """Yield the parts of ``repr(value)``: lists that hold one list many times print as more text than fits in memory."""
    kind: type = value.__class__
    if kind not in (list, tuple, dict):
        yield repr(value)
        return
    yield {list: "[", tuple: "(", dict: "{"}[kind]
    for i, entry in enumerate(value):
        yield ", " if i else ""
        yield from _parts(entry)
        if kind is dict:
            yield ": "
            yield from _parts(value[entry])
    yield {list: "]", tuple: ",)" if len(value) == 1 else ")", dict: "}"}[kind]


def one_line(text: object, limit: int = 100) -> str:
    """Return a text (a file name, the message of another error) on one line, cut to ``limit`` characters."""
    words = " ".join(str(text).split())
    return words if len(words) <= limit else f"{words[: limit - 3]}..."
