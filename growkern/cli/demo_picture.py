"""The picture of the demo: held-out loss over training FLOPs, of trunks and of their annealed branches."""

# pyright: reportUnknownMemberType=false
from pathlib import Path
from typing import TYPE_CHECKING

from growkern.cli.demo_run import Line, parted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROWN, SCRATCH, NEVER, GREY = "#0969da", "#9a6700", "#1a7f37", "#57606a"
TERA = 1e12
LEGEND = "thin: constant learning rate; bold: annealed to zero"


def draw(lines: list[Line], said: str, path: Path) -> None:
    """Draw every run, with the first line of the verdict as the title.

    Args:
        lines: The grown run, the runs from scratch, and the source that never grows; or the grown run alone.
        said: The verdict.
        path: Path of the PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=150, layout="tight")
    axes = figure.add_subplot()
    grown, *others = lines
    low = min(loss for line in lines for _, loss in [*line.curve, *line.ends])
    late = [loss for line in lines for flops, loss in line.curve if flops >= line.flops / 6]
    high = low + 1.25 * (max(late) - low) + 1e-3  # clips the first fall of the loss
    low -= 0.15 * (high - low)
    _line(axes, grown, GROWN, f"grown to {_size(grown)}")
    if others:
        _, (best, *worse), never = parted(lines)
        _line(axes, best, SCRATCH, f"{best.name}, best of {1 + len(worse)} rates: {_size(best)}")
        for line in worse:
            _line(axes, line, SCRATCH, "", alpha=0.3)
        _line(axes, never, NEVER, f"never grows: {_size(never)}")
        _shifted(axes, grown)
        _names(axes, lines, gap=0.045 * (high - low))
    for growth in grown.growths:
        axes.axvline(growth.flops / TERA, color=GREY, linestyle=":", linewidth=1, zorder=0)
        axes.annotate(
            growth.label, (growth.flops / TERA, 0), (5, 8), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=GREY,
        )  # fmt: skip
        axes.plot(growth.flops / TERA, growth.after, "^", color=GROWN, markersize=8, zorder=4)
    axes.set(
        xlabel="training compute (10¹² FLOPs)", ylabel="held-out loss (nats per byte)",
        xlim=(0, 1.09 * grown.flops / TERA), ylim=(low, high),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="white", title=LEGEND, alignment="left")
    title, *below = said.split("\n")
    axes.set_title(title, loc="left", weight="bold", size=12, pad=14 + 11 * len(below))
    axes.annotate(
        "\n".join(below), (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
        color=GREY, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def _size(line: Line) -> str:
    return f"{line.n_params / 1e3:.0f} k parameters"


def _line(axes: "Axes", line: Line, color: str, label: str, alpha: float = 1.0) -> None:
    """Draw a trunk as a thin line, and its annealed branches as bold segments that end in points."""
    x, y = zip(*((flops / TERA, loss) for flops, loss in line.curve), strict=True)
    axes.plot(x, y, "-", color=color, linewidth=1, alpha=0.7 * alpha)
    for i, ((c0, l0), (c1, l1)) in enumerate(zip(line.starts, line.ends, strict=True)):
        axes.plot(
            (c0 / TERA, c1 / TERA), (l0, l1), "o-", color=color, linewidth=2.2, markersize=6.5, markevery=[1],
            alpha=alpha, label=None if i or not label else label,
        )  # fmt: skip


def _shifted(axes: "Axes", grown: Line) -> None:
    """Draw the grown run for an existing source: FLOPs are counted from the first growth."""
    source = grown.growths[0].flops
    curve = [*(p for p in grown.curve if p[0] > source), grown.ends[-1]]
    x, y = zip(*(((flops - source) / TERA, loss) for flops, loss in curve), strict=True)
    axes.plot(
        x, y, "D--", color=GROWN, linewidth=1, markersize=7.5, markerfacecolor="white", markevery=[-1],
        zorder=4, label="grown, FLOPs counted from the first growth: the source was there already",
    )  # fmt: skip


def _names(axes: "Axes", lines: list[Line], gap: float) -> None:
    """Write the final losses beside the last points, at least ``gap`` apart."""
    grown, (best, *_), never = parted(lines)
    at = float("-inf")
    named = sorted(
        (
            (line.loss, color)
            for line, color in zip((grown, best, never), (GROWN, SCRATCH, NEVER), strict=True)
        )
    )
    for loss, color in named:
        at = max(loss, at + gap)
        axes.annotate(
            f"{loss:.3f}", (grown.flops / TERA, at), (9, 0), textcoords="offset points", va="center",
            color=color, weight="bold",
        )  # fmt: skip
