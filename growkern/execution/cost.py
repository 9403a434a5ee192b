"""Predict what a growth of a sharded model takes on every process: peak memory, bytes received, seconds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import torch

from growkern.execution.rows import SourceReader
from growkern.execution.sets import changed_by_source
from growkern.execution.tiles import Tiler
from growkern.optimizer.state_rules import GRADIENT, SQUARE, VALUE, Law, Rule
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.text import table

CLASSES = {"vocab": "embedding and head", "experts": "experts", "heads": "attention", "ffn": "feed-forward"}  # fmt: skip
REST = "norms and others"
MEMORY_BANDWIDTH = 2e12  # bytes per second that a GPU writes while it copies
LATENCY = 250e-6  # seconds of a collective between nodes
HOST = 2e-3  # seconds of Python per grown tensor, bench/results/sharded-amd-epyc-2-cores.csv
N_COLLECTIVES = 2  # of every tensor: a vote, and the gathering


@dataclass(frozen=True)
class ClassCost:
    """What one class of tensors takes on every process.

    Attributes:
        n_tensors: Number of tensors that are read: parameters and optimizer state.
        n_bytes_target: Bytes of the target shards that a process makes.
        n_bytes_received: Bytes that a process receives from the others: of every tensor, those of the process that receives most.
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
                table(["tensors", "read", "target GB", "received GB", "seconds"], rows),
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
    host: float = HOST,
    itemsize: int = 4,
    n_states: int = 2,
    n_buffers: int = 1,
) -> Cost:
    """Predict what a growth takes where ``fully_shard`` shards the first axis of every tensor over processes.

    Every process gathers every source tensor, one at a time, or the rows that its part of the targets copies, where these are fewer bytes
    (``SourceReader``). Left out are gradients (a growth between ``zero_grad`` and the backward pass has none), and the 16 bytes per weight
    and process that measure its noise.

    Args:
        plan: The plan.
        n_ranks: Number of processes.
        bandwidth: Bytes per second that a process receives.
        latency: Seconds of a collective without data.
        memory_bandwidth: Bytes per second that a process writes to memory.
        host: Seconds in which the host prepares one grown tensor.
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
    reader, rules = SourceReader(plan, Tiler(plan)), _rules(plan.state, n_states)
    sets: list[_Set] = []
    for rows in changed_by_source(plan):
        shape, keys = plan.shapes(rows[0])[0], 1 + max(map(states, rows))
        whole, own = n_bytes(shape, whole=True), n_bytes(shape)
        made = sum(n_bytes(plan.shapes(row)[1]) * (1 + states(row)) for row in rows)
        copying = [row for row in rows if row.constant is None]
        readings = [
            _reading(reader, members, whole, own, n_ranks, n_buffers)
            for i, rule in enumerate(rules[:keys])
            if (members := [(row, rule) for row in copying if i <= states(row)])
        ]
        received = sum(one.n_received for one in readings)
        n_collectives = N_COLLECTIVES * sum(one.n_collectives for one in readings)
        n_made = sum(1 + states(row) for row in rows)
        seconds = received / bandwidth + n_collectives * latency + made / memory_bandwidth
        seconds += n_made * host
        replaced = keys * (not all(row.new for row in rows))
        sets.append(
            _Set(
                rows[0],
                made,
                replaced * own,
                replaced * whole,
                max((one.n_buffers for one in readings), default=0),
                ClassCost(len(readings), made, received, seconds),
            )
        )
    sets.sort(key=lambda one: -one.n_whole)  # as they are grown
    classes: dict[str, ClassCost] = {}
    for one in sets:
        name = next((name for key, name in CLASSES.items() if key in " ".join(one.row.axes)), REST)
        classes[name] = classes.get(name, ClassCost()) + one.cost
    peaks = {mode: _peak(sets, mode) for mode in ("stage", "lean")}
    return Cost(n_ranks, n_source, n_target, peaks, classes)


class _Reading(NamedTuple):
    """How one source tensor is read: bytes that the process receives that receives most, collectives, and bytes of buffers."""

    n_received: int
    n_collectives: int
    n_buffers: int


def _reading(
    reader: SourceReader, members: list[tuple[TensorRow, Rule]], whole: int, own: int, n_ranks: int, n_buffers: int
) -> _Reading:  # fmt: skip
    rows = reader.among(members, torch.empty(0), n_ranks)
    if rows is None:
        n_wholes = 1 if members[0][0].next_layer_source is None else 2
        return _Reading(n_wholes * (whole - own), n_wholes, n_wholes * n_buffers * whole)
    a_row, first = whole // sum(n for _, n in rows.held), rows.transfer(0)
    n_more = (len(first.sent) + len(first.taken)) * a_row
    return _Reading(max(rows.n_received) * a_row, int(first.moves), whole + n_more)


def _rules(state: str, n_states: int) -> list[Rule]:
    """Return the rules of a weight and of its state, first a first moment, then second moments."""
    law = Law({str(i): SQUARE if i else GRADIENT for i in range(n_states)}).grown(state)
    return [VALUE, *(rule for rule in law.values() if rule is not None)]


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
