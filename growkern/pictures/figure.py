"""A figure without pyplot, whose colors have a contrast of 3.8 or more on white and on the dark backgrounds of notebooks."""

from collections.abc import Sequence
from io import BytesIO
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

INK, SOURCE, TARGET, NEW, PAD = "#757b81", "#2d8a4e", "#277ad6", "#c06a1a", "#986ee2"
WIDTH = 10  # inches
CLEAR = "none"  # background: the figure shows the page behind it


class Picture(Figure):
    """A figure that a notebook shows also where pyplot was never imported."""

    def _repr_png_(self) -> bytes:
        self.savefig(file := BytesIO(), format="png")
        return file.getvalue()


def blank(title: str, height: float, foot: str = "") -> Picture:
    """Return an empty figure on a transparent background, with a title and a text below.

    Args:
        title: Title.
        height: Height of the axes in inches.
        foot: Text below.
    """
    above, below = fill(title, 110), "\n".join(fill(line, 150) for line in foot.splitlines())
    lines = 2 + above.count("\n") + below.count("\n")
    figure = Picture(figsize=(WIDTH, height + 0.2 * lines), dpi=110, layout="constrained", facecolor=CLEAR)  # fmt: skip
    figure.suptitle(above, color=INK, weight="bold", x=0.01, ha="left", fontsize=10)
    figure.supxlabel(below, color=INK, fontsize=8, x=0.01, ha="left")
    return figure


def style(axes: Axes, title: str) -> None:
    """Draw axes in colors that a light and a dark page show, with a title."""
    axes.set_facecolor(CLEAR)
    axes.set_title(title, loc="left", fontsize=9, color=INK)
    axes.tick_params(colors=INK, labelsize=8, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, fontsize=8)
    axes.grid(color=INK, alpha=0.2, linewidth=0.6)


def legend(axes: Axes) -> None:
    """Draw the legend of labelled artists, where there are any."""
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=7, labelcolor=INK, frameon=False, handlelength=1.5)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write a name beside each row, from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def sizes(axes: Axes, rows: Sequence[tuple[str, int, int]]) -> None:
    """Draw named sizes before and after on a logarithmic axis."""
    style(axes, "sizes")
    for y, (_, n, m) in enumerate(rows):
        axes.plot([n, m], [y, y], "-", color=TARGET, linewidth=2, alpha=0.5)
    axes.plot([n for _, n, _ in rows], [*range(len(rows))], "o", color=SOURCE, markersize=7, fillstyle="none", label="source")  # fmt: skip
    axes.plot([m for *_, m in rows], [*range(len(rows))], "o", color=TARGET, markersize=4, label="target")  # fmt: skip
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 1.5, high * 1.5)
    axes.minorticks_off()
    name_rows(axes, [_size(*row) for row in rows])
    legend(axes)


def _size(name: str, n: int, m: int) -> str:
    return f"{name}  {n:,}" + (f" → {m:,} (x {m / n:.3g})" if n != m and n else "")


def bars(axes: Axes, title: str, rows: Sequence[tuple[str, float, str]], unit: str) -> None:
    """Draw a horizontal bar per row: name, length, and the text behind the bar."""
    style(axes, title)
    drawn = axes.barh([*range(len(rows))], [n for _, n, _ in rows], color=TARGET, height=0.6)
    axes.bar_label(drawn, [text for *_, text in rows], padding=3, color=INK, fontsize=8)
    axes.xaxis.set_major_formatter(EngFormatter(unit))
    axes.locator_params(axis="x", nbins=5)
    axes.margins(x=0.25)
    name_rows(axes, [name for name, *_ in rows])
