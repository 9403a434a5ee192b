"""Progress of long work: bytes for a callback of the caller and the log, and stages of a description for whoever listens."""

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from time import perf_counter

Progress = Callable[[int, int], object]  # bytes written so far, total bytes
SECONDS = 2.0  # between two lines of the log; shorter work has none
Listener = Callable[[str, float], object]  # what begins, part of the whole work that is done
logger = logging.getLogger("growkern")
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Generator[None]:
    """Call a function at every stage of the work inside."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def stage(what: str, done: float) -> None:
    """Say what begins now, and which part of the whole work is done."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(what, done)


class Meter:
    """Counts bytes, calls a callback after each part of the work, and logs what takes longer than ``SECONDS``.

    Attributes:
        total: Bytes of the whole work.
        done: Bytes written so far.
        on_progress: Callback of the caller; None for none.
    """

    def __init__(self, total: int, on_progress: Progress | None = None) -> None:
        self.total, self.done, self.on_progress = total, 0, on_progress
        self._last = perf_counter()

    def reach(self, done: int) -> None:
        """Count up to ``done`` bytes, at most the total."""
        self.done = max(self.done, min(done, self.total))
        if self.on_progress is not None:
            self.on_progress(self.done, self.total)
        if (now := perf_counter()) - self._last > SECONDS:
            self._last = now
            logger.info("growing: %.1f of %.1f GB written", self.done / 1e9, self.total / 1e9)
