"""What share of a copy's speed will the expand kernel reach on a GPU? A model from its instruction counts: ``python -m bench.predicted``.

No GPU has measured this yet. The counts are of the code for sm_90 (triton 3.7.1, 8 elements per thread and tile), block by block
of its control flow, in instructions of a thread. A tile takes the longest of three times, and the share is that of the copy's time:

- *issue*: an SM issues 128 lanes per cycle, at best 85 % of the time;
- *integers*: draws of noise run on units of half the width, so that each of their instructions counts twice;
- *latency*: 1024 threads wait for the loads of a tile and for the writes of each copy, one after the other.

The MI300X is taken to execute as many instructions as sm_90, on half the lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from bench.harness import LARGE, Row, number, size_text


@dataclass(frozen=True)
class Device:
    """A GPU: multiprocessors, clock in GHz, lanes per cycle, bytes per second, and the share of them that a copy reaches."""

    n_sms: int
    ghz: float
    lanes: int
    bandwidth: float
    reached: float

    @property
    def roof(self) -> float:
        """Bytes per cycle and multiprocessor of a copy."""
        return self.bandwidth * self.reached / self.n_sms / self.ghz / 1e9


@dataclass(frozen=True)
class Counts:
    """Instructions of a thread.

    Attributes:
        n_bytes: Bytes of an element.
        program: Once per program, without the search for its piece.
        tile: Per tile.
        row: Per copy of the rows, without and with arithmetic.
        copy: Per copy that only moves, scales, or scales and adds noise.
        draw: Per draw of noise, which twins along the columns share.
        n_integer: Cycles of the integer units per copy with noise, and per draw.
    """

    n_bytes: int
    program: int
    tile: int
    row: tuple[int, int]
    copy: tuple[int, int, int]
    draw: int
    n_integer: tuple[int, int]


DEVICES = {
    "A100": Device(108, 1.41, 128, 2.04e12, 0.90),
    "H100": Device(132, 1.755, 128, 3.35e12, 0.91),
    "H200": Device(132, 1.755, 128, 4.8e12, 0.91),
    "B200": Device(148, 1.85, 128, 8.0e12, 0.90),
    "MI300X": Device(304, 2.1, 64, 5.3e12, 0.85),
}
COUNTS = {
    "fp32": Counts(4, 64, 53, (37, 56), (26, 78, 121), 193, (90, 300)),
    "bf16": Counts(2, 68, 54, (35, 48), (21, 73, 111), 219, (80, 300)),
}
N_INSTRUCTIONS = {"fp32": 1528, "bf16": 1552}  # of the whole kernels that were counted
MOVED, SCALED, NOISY = range(3)  # kinds of copies
FAR = 0.2  # a measurement that is further off its prediction is an error of one of them
N_TILES, N_ELEMENTS, STEP, N_STEPS = 4, 8, 13, 11  # tiles, elements of a thread; the search
LATENCY = dict(launch=250, step=60, head=250, load=750, row=100, copy=(100, 170, 420))  # cycles


def share(counts: Counts, kind: int, n_rows: int, n_cols: int, device: Device) -> float:
    """Return the share of a copy's speed that a tile with ``n_rows`` x ``n_cols`` copies reaches."""
    n, draws = n_rows * n_cols, n_rows if kind == NOISY else 0
    rest = (
        (counts.program + STEP * N_STEPS) / N_TILES
        + counts.tile
        + n_rows * counts.row[kind > MOVED]
    )
    issued = rest + n * counts.copy[kind] + draws * counts.draw
    integer = 0.9 * rest + n * (counts.n_integer[0] if kind == NOISY else 0.9 * counts.copy[kind])
    integer += draws * counts.n_integer[1]
    waited = (LATENCY["launch"] + LATENCY["head"] + LATENCY["step"] * N_STEPS) / N_TILES  # pyright: ignore
    waited += LATENCY["load"] + n_rows * LATENCY["row"] + n * LATENCY["copy"][kind]  # pyright: ignore
    moved = N_ELEMENTS * counts.n_bytes * (1 + n)
    rates = (
        moved * device.lanes * 0.85 / issued,
        moved * device.lanes * 0.9 / integer,
        moved * 1024 / waited,
    )
    # times that are near each other add up
    return (1 + (device.roof / min(rates)) ** 4) ** -0.25


def of_adam(dtype: str, kind: int, device: Device) -> float:
    """Return the share of a weight that doubles both its axes, with its float32 moments: their times add."""
    weight, moment = COUNTS[dtype].n_bytes, 2 * COUNTS["fp32"].n_bytes
    times = weight / share(COUNTS[dtype], kind, 2, 2, device) + moment / share(
        COUNTS["fp32"], SCALED, 2, 2, device
    )
    return (weight + moment) / times


def table() -> Table:
    """Return the predictions."""
    drawn = Table(
        title="predicted percent of a copy, weights to 2x with Adam", title_justify="left"
    )
    drawn.add_column("weights")
    for name in DEVICES:
        drawn.add_column(name, justify="right")
    for dtype in COUNTS:
        for noise, kind in ((0, SCALED), (1, NOISY)):
            cells = (f"{100 * of_adam(dtype, kind, device):.0f} %" for device in DEVICES.values())
            drawn.add_row(f"{dtype}, noise={noise}", *cells)
    return drawn


def beside(rows: Sequence[Row], name: str) -> Table | None:
    """Return the measured shares of large tensors beside the predicted ones; None for a device or rows that the model does not know.

    Args:
        rows: Rows of a run.
        name: Name of the device, as in "NVIDIA H200".
    """
    device = next((device for key, device in DEVICES.items() if key in name), None)
    drawn = Table(title=f"percent of a copy, predicted for the {name}", title_justify="left")
    for column in ("case", "size", "dtype", "measured", "predicted"):
        drawn.add_column(column, justify="right" if column in ("measured", "predicted") else "left")
    for row in rows if device else ():
        kind = {"x2 adam noise=0": SCALED, "x2 adam noise=1": NOISY}.get(str(row["case"]))
        size, dtype = number(row["tensor_bytes"]), str(row["dtype"])
        line = row["op"], row["backend"], row["phase"], dtype in COUNTS
        if device is None or kind is None or line != ("expand", "triton", "warm", True) or size < LARGE:  # fmt: skip
            continue
        measured, predicted = number(row["roof_percent"]), 100 * of_adam(dtype, kind, device)
        off = "" if abs(measured / predicted - 1) <= FAR else "  [red]find out why[/red]"
        cells = (
            str(row["case"]),
            size_text(size),
            dtype,
            f"{measured:.0f} %",
            f"{predicted:.0f} %{off}",
        )
        drawn.add_row(*cells)
    return drawn if drawn.row_count else None


if __name__ == "__main__":
    Console().print(table())
