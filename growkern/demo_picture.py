"""The picture of the demo: validation loss over training FLOPs, of trunks and of their annealed ends."""

# pyright: reportUnknownMemberType=false
from pathlib import Path
from typing import TYPE_CHECKING

from growkern.demo_run import Line, parted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROWN, SCRATCH, NEVER, GREY = "#0969da", "#9a6700", "#1a7f37", "#57606a"
TERA = 1e12


def draw(lines: list[Line], said: str, path: Path) -> None:
    """Draw every run, with the first line of the verdict as the title.

    Args:
        lines: The grown run, the runs from scratch, and the source that never grows; or the grown run alone.
        said: The verdict.
        path: Where the PNG goes.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 6), dpi=150, layout="tight")
    axes = figure.add_subplot()
    grown = lines[0]
    _line(axes, grown, GROWN, f"grown: {grown.n_params / 1e3:.0f} k parameters at the end")
    if len(lines) > 1:
        _, (best, *others), never = parted(lines)
        for line in others:
            _line(axes, line, SCRATCH, "", alpha=0.3)
        _line(axes, best, SCRATCH, f"{best.name}, the best of {len(others) + 1} (the others faint)")
        _line(axes, never, NEVER, f"never grows: {never.n_params / 1e3:.0f} k parameters")
        source = grown.growths[0].flops
        at = (grown.flops - source) / TERA
        axes.plot(at, grown.loss, "D", color=GROWN, markerfacecolor="white", markersize=7, zorder=4)
        axes.annotate(
            "grown, if the source\nwas there already", (at, grown.loss), (-8, -26), color=GROWN,
            textcoords="offset points", ha="right", fontsize=9,
        )  # fmt: skip
    for growth in grown.growths:
        axes.axvline(growth.flops / TERA, color=GREY, linestyle=":", linewidth=1, zorder=0)
        axes.annotate(
            growth.label, (growth.flops / TERA, 0), (5, 8), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=GREY,
        )  # fmt: skip
    low = min(loss for line in lines for _, loss in [*line.curve, *line.ends])
    late = [loss for line in lines for flops, loss in line.curve if flops >= line.flops / 6]
    high = low + 1.25 * (max(late) - low) + 1e-3  # the first fall would flatten the rest
    axes.set(
        xlabel="training compute (10¹² FLOPs)", ylabel="validation loss (nats per byte)",
        xlim=(0, 1.1 * grown.flops / TERA), ylim=(low - 0.15 * (high - low), high),
    )  # fmt: skip
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper right", framealpha=1, edgecolor="white")
    title, *below = said.split("\n")
    axes.set_title(title, loc="left", weight="bold", size=12.5, pad=14 + 13 * len(below))
    axes.annotate(
        "\n".join(below), (0, 1), (0, 8), xycoords="axes fraction", textcoords="offset points",
        color=GREY, fontsize=9,
    )  # fmt: skip
    figure.savefig(path)


def _line(axes: "Axes", line: Line, color: str, label: str, alpha: float = 1.0) -> None:
    """A trunk as a thin line, its annealed branches as dashes that end in points, the last one with its loss."""
    x, y = zip(*((flops / TERA, loss) for flops, loss in line.curve), strict=True)
    axes.plot(x, y, "-", color=color, linewidth=1.2, alpha=0.6 * alpha)
    for flops, loss in line.ends:
        start = min(line.curve, key=lambda p: abs(p[0] - 0.75 * flops))
        axes.plot(
            [start[0] / TERA, flops / TERA],
            [start[1], loss],
            "--",
            color=color,
            linewidth=1.2,
            alpha=alpha,
        )
    x, y = zip(*((flops / TERA, loss) for flops, loss in line.ends), strict=True)
    axes.plot(x, y, "o", color=color, markersize=6, alpha=alpha, label=label or None)
    if label:
        axes.annotate(
            f"{line.loss:.3f}", (x[-1], y[-1]), (8, 0), textcoords="offset points", va="center",
            color=color, weight="bold",
        )  # fmt: skip
