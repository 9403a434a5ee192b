"""The commands methods, families and procedures: tables of what growkern knows. Names, sentences and papers are those of the docstrings."""

from collections.abc import Mapping
from inspect import isfunction
from pathlib import Path

import typer

from growkern.cli.commands import failures
from growkern.cli.output import Json, show

HEAD = "kind", "arXiv", "what it does"
OTHERS = "\n\nOther classes are described by tracing one forward: growkern describe CHECKPOINT shows what grows."


def methods(context: typer.Context, json: Json = None) -> None:
    """List the growth methods with their papers, for --width and --depth of plan and grow."""
    with failures("methods"):
        from growkern.engine.history import DEPTHS, WIDTHS

        _show(context, ["method", *HEAD], _rows({"width": WIDTHS, "depth": DEPTHS}), json)


def procedures(context: typer.Context, json: Json = None) -> None:
    """List the published training procedures with their papers; call them as growkern.procedures.NAME in a training script."""
    with failures("procedures"):
        from growkern import procedures as known

        named = {name: getattr(known, name) for name in known.__all__}
        runs = {n: f for n, f in named.items() if isfunction(f) and "model" in f.__annotations__}
        _show(context, ["procedure", *HEAD], _rows({"schedule": runs}), json)


def families(context: typer.Context, json: Json = None) -> None:
    """List the model classes that growkern knows by name; it describes others by tracing a forward."""
    with failures("families"):
        from growkern.model.describe import FAMILIES
        from growkern.model.hints import Hint

        rows = [
            [
                name,
                "transformers",
                ", ".join({**dict.fromkeys(own.fields.values()), **dict.fromkeys(own.derived)}),
            ]
            if isinstance(own, Hint)
            else [
                name,
                "torch.nn",
                "ffn; hidden and heads as part of a model that a spec describes",
            ]
            for name, own in FAMILIES.items()
        ]
        _show(context, ["class", "package", "sizes"], rows, json, OTHERS)


def _rows(kinds: Mapping[str, Mapping[str, object]]) -> list[list[str]]:
    """Return a row per name: the kind, the arXiv numbers, and the first line of the docstring."""
    from growkern.checkpoints.card import ARXIV

    rows: list[list[str]] = []
    for kind, entries in kinds.items():
        for name, one in entries.items():
            text = (one.__doc__ or "").strip().replace("``", "")
            papers = ", ".join(dict.fromkeys(ARXIV.findall(text)))
            rows.append([name, kind, papers, text.partition("\n")[0]])
    return rows


def _show(
    context: typer.Context, header: list[str], rows: list[list[str]], json: Path | None, more: str = ""
) -> None:  # fmt: skip
    """Print rows as a table, or as a list of mappings."""
    from growkern.support.text import table

    data = [dict(zip(header, row, strict=True)) for row in rows]
    show(context, table(header, rows) + more, json, data)
