"""Delay what would interrupt a growth: signals during a write, and Python's garbage collector."""

import gc
import signal
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

Handler = Callable[[int, Any], object]


@contextmanager
def uninterrupted() -> Generator[list[int], None, None]:
    """Delay every signal that has a handler in Python until the block ends, because a handler may raise (SIGINT, SIGTERM, SIGALRM).

    Yields the list of pending SIGINTs, so that the caller can still roll back and raise KeyboardInterrupt. If the user has installed a
    handler for SIGINT, the list stays empty. The user's handlers are called when the block has ended, even if it has raised; an exception
    of a handler is raised then. Ignored signals stay ignored. Outside the main thread, where no handler runs, nothing is delayed.
    """
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield interrupts
        return
    found = {number: signal.getsignal(number) for number in _signals()}
    handlers: dict[int, Handler] = {n: handler for n, handler in found.items() if callable(handler)}
    default = handlers.get(signal.SIGINT) is signal.default_int_handler
    pending: list[int] = []
    ended = False

    def hold(number: int, frame: object) -> None:
        if ended:  # a handler raised while this function was being replaced
            handlers[number](number, frame)
        else:
            (interrupts if default and number == signal.SIGINT else pending).append(number)

    done = False
    try:
        for number in handlers:
            signal.signal(number, hold)
        yield interrupts
        done = True
    finally:
        ended = True
        # a SIGINT after the caller's last check: the writes stay
        _restore(handlers, [*pending, *(interrupts if done else [])])


@cache
def _signals() -> tuple[int, ...]:
    return tuple(map(int, signal.valid_signals()))


@contextmanager
def uncollected() -> Generator[None, None, None]:
    """Hold automatic garbage collection off until the block ends: a full collection scans the heap of the whole process, for 0.2 s."""
    enabled = gc.isenabled()
    try:
        gc.disable()
        yield
    finally:
        if enabled:
            gc.enable()


def _restore(handlers: Mapping[int, Handler], pending: Sequence[int]) -> None:
    """Install the handlers again and call those of pending signals, once each; do all of it even if a handler raises."""
    with ExitStack() as calls:
        for number in reversed([*dict.fromkeys(pending)]):
            calls.callback(handlers[number], number, None)
        for number, handler in handlers.items():
            calls.callback(signal.signal, number, handler)
