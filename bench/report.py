"""Report of rows: a table and a picture."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.table import Table

from bench.harness import ROOF, Row, machine, number, size_text, slug


def table(rows: Sequence[Row]) -> Table:
    """Return a table of rows; the title names device, versions and commit."""
    at = machine()
    title = f"{at['device']}, torch {at['torch']}, triton {at['triton'] or '-'}, {at['commit']}"
    drawn = Table(title=title, title_justify="left")
    for name in ("case", "size", "dtype", "backend", "phase"):
        drawn.add_column(name, no_wrap=True)
    for name in ("ms", "GB/s", "% roof"):  # medians; the file has more
        drawn.add_column(name, justify="right", no_wrap=True)
    last: tuple[object, ...] = ()
    for r in rows:
        case = (r["case"], r["tensor_bytes"], r["dtype"])
        if last and case != last:
            drawn.add_section()
        names = [str(r["case"]), size_text(number(r["tensor_bytes"])), str(r["dtype"])]
        times = [f"{number(r[name]):.3g}" for name in ("p50_ms", "gb_s")]
        percent = f"{number(r['roof_percent']):.0f}" if r["roof_percent"] != "" else "-"
        shown = names if case != last else ["", "", ""]
        drawn.add_row(*shown, str(r["backend"]), str(r["phase"]), *times, percent)
        last = case
    return drawn


def picture(rows: Sequence[Row], folder: Path) -> Path:
    """Draw GB/s over the size of a tensor, one panel per case that has several sizes; the roof is the dashed line.

    Args:
        rows: Rows of one run.
        folder: Folder of ``<device>.png``.
    """
    panels: dict[tuple[str, str], list[Row]] = {}
    for r in rows:
        if r["op"] == "expand":
            panels.setdefault((str(r["case"]), str(r["dtype"])), []).append(r)
    shown = {k: v for k, v in panels.items() if len({r["tensor_bytes"] for r in v}) > 1} or panels
    across = min(3, max(1, len(shown)))
    down = -(-max(1, len(shown)) // across)
    figure = Figure(figsize=(5.2 * across, 3.8 * down), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).flat
    for axis in axes:
        axis.set_visible(False)
    for axis, ((case, dtype), members) in zip(figure.axes, shown.items(), strict=False):
        axis.set_visible(True)
        for (backend, phase), points in _lines(members):
            is_roof = backend == ROOF
            axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                color="black" if is_roof else None,
                linestyle="--" if is_roof else "-",
                alpha=0.5 if is_roof and phase == "cold" else 1,
                label=f"{'roof, copy_' if is_roof else backend}, {phase}",
            )
        axis.set(title=f"{case}, {dtype}", xlabel="target tensor (bytes)", ylabel="GB/s")
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle(f"{machine()['device']}, {machine()['commit']}", fontsize=9)
    path = folder / f"{slug(machine()['device'])}.png"
    figure.savefig(path, dpi=110)
    return path


def _lines(rows: Sequence[Row]) -> Iterator[tuple[tuple[str, str], list[tuple[float, float]]]]:
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in rows:
        line = lines.setdefault((str(r["backend"]), str(r["phase"])), [])
        line.append((number(r["tensor_bytes"]), number(r["gb_s"])))
    for key, points in lines.items():
        yield key, sorted(points)
