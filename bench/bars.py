"""The bars: growkern's promises of speed and memory, compared with the rows of a run."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from bench.baselines import DOUBLE, REPEAT, SELECT
from bench.bench_adamw import OURS, SMALL
from bench.bench_models import CASES, GPT2_WIDE, HOST, HOST_124M, HOST_200, HOST_XL, XL_WIDE
from bench.harness import LARGE, ROOF, Row, number

RUN_MAPS = ("x1.5 adam", "x2 adam", "x3 adam")
RANDOM_MAPS = ("random x2 adam",)
N_LAYERS = {name: int(str(CASES[name].config["n_layer"])) for name in (HOST_XL, HOST_200)}
NOISES = ("noise=1", "noise=0")  # twin noise of copies


@dataclass(frozen=True, slots=True)
class Bar:
    """One promise.

    Attributes:
        text: The promise, as text.
        limit: Bound on the figure.
        unit: Unit of the figure.
        measure: Function from rows, backend and noise to the figures of all cases of the promise; the worst figure counts.
        at_most: True if ``limit`` is an upper bound, False if ``limit`` is a lower bound.
        gpu: True if the promise is for GPUs only.
    """

    text: str
    limit: float
    unit: str
    measure: Callable[[Sequence[Row], str, str], Iterator[float]]
    at_most: bool = False
    gpu: bool = False

    def worst(self, rows: Sequence[Row], backend: str, noise: str) -> float | None:
        """Return the worst figure; None without a measurement."""
        figures = list(self.measure(rows, backend, noise))
        return (max if self.at_most else min)(figures) if figures else None

    def held(self, figure: float) -> bool:
        """Return True if a figure keeps the promise."""
        return figure <= self.limit if self.at_most else figure >= self.limit


def find(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Return the rows with these column values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def times(row: Row, other: Row, *, per_byte: bool = False) -> float:
    """Return the speedup of a row over another row."""
    speed = number(other["p50_ms"]) / number(row["p50_ms"])
    return speed * number(row["n_bytes"]) / number(other["n_bytes"]) if per_byte else speed


def _model(rows: Sequence[Row], case: str, backend: str, phase: str = "cold") -> list[Row]:
    return find(rows, op="model", case=case, backend=backend, phase=phase)


def _model_roof(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, GPT2_WIDE, f"{backend} {noise}"):
        yield number(row["roof_percent"])


def _default(rows: Sequence[Row], backend: str, noise: str, phase: str) -> list[Row]:
    """Rows of the default growth in a process of its own, once: noise is the default's."""
    return _model(rows, GPT2_WIDE, f"{backend} default", phase) if noise == NOISES[1] else []


