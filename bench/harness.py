"""Tools of all benches: time, peak memory, the roof, the machine, the file of rows.

A row holds the time of one line (a backend or a baseline) of one case in one phase:

- *first*: the first call of a fresh process, compilation included;
- *cold*: the call allocates its outputs, so the time includes the process's own page faults;
- *warm*: the call writes to memory that an earlier call has written;
- *busy*: as *first*, while one other process spins on every core.

The roof is a ``copy_`` of the same bytes, measured in the same run and phase; every row states its throughput in percent of the roof.
"""

import csv
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from ctypes import CDLL
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import torch
from rich.console import Console
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
LARGE = 60 << 20  # least bytes of a large weight; a nominal 64 MiB is rounded down
ROOF = "copy_"
QUANTILES = {"p20_ms": 0.2, "p50_ms": 0.5, "p80_ms": 0.8}
COLUMNS = (
    "op", "case", "tensor_bytes", "dtype", "backend", "phase", "n_runs", *QUANTILES, "n_bytes", "gb_s", "roof_percent",
    "peak_bytes", "promised_bytes", "commit", "date", "device", "driver", "torch", "triton",
)  # fmt: skip
FLUSH_BYTES = 256 << 20  # larger than any L2 cache
GPU_BUFFER = 4 << 30  # bytes; the roof of a whole model is copied in parts of this size
SLEEP_CYCLES = 2_000_000  # about a millisecond on a GPU, in which the host prepares a launch
PAGE = 4096
Row = dict[str, object]
EVENT_PAIR: list[torch.cuda.Event] = []  # start event of the current interval


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def wall(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes on host and device together."""
    synchronize()
    start = perf_counter()
    call()
    synchronize()
    return perf_counter() - start


@contextmanager
def spinning() -> Generator[None]:
    """Keep every core of this machine busy with a process of its own until the block ends."""
    command = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(command) for _ in os.sched_getaffinity(0)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def device_timer() -> Callable[[], float]:
    """Return a clock in seconds, to be called in pairs: CUDA events on a GPU, ``perf_counter`` elsewhere."""
    if not torch.cuda.is_available():
        return perf_counter
    total = [0.0]

    def clock() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        if not EVENT_PAIR:
            EVENT_PAIR.append(event)
        else:
            event.synchronize()
            total[0] += EVENT_PAIR.pop().elapsed_time(event) / 1e3
        return total[0]

    return clock


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def trim() -> None:
    """Return freed memory to the system, so that pages are cold and resident memory counts live allocations only."""
    if give_back := getattr(CDLL(None), "malloc_trim", None):  # glibc only
        give_back(0)


def flush() -> None:
    """Make runs comparable: flush the GPU's cache and keep the GPU busy while the host prepares a launch; on a CPU, ``trim``."""
    EVENT_PAIR.clear()  # left by a call that failed
    if torch.cuda.is_available():
        _flushed().zero_()
        torch.cuda._sleep(SLEEP_CYCLES)  # pyright: ignore[reportPrivateUsage]
    else:
        trim()


def available_bytes() -> int:
    """Return the free memory of the GPU, or of the machine without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)


def touch(n_bytes: int) -> None:
    """Write to as much memory as the next call needs, in pages of either size, and free the memory; do nothing on a GPU.

    On a virtual machine the host backs guest memory at its first touch, at several times the cost of a page fault, and reclaims
    the memory some seconds after it is freed. Call ``touch`` right before timing, so that a cold time includes the process's own
    page faults only.
    """
    if not torch.cuda.is_available():
        n = min(n_bytes, available_bytes() * 3 // 8)
        small = torch.empty(n, dtype=torch.uint8)
        both = small, torch.empty(n, dtype=small.dtype, device=small.device)
        for pages in both:
            pages[::PAGE].fill_(1)


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def measured(call: Callable[[], object], room: int = 0) -> tuple[float, int]:
    """Touch ``room`` bytes, then run a call once; return seconds, and peak bytes above the memory at the start of the call.

    The peak is of device memory on a GPU, and of resident memory elsewhere.
    """
    trim()
    touch(room)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        start = _status_bytes("VmRSS")
    seconds = wall(call)
    peak = torch.cuda.max_memory_allocated() if cuda else _status_bytes("VmHWM")
    return seconds, max(0, peak - start)


def roof(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> Callable[[], object]:
    """Return a call that copies: it reads and writes the same number of bytes and computes nothing.

    On a GPU, where reading and writing cost the same, half of all bytes are copied at once, so that launches and caches do not
    count (``gpu_roof``). On a CPU every source is copied into each source-sized part of its target.
    """
    if targets[0].is_cuda:
        return gpu_roof(n_bytes(sources) + n_bytes(targets))

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            flat, into = source.view(-1), target.view(-1)
            for part in into.split(max(1, flat.numel())):
                part.copy_(flat[: part.numel()])

    return copy


def gpu_roof(moved: int) -> Callable[[], object]:
    """Return a call that reads and writes ``moved`` bytes in total, by ``copy_`` from one buffer to another."""
    n = moved // 2
    a, b = (torch.empty(min(n, GPU_BUFFER), dtype=torch.uint8, device="cuda") for _ in range(2))

    def copy() -> None:
        for start in range(0, n, GPU_BUFFER):
            b[: n - start].copy_(a[: n - start])

    return copy


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(t.numel() * t.element_size() for t in tensors)


@cache
def machine() -> dict[str, str]:
    """Return the columns that describe the machine and the code."""
    cuda = torch.cuda.is_available()
    return {
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "device": torch.cuda.get_device_name() if cuda else _cpu(),
        "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": _version("triton"),
    }


def _cpu() -> str:
    with open("/proc/cpuinfo") as lines:
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} {len(os.sched_getaffinity(0))} cores"


def _commit() -> str:
    """Return the commit, with ``+dirty`` if files other than results differ from the commit."""
    commit = _said("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    changed = _said("git", "status", "--porcelain", "--", ".", ":!bench/results")
    return f"{commit}+dirty" if changed else commit


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the q-quantile of samples, linear between neighbors."""
    ordered = sorted(samples)
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def row(
    op: str,
    case: str,
    dtype: str,
    backend: str,
    phase: str,
    seconds: Sequence[float],
    *,
    moved: int,
    peak: int,
    tensor_bytes: int,
    promised: int | None = None,
) -> Row:
    """Make a row from the measurements of a line.

    Args:
        op: Name of the bench.
        case: Name of the case.
        dtype: Dtype of weights, and of state if different.
        backend: ``"torch"``, ``"triton"``, or the name of a baseline; ``"copy_"`` is the roof.
        phase: ``"first"``, ``"cold"`` or ``"warm"``.
        seconds: One sample per run.
        moved: Bytes of the sources and of the targets, each counted once.
        peak: Peak bytes above the memory before the call.
        tensor_bytes: Size of the case: bytes of the target's weight, or all bytes that a whole model's growth writes.
        promised: Peak bytes that growkern's report states; None for a line without a report.

    Returns:
        A row with every column; ``with_roof`` fills in the percentage.
    """
    times: Row = {name: quantile(seconds, q) * 1e3 for name, q in QUANTILES.items()}
    values: Row = {
        "op": op,
        "case": case,
        "tensor_bytes": tensor_bytes,
        "dtype": dtype,
        "backend": backend,
        "phase": phase,
        "n_runs": len(seconds),
        "n_bytes": moved,
        "gb_s": moved / quantile(seconds, 0.5) / 1e9,
        "roof_percent": "",
        "peak_bytes": peak,
        "promised_bytes": "" if promised is None else promised,
    }
    return {name: (values | times | machine())[name] for name in COLUMNS}


def number(cell: object) -> float:
    """Convert a cell, read from a file or just measured, to a number."""
    return float(str(cell))


def with_roof(rows: Sequence[Row]) -> list[Row]:
    """Fill in the GB/s of every row in percent of the roof of the same case and phase; of the cold roof where no first roof exists."""
    key = ("op", "case", "tensor_bytes", "dtype")

    def at(row: Row, phase: object) -> tuple[object, ...]:
        return (*(row[name] for name in key), phase)

    roofs = {at(r, r["phase"]): number(r["gb_s"]) for r in rows if r["backend"] == ROOF}
    filled: list[Row] = []
    for r in rows:
        cold = roofs.get(at(r, "cold")) if r["phase"] == "first" else None
        limit = roofs.get(at(r, r["phase"]), cold)
        filled.append(r | {"roof_percent": 100 * number(r["gb_s"]) / limit if limit else ""})
    return filled


def slug(name: str) -> str:
    """Convert a device name to a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def append(rows: Sequence[Row], folder: Path) -> Path:
    """Append rows to ``<device>.csv``; the header is written once, with the file.

    Raises:
        ValueError: The existing file has other columns.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(machine()['device'])}.csv"
    fresh = not path.exists() or not path.stat().st_size
    if not fresh and path.read_text().splitlines()[0] != ",".join(COLUMNS):
        raise ValueError(f"{path} has other columns than {', '.join(COLUMNS)}; move it away first.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows({k: cell(v) for k, v in r.items()} for r in rows)
    return path


def cell(value: object) -> object:
    """Format a value for the file of rows: floats with five digits."""
    return f"{value:.5g}" if isinstance(value, float) else value


def size_text(n: float) -> str:
    """Format a number of bytes."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n:.0f} B"


def follow(module: Sequence[str], on_line: Callable[[str], None], **env: str) -> tuple[int, str]:
    """Run a Python module in a new process from the repository's root, and call ``on_line`` for every output line.

    Returns:
        The exit status, and the last output lines.
    """
    tail: list[str] = []
    inherited: Mapping[str, str] = {  # under xdist, pytest-benchmark would not time anything
        k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")
    }
    process = subprocess.Popen(
        [sys.executable, "-m", *module],
        cwd=ROOT,
        env={**inherited, "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None, "it was asked for"
    with process.stdout as lines:
        for line in lines:
            tail = [*tail, line.rstrip()][-40:]
            on_line(line.rstrip())
    return process.wait(), "\n".join(tail)


def record(path: Path, columns: Sequence[str], rows: Iterable[Row], n_shown: int) -> None:
    """Write rows to a new CSV file as they come, and print the first ``n_shown`` columns of each, and at last the path."""
    console = Console(width=140)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            shown = {key: cell(value) for key, value in row.items()}
            writer.writerow(shown)
            file.flush()
            console.print("  ".join(str(shown[key]) for key in columns[:n_shown]), highlight=False)
    console.print(path, highlight=False)
