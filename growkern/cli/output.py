"""What a command prints: a table, or JSON in its place; pictures in files. The root context holds the stdout of before ``--quiet``."""

import json as jsons
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, cast

import typer

STDOUT = Path("-")
Json = Annotated[
    Path | None,
    typer.Option(dir_okay=False, metavar="FILE", help="File to which the result is written as JSON; - prints the JSON instead."),
]  # fmt: skip
Plot = Annotated[
    Path | None,
    typer.Option(dir_okay=False, metavar="FILE", help="File to which a picture of the result is drawn, such as a.png or a.svg."),
]  # fmt: skip


def show(context: typer.Context, result: object, json: Path | None, data: object) -> None:
    """Print a result, or its data as JSON.

    Args:
        context: Context of the command.
        result: The result; its text is printed.
        json: File of the JSON besides the text; ``STDOUT`` for the JSON in place of the text; None for the text alone.
        data: Data of the result: a JSON text, or what ``plain`` takes.

    Raises:
        CheckpointError: The file cannot be written.
    """
    from growkern.errors import CheckpointError

    if json is None:
        typer.echo(result)
        return
    text = data if isinstance(data, str) else jsons.dumps(plain(data))
    if json == STDOUT:
        typer.echo(text, file=context.find_root().obj)
        return
    typer.echo(result)
    try:
        json.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {json}: {error}; pass --json another file.") from None


def draw(save: Callable[[Path], object], path: Path | None) -> None:
    """Draw a picture to a file; raise BadParameter if matplotlib knows no such format, or the file cannot be written."""
    if path is None:
        return
    try:
        save(path)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"cannot draw {path}: {error}", param_hint="--plot") from None


def plain(value: Any) -> Any:
    """Return a value as what JSON has: records as mappings, numbers that are not finite as None, everything else as text."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, Sequence):
        return [plain(one) for one in cast(Sequence[Any], value)]
    return str(value)
