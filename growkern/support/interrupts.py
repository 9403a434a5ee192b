"""Delay SIGINT (Ctrl-C) during a write, so that the write completes or is rolled back."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Generator[list[int], None, None]:
    """Delay SIGINT until the block ends.

    Yields the list of pending signals, so that the caller can still roll back and raise KeyboardInterrupt. If the user has installed a
    handler, the list stays empty, and the handler is called when the block has ended. An ignored SIGINT stays ignored. Outside the main
    thread, SIGINT is not delayed.
    """
    before = signal.getsignal(signal.SIGINT)
    interrupts: list[int] = []
    if threading.current_thread() is not threading.main_thread() or before in (
        None,
        signal.SIG_IGN,
    ):
        yield interrupts
        return
    held: list[int] = interrupts if before is signal.default_int_handler else []
    signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    done = False
    try:
        yield interrupts
        done = True
    finally:
        signal.signal(signal.SIGINT, before)
        if held and not done and held is not interrupts:
            signal.raise_signal(held[0])
    if held:  # SIGINT arrived after the caller's last check: the writes stay
        signal.raise_signal(held[0])
