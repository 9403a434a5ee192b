"""Predict what a growth of a sharded model takes on every process: peak memory, bytes received, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.text import table

CLASSES = {"vocab": "embedding and head", "experts": "experts", "heads": "attention", "ffn": "feed-forward"}  # fmt: skip
REST = "norms and others"
MEMORY_BANDWIDTH = 2e12  # bytes per second that a GPU writes while it copies
LATENCY = 250e-6  # seconds of a collective between nodes
N_COLLECTIVES = 2  # of every tensor: a vote, and the gathering


@dataclass(frozen=True)
class ClassCost:
    """What one class of tensors takes on every process.

    Attributes:
        n_tensors: Number of tensors that are gathered: parameters and optimizer state.
        n_bytes_target: Bytes of the target shards that a process makes.
        n_bytes_received: Bytes that a process receives from the others.
        seconds: Predicted time.
    """

    n_tensors: int = 0
    n_bytes_target: int = 0
    n_bytes_received: int = 0
    seconds: float = 0.0

    def __add__(self, other: "ClassCost") -> "ClassCost":
        return ClassCost(
            self.n_tensors + other.n_tensors,
            self.n_bytes_target + other.n_bytes_target,
            self.n_bytes_received + other.n_bytes_received,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Cost:
    """What a growth takes on every process of ``fully_shard``, predicted; ``print`` it.

    Attributes:
        n_ranks: Number of processes.
        n_bytes_source: Bytes of the shards of a process before the growth, state included.
        n_bytes_target: Bytes of the shards of a process after the next step, in which the optimizer makes the state of new blocks.
        peak_bytes: Peak memory beyond the source's shards, by memory mode.
        classes: Costs by class of tensors.
    """

    n_ranks: int
    n_bytes_source: int
    n_bytes_target: int
    peak_bytes: dict[str, int]
    classes: dict[str, ClassCost]

    @property
    def total(self) -> ClassCost:
        """Sum over all classes."""
        return sum(self.classes.values(), ClassCost())

    def __str__(self) -> str:
        rows = [
            [name, c.n_tensors, _gb(c.n_bytes_target), _gb(c.n_bytes_received), f"{c.seconds:.3g}"]
            for name, c in (*self.classes.items(), ("all", self.total))
        ]
        peaks = ", ".join(
            f"{_gb(n)} GB with memory={mode!r}" for mode, n in self.peak_bytes.items()
        )
        return "\n\n".join(
            [
                f"Predicted for every one of {self.n_ranks} processes",
                table(["tensors", "gathered", "target GB", "received GB", "seconds"], rows),
                f"shards: {_gb(self.n_bytes_source)} GB before, {_gb(self.n_bytes_target)} GB after\n"
                f"peak beyond the shards before: {peaks}",
            ]
        )


def cost_of(
    plan: GrowthPlan,
    n_ranks: int,
    *,
    bandwidth: float,
    latency: float = LATENCY,
    memory_bandwidth: float = MEMORY_BANDWIDTH,
    itemsize: int = 4,
    n_states: int = 2,
    n_buffers: int = 1,
) -> Cost:
    """Predict what a growth takes where ``fully_shard`` shards the first axis of every tensor over processes.

    Every process gathers every source tensor, one at a time, and keeps its part of the targets. Gradients are left out: a growth between
    ``zero_grad`` and the backward pass has none.

    Args:
        plan: The plan.
        n_ranks: Number of processes.
        bandwidth: Bytes per second that a process receives.
        latency: Seconds of a collective without data.
        memory_bandwidth: Bytes per second that a process writes to memory.
        itemsize: Bytes of an element of a parameter, and of its optimizer state.
        n_states: Number of tensors of optimizer state per parameter; AdamW has 2.
        n_buffers: Number of whole tensors that the gathering of one takes: 1 with NCCL, 2 with gloo, which copies.

    Returns:
        The cost of a process; that of the first process, whose shards are largest.
    """

    def n_bytes(shape: tuple[int, ...], *, whole: bool = False) -> int:
        """Return the bytes of a tensor in a process, or in all; the first axis is sharded in equal parts, the last of which is smaller."""
        n_rows, *rest = shape or (1,)
        return (n_rows if whole else -(-n_rows // n_ranks)) * prod(rest) * itemsize

    def states(row: TensorRow) -> int:
        grows = row.state == "law" and plan.state != "drop" and row.source not in plan.counters
        return n_states if grows else 0

    live = [row for row in plan.tensors if not row.new]
    n_source = sum(n_bytes(plan.shapes(row)[0]) * (1 + n_states) for row in live)
    n_target = sum(n_bytes(plan.shapes(row)[1]) * (1 + n_states) for row in plan.tensors)
    by_source: dict[str, list[TensorRow]] = {}
    for row in plan.tensors:
        if plan.changes(row):
            by_source.setdefault(row.source, []).append(row)
    sets: list[_Set] = []
    for rows in by_source.values():
        shape, keys = plan.shapes(rows[0])[0], 1 + max(map(states, rows))
        whole, own = n_bytes(shape, whole=True), n_bytes(shape)
        n_wholes = 1 if rows[0].next_layer_source is None else 2
        n_read = n_wholes * (keys if any(row.constant is None for row in rows) else 0)
        made = sum(n_bytes(plan.shapes(row)[1]) * (1 + states(row)) for row in rows)
        received = n_read * (whole - own)
        seconds = received / bandwidth + n_read * N_COLLECTIVES * latency + made / memory_bandwidth
        replaced = keys * (not all(row.new for row in rows))
        sets.append(
            _Set(
                rows[0],
                made,
                replaced * own,
                replaced * whole,
                n_wholes * n_buffers * whole,
                ClassCost(n_read, made, received, seconds),
            )
        )
    sets.sort(key=lambda one: -one.n_whole)  # as they are grown
    classes: dict[str, ClassCost] = {}
    for one in sets:
        name = next((name for key, name in CLASSES.items() if key in " ".join(one.row.axes)), REST)
        classes[name] = classes.get(name, ClassCost()) + one.cost
    peaks = {mode: _peak(sets, mode) for mode in ("stage", "lean")}
    return Cost(n_ranks, n_source, n_target, peaks, classes)


class _Set(NamedTuple):
    """All targets of one source: bytes made and freed in a process, of the whole source, and of the whole tensors that are gathered."""

    row: TensorRow
    n_made: int
    n_freed: int
    n_whole: int
    n_gathered: int
    cost: ClassCost


def _peak(sets: Sequence[_Set], mode: str) -> int:
    now = peak = freed = 0
    for one in sets:
        now += one.n_made
        peak = max(peak, now + one.n_gathered)
        now -= freed
        freed = one.n_freed if mode == "lean" else 0
    return peak


def _gb(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:.3g}"
