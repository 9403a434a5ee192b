"""The picture of a plan: sizes, the index map of every space, and the scales of every kind of tensor."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import nan

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from growkern.pictures.figure import (  # fmt: skip
    CLEAR,
    INK,
    NEW,
    PAD,
    SOURCE,
    TARGET,
    Picture,
    blank,
    name_rows,
    sizes,
    style,
)

MANY = 500  # runs of a random map, which thicker lines would paint over
COLUMNS = 5  # panels of index maps side by side
KINDS = {
    "first": ("first copy", SOURCE),
    "further": ("further copy", TARGET),
    "new": ("new block, made of that source block", NEW),
    "pad": ("new coordinates, which copy nothing", PAD),
}


@dataclass(frozen=True)
class MapPanel:
    """An index map to draw.

    Attributes:
        title: Name of the space, and the sizes.
        n_source: Source size in coordinates.
        n_target: Target size in coordinates.
        runs: First target coordinate, number of coordinates, first source coordinate, and a key of ``KINDS``.
    """

    title: str
    n_source: int
    n_target: int
    runs: Sequence[tuple[int, int, int, str]]


@dataclass(frozen=True)
class ScaleRow:
    """The scales of tensors to draw.

    Attributes:
        name: Name and shapes.
        weight: Text of the weight scale, and its least and largest number; None for weights that copy no source tensor.
        gradient: The same of the gradient scale.
    """

    name: str
    weight: tuple[str, tuple[float, float] | None]
    gradient: tuple[str, tuple[float, float] | None]


def draw(
    title: str, rows: Sequence[tuple[str, int, int]], maps: Sequence[MapPanel], scales: Sequence[ScaleRow], foot: str
) -> Picture:  # fmt: skip
    """Draw a plan.

    Args:
        title: Title.
        rows: Name, source size and target size of every named size.
        maps: Index maps of the spaces that change.
        scales: Scales of the tensors that change.
        foot: Text below, such as what is left out.
    """
    n_lines = -(-len(maps) // COLUMNS)
    heights = [0.8 + 0.25 * len(rows), 2.3 * n_lines, 0.8 + 0.22 * len(scales)]
    figure = blank(title, sum(heights), foot)
    grid = figure.add_gridspec(3, 1, height_ratios=[max(h, 0.01) for h in heights])
    top, middle, bottom = (figure.add_subfigure(grid[i], facecolor=CLEAR) for i in range(3))
    sizes(top.add_subplot(), rows)
    for i, panel in enumerate(maps):
        _map(middle.add_subplot(n_lines, COLUMNS, i + 1), panel)
    kinds = {kind for panel in maps for *_, kind in panel.runs}
    drawn = [Patch(color=color, label=label) for kind, (label, color) in KINDS.items() if kind in kinds]  # fmt: skip
    middle.legend(handles=drawn, loc="outside upper left", ncols=4, fontsize=8, labelcolor=INK, frameon=False)  # fmt: skip
    left = bottom.add_subplot(1, 2, 1)
    right = bottom.add_subplot(1, 2, 2, sharey=left)
    right.tick_params(labelleft=False, left=False)
    _scales(left, "weight scale", [row.weight for row in scales])
    _scales(right, "gradient scale", [row.gradient for row in scales])
    name_rows(left, [row.name for row in scales])
    right.grid(axis="y", visible=False)
    return figure


def _map(axes: Axes, panel: MapPanel) -> None:
    style(axes, panel.title)
    for kind, (_, color) in KINDS.items():
        runs = [run for run in panel.runs if run[3] == kind]
        if kind == "pad":
            for start, n, *_ in runs:
                axes.axvspan(start, start + n, color=color, alpha=0.3, linewidth=0)
        elif runs:
            x, y = zip(*_lines(runs), strict=True)
            width = 1.8 if len(runs) <= MANY else 0.5
            axes.plot(x, y, color=color, linewidth=width, solid_capstyle="projecting", label=kind)
    axes.set(xlim=(0, panel.n_target), ylim=(0, panel.n_source), xlabel="target", ylabel="source")
    axes.locator_params(nbins=3, integer=True)


def _lines(runs: Sequence[tuple[int, int, int, str]]) -> Iterator[tuple[float, float]]:
    """Yield the points of one line per run; points that are no numbers part the lines."""
    for start, n, source, _ in runs:
        yield from ((start, source), (start + n, source + n), (nan, nan))


def _scales(axes: Axes, title: str, rows: Sequence[tuple[str, tuple[float, float] | None]]) -> None:
    style(axes, title)
    axes.set_xscale("log", base=2)
    spans = [span for _, span in rows if span is not None and span[0] > 0]
    low, high = min([1.0, *(lo for lo, _ in spans)]), max([1.0, *(hi for _, hi in spans)])
    axes.set_xlim(low / 1.4, high * (high / low) ** 0.5 * 1.8)  # room for the texts
    for y, (text, span) in enumerate(rows):
        at = 1.0
        if span is not None and span[0] > 0:
            axes.plot(span, [y, y], "o-", color=TARGET, markersize=4, linewidth=2)
            at = span[1]
        axes.annotate(text, (at, y), (6, 0), textcoords="offset points", va="center", color=INK, fontsize=7)  # fmt: skip
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    axes.xaxis.set_major_formatter("{x:.3g}")
