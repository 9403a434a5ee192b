"""Ctrl-C while something is written: it waits, because half of it helps no one."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Generator[list[int], None, None]:
    """Hold SIGINT back; give those that wait to raise KeyboardInterrupt, for who can still take back what was done.

    A handler of the user's own is called when the block has ended, and SIGINT that is ignored stays so.
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
    if held:  # since the last look; what was written stays
        signal.raise_signal(held[0])