def _in_own_process(
    baseline: str, phase: str
) -> Callable[[Sequence[Row], str, str], Iterator[float]]:
    def measure(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
        for row in _default(rows, backend, noise, phase):
            yield from (times(row, other) for other in _model(rows, GPT2_WIDE, baseline, phase))

    return measure


def _of_first_roof(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _default(rows, backend, noise, "first"):
        yield number(row["roof_percent"])


def _busy_over_idle(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _default(rows, backend, noise, "busy"):
        yield from (1 / times(row, other) for other in _default(rows, backend, noise, "first"))


def _over_repeat(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, GPT2_WIDE, f"{backend} {noise}"):
        for other in _model(rows, GPT2_WIDE, REPEAT):
            yield times(row, other, per_byte=True)


def _host(case: str) -> Callable[[Sequence[Row], str, str], Iterator[float]]:
    def measure(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
        for row in _model(rows, case, HOST, "warm") if noise == NOISES[1] else ():
            yield number(row["p50_ms"])

    return measure


def _host_again(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, HOST_XL, HOST, "again") if noise == NOISES[1] else ():
        yield from (1 / times(row, first) for first in _model(rows, HOST_XL, HOST, "warm"))


def _host_per_layer(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, HOST_200, HOST, "warm") if noise == NOISES[1] else ():
        for other in _model(rows, HOST_XL, HOST, "warm"):
            yield N_LAYERS[HOST_XL] / N_LAYERS[HOST_200] / times(row, other)


def _peak(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, GPT2_WIDE, f"{backend} {noise}"):
        yield 100 * abs(number(row["peak_bytes"]) / number(row["promised_bytes"]) - 1)


def _large(rows: Sequence[Row], cases: Sequence[str], backend: str, noise: str) -> list[Row]:
    names = {f"{case} {noise}" for case in cases}
    warm_rows = find(rows, op="expand", backend=backend, phase="warm")
    return [r for r in warm_rows if r["case"] in names and number(r["tensor_bytes"]) >= LARGE]


def _roof(cases: Sequence[str]) -> Callable[[Sequence[Row], str, str], Iterator[float]]:
    def measure(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
        yield from (number(r["roof_percent"]) for r in _large(rows, cases, backend, noise))

    return measure


def _over(baseline: str) -> Callable[[Sequence[Row], str, str], Iterator[float]]:
    def measure(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
        for row in _large(rows, RUN_MAPS, backend, noise):
            same = {key: row[key] for key in ("op", "case", "dtype", "tensor_bytes")}
            yield from (times(row, other) for other in find(rows, backend=baseline, **same))

    return measure


def _over_copy(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    for row in _model(rows, XL_WIDE, f"{backend} {noise}"):
        for other in _model(rows, XL_WIDE, ROOF):
            if row["dtype"] == other["dtype"]:
                yield 1 / times(row, other)


def _first(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
    default = f"{backend} default"
    for row in find(rows, op="model", backend=default, phase="first") if noise == NOISES[1] else ():
        yield number(row["p50_ms"]) / 1e3


def _adamw(baseline: str, ours: str = OURS) -> Callable[[Sequence[Row], str, str], Iterator[float]]:
    def measure(rows: Sequence[Row], backend: str, noise: str) -> Iterator[float]:
        for row in find(rows, op="adamw", backend=ours) if noise == NOISES[1] else ():
            same = {key: row[key] for key in ("op", "case", "dtype")}
            if not str(row["case"]).endswith("slices") and (row["case"] in SMALL) == (ours == HOST):
                yield from (times(row, other) for other in find(rows, backend=baseline, **same))

    return measure


FIRST = f"{GPT2_WIDE}, first call"
BARS = (
    Bar(f"{FIRST}: of a first copy_ of the same bytes", 60, "%", _of_first_roof),
    Bar(f"{FIRST}: over two {SELECT}", 3, "x", _in_own_process(SELECT, "first")),
    Bar(f"{FIRST}: over {DOUBLE}", 2, "x", _in_own_process(DOUBLE, "first")),
    Bar(f"{FIRST}, busy cores: over two {SELECT}", 2, "x", _in_own_process(SELECT, "busy")),
    Bar(f"{FIRST}, busy cores: over its idle time", 4, "x", _busy_over_idle, at_most=True),
    Bar(f"{GPT2_WIDE}: of a cold copy_ of the same bytes", 60, "%", _model_roof),
    Bar(f"{GPT2_WIDE}: over {REPEAT}, per byte", 8, "x", _over_repeat),
    Bar(f"{GPT2_WIDE}: peak memory off the promise", 2, "%", _peak, at_most=True),
    Bar(f"{HOST_124M}: on the host", 10, "ms", _host(HOST_124M), at_most=True),
    Bar(f"{HOST_XL}: on the host", 90, "ms", _host(HOST_XL), at_most=True),
    Bar(
        f"{HOST_200}: on the host, per layer, over {HOST_XL}",
        1.2,
        "x",
        _host_per_layer,
        at_most=True,
    ),
    Bar(
        "next growth of a model: on the host, over its first",
        1.2,
        "x",
        _host_again,
        at_most=True,
    ),
    Bar("growkern.optim.AdamW without slices: over torch's foreach", 1, "x", _adamw("foreach")),
    Bar(
        "growkern.optim.AdamW without slices: over torch's fused", 1, "x", _adamw("fused"), gpu=True
    ),
    Bar("growkern.optim.AdamW on the host: over torch's fused", 1, "x", _adamw("fused", HOST)),
    Bar("run maps, >= 64 MB, Adam: of the roof", 90, "%", _roof(RUN_MAPS), gpu=True),
    Bar("random maps, >= 64 MB, Adam: of the roof", 60, "%", _roof(RANDOM_MAPS), gpu=True),
    Bar(f"{XL_WIDE}: time over that of a copy", 1.25, "x", _over_copy, at_most=True, gpu=True),
    Bar("run maps, >= 64 MB, Adam: over index_select", 5, "x", _over("index_select"), gpu=True),
    Bar("run maps, >= 64 MB, Adam: over torch.compile", 1.5, "x", _over("torch.compile"), gpu=True),
    Bar("first call of a process, every model", 3, "s", _first, at_most=True, gpu=True),
)


def bars(rows: Sequence[Row], *, gpu: bool) -> Table:
    """Return a table of the bars with the measured figures of copies, with and without twin noise."""
    drawn = Table(title="bars (the worst case counts)", title_justify="left")
    drawn.add_column("promise")
    for name in ("bar", *NOISES):
        drawn.add_column(name, justify="right", no_wrap=True)
    backend = "triton" if gpu else "torch"
    for bar in BARS:
        if bar.gpu and not gpu:
            continue
        cells: list[str] = []
        for noise in NOISES:
            figure = bar.worst(rows, backend, noise)
            if figure is None:
                cells.append("not measured")
                continue
            color = "green" if bar.held(figure) else "red"
            cells.append(f"[{color}]{figure:.3g} {bar.unit}[/{color}]")
        sign = "<=" if bar.at_most else ">="
        drawn.add_row(bar.text, f"{sign} {bar.limit:g} {bar.unit}", *cells)
    return drawn
