"""The progress bar of a growth in a training loop, by tqdm, which every framework here installs."""

from typing import Any

from tqdm.auto import tqdm

DELAY = 2.0  # seconds; a shorter growth shows no bar


class Bar:
    """An ``on_progress`` callback that draws a bar for growths of more than ``DELAY`` seconds.

    Args:
        shown: False to draw nothing, on all processes but the main one.
    """

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.bar: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Move the bar to ``done`` of ``total`` bytes."""
        if self.bar is not None and (
            done < self.bar.n or total != self.bar.total
        ):  # of a growth that failed
            self.bar.close()
            self.bar = None
        if self.bar is None:
            self.bar = tqdm(
                total=total, unit="B", unit_scale=True, desc="growing", delay=DELAY, leave=False, disable=not self.shown,
            )  # fmt: skip
        self.bar.update(done - self.bar.n)
        if done >= total:
            self.bar.close()
            self.bar = None
