"""Progress of commands on stderr: nothing is shown with ``--quiet``, or where stderr is no terminal."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import typer


def is_shown(context: typer.Context) -> bool:
    """True when a command shows its progress."""
    from rich.console import Console

    return Console(stderr=True).is_terminal and not context.find_root().params["quiet"]


@contextmanager
def bytes_of(context: typer.Context, what: str) -> Generator[Callable[[int, int], None]]:
    """Show bytes done, total, per second, and the time left.

    Yields:
        Function of the bytes done and the total; the bar starts at the first call, so that a refused command shows none.
    """
    from rich.progress import (  # fmt: skip
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()  # fmt: skip
    bar = _bar(context, False, *columns)
    task = bar.add_task(what)

    def advance(done: int, total: int) -> None:
        bar.start()  # a second call does nothing
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        bar.stop()


@contextmanager
def steps_of(context: typer.Context, total: float) -> Generator[Callable[..., None]]:
    """Show what is done now, with the time so far and the time left.

    Yields:
        Function of a text, what is done now, and of the number of steps done; None for one more step than before.
    """
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()  # fmt: skip
    bar = _bar(context, True, *columns)
    task = bar.add_task("", total=total)

    def advance(what: str, done: float | None = None) -> None:
        if done is None:
            bar.update(task, description=what, advance=1)
        else:
            bar.update(task, description=what, completed=done)

    with bar:
        yield advance


def _bar(context: typer.Context, transient: bool, *columns: Any) -> Any:
    """Make a bar; a transient one is removed when it ends."""
    from rich.console import Console
    from rich.progress import Progress

    shown = is_shown(context)
    return Progress(*columns, console=Console(stderr=True), disable=not shown, transient=transient)
