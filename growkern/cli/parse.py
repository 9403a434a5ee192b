"""Parsing of command line options: target sizes, and methods in Python syntax. No option is evaluated as code."""

import ast
from collections.abc import Sequence
from typing import cast

from growkern.engine.history import DEPTHS, WIDTHS
from growkern.errors import PlanError
from growkern.planning.decisions import DepthMethod, WidthMethod
from growkern.planning.method_text import method_of, parsed
from growkern.planning.sizes import Target
from growkern.support.text import one_line, short

DIGITS = 18  # of a size


def sizes_of(texts: Sequence[str]) -> Target:
    """Read target sizes: ``["2x"]``, or ``["hidden=1024,layers=24", "ffn=2x"]``.

    Raises:
        PlanError: A text has neither form, or a size is named twice.
    """
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    sizes: dict[str, int | str] = {}
    for part in [part.strip() for text in texts for part in text.split(",")]:
        name, equals, value = (word.strip() for word in part.partition("="))
        if not (name and equals and value):
            raise PlanError(f"cannot read {short(part)}; write 2x, or hidden=1024,layers=24.")
        if name in sizes:
            raise PlanError(f"{one_line(name)} is named twice; name every size once.")
        # of a longer number, resolve_sizes says that it cannot be read
        sizes[name] = int(value) if value.isdecimal() and len(value) <= DIGITS else value
    return sizes


def width_of(text: str) -> WidthMethod:
    """Read a width method, ``"HyperClone(noise_db=10)"``; raise PlanError for anything else."""
    return cast(WidthMethod, method_of(parsed(text), text, WIDTHS))


def depth_of(text: str) -> DepthMethod:
    """Read a depth method, ``"Stack"``; raise PlanError for anything else."""
    return cast(DepthMethod, method_of(parsed(text), text, DEPTHS))


def methods_of(text: str) -> WidthMethod | DepthMethod | tuple[WidthMethod, DepthMethod]:
    """Read a method of either kind, or a pair, ``"FPI() + Stack()"``; raise PlanError for anything else."""
    tree = parsed(text)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        pair = method_of(tree.left, text, WIDTHS), method_of(tree.right, text, DEPTHS)
        return cast(tuple[WidthMethod, DepthMethod], pair)
    return cast(WidthMethod, method_of(tree, text, WIDTHS | DEPTHS))


def dynamics_of(text: str) -> str | None:
    """Read a mode of the learning rates: ``"mup"``, ``"exact"``, or ``"none"`` for None; raise PlanError for anything else."""
    known = {"mup": "mup", "exact": "exact", "none": None}
    if text not in known:
        raise PlanError(f"cannot read {short(text)}; write {', '.join(known)}.")
    return known[text]
