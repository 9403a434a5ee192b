"""Sources that are sharded: gathered whole, or by the rows that each process reads, which every process knows from the plan.

A process that holds rows 0 to 9 of a target reads the source rows that these copy, and not the whole source.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from growkern.distributed.gather import Gather, Transfer, shared, transfer_of
from growkern.distributed.shards import Range, is_sharded, mesh_dim_of_rows, parts_of, placement
from growkern.execution.measures import KernelOf
from growkern.execution.tiles import MEAN, Job, Tiler
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.planning.index_map import PAD, IndexMap

Named = tuple[TensorRow, str, Tensor, Rule]  # row, state key, tensor, and rule


@dataclass(frozen=True)
class Rows:
    """Rows of a source that every process reads for its part of the targets; the first axis is sharded in equal parts.

    Attributes:
        read: Ranges of rows that each process reads, in order.
        held: Range of rows that each process holds.
    """

    read: tuple[tuple[Range, ...], ...]
    held: tuple[Range, ...]
    _transfers: dict[int, Transfer] = field(default_factory=dict[int, Transfer])

    @cached_property
    def n_received(self) -> tuple[int, ...]:
        """Number of rows that each process reads and does not hold."""
        pairs = zip(self.read, self.held, strict=True)
        return tuple(_n(read) - _n(shared(read, held)) for read, held in pairs)

    def transfer(self, process: int) -> Transfer:
        """Return the rows that one process sends and receives, computed once."""
        if process not in self._transfers:
            moves = max(self.n_received) > 0
            self._transfers[process] = transfer_of(process, self.read, self.held, moves=moves)
        return self._transfers[process]

    @property
    def pays(self) -> bool:
        """True when fewer rows are received than by gathering the whole, in the process that receives most."""
        return max(self.n_received) < _n(self.held) - min(n for _, n in self.held)


class SourceReader:
    """Chooses between all rows and those that are read, source by source; the choice is the same in every process.

    Attributes:
        means: Mean of all copied elements by target name and state key, where it is known (``measure``).
    """

    def __init__(self, plan: GrowthPlan, tiler: Tiler) -> None:
        self._plan, self._tiler = plan, tiler
        self._known: dict[tuple[frozenset[IndexMap], int], Rows] = {}
        self._broken = set[str]()  # weights whose noise scale is not finite
        self.means: dict[tuple[str, str], Tensor] = {}

    def of(self, members: Iterable[tuple[TensorRow, Rule]], t: Any) -> Rows | None:
        """Return the rows of a sharded tensor that are read for its targets; None if it is gathered whole.

        Args:
            members: Rows of the plan with this source, and the rule of the tensor.
            t: The tensor.
        """
        dim = mesh_dim_of_rows(t)
        return None if dim is None else self.among(members, t, t.device_mesh.size(dim))

    def among(
        self, members: Iterable[tuple[TensorRow, Rule]], like: Tensor, n_parts: int
    ) -> Rows | None:
        """Return the rows as ``of`` does, of a tensor with the dtype and device of ``like`` whose first axis is sharded in ``n_parts``.

        A source is gathered whole for a mean or for the method's rows, where a row copies a part of the next layer, and where reading
        by rows moves no fewer bytes.
        """
        maps = set[IndexMap]()
        for row, rule in members:
            if row.next_layer_source is not None or rule.reduced is not None or not row.axes:
                return None
            if self._tiler.tiling(row, rule, like.device, like.dtype).statistics - {MEAN}:
                return None
            maps.add(self._plan.axis_maps(row)[0].index_map)
        key = frozenset(maps), n_parts
        if key not in self._known:
            self._known[key] = rows_read([*maps], n_parts)
        rows = self._known[key]
        return rows if rows.pays else None

    def measure(self, tensors: Iterable[Named], kernel: KernelOf, gather: Gather) -> None:
        """Measure noise scales and means of all sharded sources at once: each process reads its own parts, and receives numbers.

        Args:
            tensors: Rows of the plan with their sources: state key, tensor and rule.
            kernel: See ``Tiler.measure``.
            gather: Gathers the numbers of all processes.
        """
        tiler, weights = self._tiler, list[Job]()
        means: dict[object, list[Named]] = {}
        for row, key, t, rule in tensors:
            if not is_sharded(t) or row.constant is not None:
                continue
            if rule.is_weight:
                weights.append(tiler.job(row, t, t, rule))
            elif self.of([(row, rule)], t) and MEAN in tiler.tiling(row, rule, t.device, t.dtype).statistics:  # fmt: skip
                means.setdefault((placement(t), t.dtype), []).append((row, key, t, rule))
        tiler.measure(weights, kernel, gather)
        names = {job.row.source for job in weights} & {*tiler.stds}
        self._broken = {name for name in names if not tiler.stds[name].isfinite()}
        for members in means.values():
            parts = [tiler.part_of_mean(row, t, rule) for row, _, t, rule in members]
            numbers = gather.numbers(torch.stack(parts), like=members[0][2]).sum(0)
            for (row, key, _, _), mean in zip(members, numbers.unbind(), strict=True):
                if mean.isfinite():  # else all is read, for the mean of the finite elements
                    self.means[row.name, key] = mean

    def _rows_of(self, jobs: Sequence[Job]) -> Rows | None:
        """Return the rows that jobs read of their source; None where they read all of it, also because its statistics are not finite."""
        for job in jobs:
            if job.rule.is_weight and job.row.source in self._broken:
                return None
            if job.mean is None and job.tiling is not None and job.tiling.statistics:
                return None
        return self.of([(job.row, job.rule) for job in jobs], jobs[0].source)

    def sourced(self, jobs: Sequence[Job], gather: Gather) -> Iterator[list[Job]]:
        """Yield jobs with sources that this process can read, source by source; every process must iterate."""
        yield [job for job in jobs if job.row.constant is not None]  # they read no source
        by_source: dict[tuple[int, int], list[Job]] = {}
        for job in jobs:
            if job.row.constant is None:
                by_source.setdefault((id(job.source), id(job.next_layer)), []).append(job)
        for members in by_source.values():
            first = members[0]
            rows = self._rows_of(members)
            source = gather.rows(first.source, rows.transfer) if rows else gather.whole(first.source)  # fmt: skip
            other = first.next_layer
            if other is not None:
                same = other is first.source or first.row.next_layer_source is None
                other = source if same else gather.whole(other)
            yield [job._replace(source=source, next_layer=other) for job in members]
            del source, other  # before the next source is gathered


def n_bytes_gathered(t: Any, rows: Rows | None) -> int:
    """Return the bytes that a sharded source takes while a process reads it.

    The whole: gloo gathers into a buffer, and copies the buffer. By rows: a tensor of the whole's shape, the rows that are sent, and those
    that are received.
    """
    if all(place.is_replicate() for place in t.placements):
        return 0
    n_bytes = t.numel() * t.element_size()
    if rows is None:
        return n_bytes * (2 if t.device.type == "cpu" else 1)
    own = rows.transfer(t.device_mesh.get_local_rank(mesh_dim_of_rows(t)))
    return n_bytes + (len(own.sent) + len(own.taken)) * n_bytes // len(t)


def rows_read(maps: Sequence[IndexMap], n_parts: int) -> Rows:
    """Return the rows of a source that each process reads for its parts of targets with these index maps."""
    targets = [(one, parts_of(one.n_target, n_parts)) for one in maps]
    read = (
        merged(span for one, parts in targets for span in _spans(one, *parts[i]))
        for i in range(n_parts)
    )
    return Rows(tuple(read), tuple(parts_of(maps[0].n_source, n_parts)))


def _spans(index_map: IndexMap, first: int, n: int) -> Iterable[Range]:
    """Yield the first source row, and the row after the last, of every run in a range of target rows."""
    runs = index_map.runs
    at = max(0, bisect_right(runs, first, key=lambda run: run.target) - 1)
    while at < len(runs) and runs[at].target < first + n:
        run = runs[at]
        begin, end = max(run.target, first), min(run.target + run.length, first + n)
        if begin < end and run.source != PAD:
            yield run.source + begin - run.target, run.source + end - run.target
        at += 1


def merged(spans: Iterable[Range]) -> tuple[Range, ...]:
    """Merge spans, each a first row and the row after the last, into ranges: first row and number of rows."""
    ranges = list[Range]()
    for first, end in sorted(spans):
        if ranges and first <= sum(ranges[-1]):
            begin = ranges[-1][0]
            ranges[-1] = begin, max(end, sum(ranges[-1])) - begin
        else:
            ranges.append((first, end - first))
    return tuple(ranges)


def _n(ranges: Iterable[Range]) -> int:
    return sum(n for _, n in ranges)
