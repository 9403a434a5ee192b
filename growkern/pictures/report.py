"""The picture of a growth's report: what grew, the time of every step, bytes, and learning-rate factors."""

from collections.abc import Sequence

from growkern.pictures.figure import Picture, bars, blank, sizes

Bars = Sequence[tuple[str, float, str]]


def draw(
    title: str, rows: Sequence[tuple[str, int, int]], time: tuple[str, Bars], memory: Bars, factors: tuple[str, Bars], foot: str
) -> Picture:  # fmt: skip
    """Draw a report.

    Args:
        title: Title.
        rows: Name, source size and target size of everything that grew.
        time: Title of the panel; name, seconds and text of every step.
        memory: Name, bytes and text of everything moved or allocated.
        factors: Title of the panel; factor, number of tensors and its text of every factor.
        foot: Text below: the gradient norm.
    """
    n = max(len(rows), len(time[1])), max(len(memory), len(factors[1]))
    heights = [1.0 + 0.28 * m for m in n]
    figure = blank(title, sum(heights), foot)
    (top, right), (left, last) = figure.subplots(2, 2, height_ratios=heights)
    sizes(top, rows)
    bars(right, time[0], time[1], "s")
    bars(left, "bytes", memory, "B")
    bars(last, factors[0], factors[1], "")
    return figure
