"""The picture of a run with growths: model size and FLOPs over the steps."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter

from growkern.pictures.figure import INK, NEW, TARGET, Picture, blank, legend, style


@dataclass(frozen=True)
class Leg:
    """A part of a run in which the model keeps its size.

    Attributes:
        start: First and last step at which the part may start; two equal steps for a fixed start.
        n_params: Number of parameters.
        flops: FLOPs of a step, or of a token.
        label: What happens at the start; empty for the first part.
    """

    start: tuple[float, float]
    n_params: int
    flops: float
    label: str = ""


def draw(title: str, legs: Sequence[Leg], end: float, unit: str) -> Picture:
    """Draw a run.

    Args:
        title: Title.
        legs: The parts of the run in order.
        end: Last step of the run.
        unit: Unit of ``Leg.flops``.
    """
    figure, heights = blank(title, 4.8), [*_levels(legs, end)]
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, name, values in (
        (upper, "parameters", [leg.n_params for leg in legs]),
        (lower, unit, [leg.flops for leg in legs]),
    ):
        style(axes, name)
        _steps(axes, legs, values, end)
        axes.set_ylim(0, max(values) * (1.2 + 0.16 * max(heights) * (axes is upper)))
        axes.yaxis.set_major_formatter(EngFormatter())
        axes.locator_params(axis="y", nbins=5)
    for height, leg in zip(heights, legs, strict=True):
        if leg.label:
            left = leg.start[0] < (legs[0].start[0] + end) / 2
            upper.annotate(
                leg.label, (leg.start[0], 0.98 - 0.1 * height), (4 if left else -4, 0), xycoords=("data", "axes fraction"),
                textcoords="offset points", va="top", ha="left" if left else "right", color=INK, fontsize=8,
            )  # fmt: skip
    lower.set(xlabel="step", xlim=(legs[0].start[0], end))
    legend(lower)
    return figure


def _levels(legs: Sequence[Leg], end: float) -> Iterator[int]:
    """Yield the line of each label: a label next to the label before it is written one line lower."""
    level, last = 0, float("-inf")
    for leg in legs:
        near = leg.start[0] - last < 0.4 * (end - legs[0].start[0])
        level = (level + 1) % 5 if near and leg.label and last > float("-inf") else 0
        last = leg.start[0] if leg.label else last
        yield level


def _steps(axes: Axes, legs: Sequence[Leg], values: Sequence[float], end: float) -> None:
    """Draw a level per part, and a window where the start is not a fixed step."""
    windows = 0
    for leg, before, after in zip(legs[1:], values, values[1:], strict=False):
        low, high = leg.start
        if low < high:
            label = None if windows else "the growth may happen at any step of the window"
            axes.axvspan(low, high, color=NEW, alpha=0.2, linewidth=0, label=label)
            axes.fill_between([low, high], before, after, color=TARGET, alpha=0.6, linewidth=0)
            windows += 1
        axes.axvline(low, color=NEW, linewidth=1, linestyle="--" if low < high else ":", gid="growth")  # fmt: skip
    points = list[tuple[float, float]]()
    stops = [*(leg.start[0] for leg in legs[1:]), end]
    for leg, value, stop in zip(legs, values, stops, strict=True):
        low, high = leg.start
        points += [(nan, nan)] if low < high else []  # the line has a gap in a window
        points += [(high, value), (stop, value)] if stop > high else []
    axes.plot(*zip(*points, strict=True), color=TARGET, linewidth=2, gid="run")
