"""Index maps as runs: the source coordinate that each target coordinate copies, without tensors.

An index map sends target coordinate ``i`` to the source coordinate ``g(i)`` that it copies, or to none (a pad). The map is stored as
runs ``(target, length, source)``: contiguous in the target and in the source, so a run is a slice on both sides.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import NamedTuple

from growkern.errors import PlanError
from growkern.planning.vector import Vector, merged

PAD = -1  # source of a run of target coordinates that copy no source coordinate


class Run(NamedTuple):
    """Target coordinates ``target .. target + length`` copy source coordinates ``source .. source + length``."""

    target: int
    length: int
    source: int

    @property
    def span(self) -> tuple[int, int]:
        """First target coordinate, and last target coordinate + 1."""
        return self.target, self.target + self.length


@dataclass(frozen=True)
class IndexMap:
    """The source coordinate of each target coordinate of a space or an axis.

    Attributes:
        n_source: Source size in coordinates.
        n_target: Target size in coordinates.
        runs: Runs in target order, without gaps or overlaps; ``source`` is ``PAD`` for a run of pads.
    """

    n_source: int
    n_target: int
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        at = 0
        for run in self.runs:
            inside = run.source == PAD or 0 <= run.source <= self.n_source - run.length
            if run.target != at or run.length < 1 or not inside:
                raise PlanError(
                    f"an index map from {self.n_source} to {self.n_target} coordinates cannot have the run {tuple(run)}."
                )
            at += run.length
        if at != self.n_target:
            raise PlanError(f"the runs of an index map end at {at}, its target at {self.n_target}.")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached: a drawn map has a run per coordinate, and many lookups have maps in their keys
        return hash((self.n_source, self.n_target, self.runs))

    @staticmethod
    def identity(n: int) -> "IndexMap":
        """Every coordinate copies itself."""
        return IndexMap(n, n, (Run(0, n, 0),) if n else ())

    @staticmethod
    def cyclic(n_source: int, n_target: int) -> "IndexMap":
        """``g(i) = i mod n_source``."""
        starts = range(0, n_target, n_source)
        return IndexMap(
            n_source, n_target, tuple(Run(t, min(n_source, n_target - t), 0) for t in starts)
        )

    @staticmethod
    def padded(n_source: int, n_target: int) -> "IndexMap":
        """Return as many whole copies of the source as fit, followed by pads."""
        n_copied = n_target // n_source * n_source
        runs = IndexMap.cyclic(n_source, n_copied).runs
        return IndexMap(
            n_source,
            n_target,
            (*runs, Run(n_copied, n_target - n_copied, PAD)) if n_target > n_copied else runs,
        )

    @staticmethod
    def tail(n_source: int, n_target: int) -> "IndexMap":
        """Return one copy of the source, followed by pads."""
        copied = IndexMap.identity(n_source).runs
        pads = (Run(n_source, n_target - n_source, PAD),) if n_target > n_source else ()
        return IndexMap(n_source, n_target, (*copied, *pads))

    @staticmethod
    def drawn(n_source: int, n_target: int, seed: str) -> "IndexMap":
        """Return one copy of the source, followed by uniform draws (Net2Net, bert2BERT); equal seeds give equal maps on every machine."""
        draw = Random(seed)
        more = [draw.randrange(n_source) for _ in range(n_target - n_source)]
        return IndexMap.of([*range(n_source), *more], n_source)

    @staticmethod
    def of(indices: Iterable[int], n_source: int) -> "IndexMap":
        """Compress a list of source coordinates (``PAD`` for a pad)."""
        runs = _joined(Run(i, 1, source) for i, source in enumerate(indices))
        return IndexMap(n_source, runs[-1].target + runs[-1].length if runs else 0, runs)

    @cached_property
    def indices(self) -> tuple[int, ...]:
        """``indices[i]`` = source coordinate that target coordinate ``i`` copies, or ``PAD``."""
        return tuple(
            i
            for run in self.runs
            for i in (
                range(run.source, run.source + run.length)
                if run.source != PAD
                else (PAD,) * run.length
            )
        )

    @cached_property
    def source_ranges(self) -> tuple[tuple[int, int, tuple[int, ...]], ...]:
        """Ranges of the source that are copied as a whole, in order: source start, length, target start of every copy."""
        copying = [run for run in self.runs if run.source != PAD]
        ends = (run.source + run.length for run in copying)
        bounds = sorted({0, self.n_source, *(run.source for run in copying), *ends})
        following = dict(pairwise(bounds))
        targets: dict[int, list[int]] = {start: [] for start in following}
        for run in copying:
            start = run.source
            while start < run.source + run.length:
                targets[start].append(run.target + start - run.source)
                start = following[start]
        return tuple((j, end - j, tuple(targets[j])) for j, end in following.items())

    @cached_property
    def by_count(self) -> dict[int, tuple[list[int], list[list[int]]]]:
        """Number of copies -> source coordinates with this many copies, and a list of their target coordinates for every copy."""
        targets: list[list[int]] = [[] for _ in range(self.n_source)]
        for i, j in enumerate(self.indices):
            if j != PAD:
                targets[j].append(i)
        groups: dict[int, tuple[list[int], list[list[int]]]] = {}
        for j, own in enumerate(targets):
            if own:
                sources, copies = groups.setdefault(len(own), ([], [[] for _ in own]))
                sources.append(j)
                for copy, i in zip(copies, own, strict=True):
                    copy.append(i)
        return dict(sorted(groups.items()))

    @property
    def counts(self) -> Vector:
        """Number of copies of each source coordinate."""
        return merged((len(targets), n) for _, n, targets in self.source_ranges)

    @cached_property
    def is_identity(self) -> bool:
        """True when the sizes are equal and every coordinate copies itself."""
        return self.n_source == self.n_target and all(run.target == run.source for run in self.runs)

    @property
    def has_pads(self) -> bool:
        """True when some target coordinate copies no source coordinate."""
        return any(run.source == PAD for run in self.runs)

    def per_copy(self, function: Callable[[int], float], pad: float) -> Vector:
        """Return ``function(C(g(i)))`` for every target coordinate ``i``, ``C`` being the number of copies; ``pad`` for pads."""
        return self.by_copy(lambda _, count: function(count), pad)

    def by_copy(self, function: Callable[[int, int], float], pad: float) -> Vector:
        """Return ``function(k, C(g(i)))`` for the ``k``-th copy, from 0 on; ``pad`` for pads."""
        if self.is_identity:
            return Vector.full(function(0, 1), self.n_target)
        values = [
            (t, n, function(k, len(ts)))
            for _, n, ts in self.source_ranges
            for k, t in enumerate(ts)
        ]
        pads = [(run.target, run.length, pad) for run in self.runs if run.source == PAD]
        return merged((value, n) for _, n, value in sorted([*values, *pads]))

    def first_copies(self) -> "IndexMap":
        """Return this map with pads in place of all but the first copy of every source coordinate."""
        triples = [(run.target, run.length, PAD) for run in self.runs if run.source == PAD]
        for source, n, (first, *others) in ((j, n, ts) for j, n, ts in self.source_ranges if ts):
            triples += [(first, n, source), *((other, n, PAD) for other in others)]
        runs = _joined(Run(*run) for run in sorted(triples))
        return IndexMap(self.n_source, self.n_target, runs)

    def where(self, kept: Vector) -> "IndexMap":
        """Return this map with pads in place of coordinates whose entry in ``kept`` is 0."""
        if all(value for value, _ in kept.repeats):
            return self
        pairs = zip(self.indices, kept.expanded(), strict=True)
        return IndexMap.of((j if value else PAD for j, value in pairs), self.n_source)

    def product(self, inner: "IndexMap") -> "IndexMap":
        """Return the map of a row-major product of two spaces: coordinate ``i * inner.n + j``."""
        if self == ONE or inner == ONE:
            return inner if self == ONE else self
        n_source, n_target = inner.n_source, inner.n_target
        runs: list[Run] = []
        if inner.is_identity:
            n = n_source
            runs = [Run(t * n, k * n, PAD if s == PAD else s * n) for t, k, s in self.runs]
        else:
            for i, j in enumerate(self.indices):
                if j == PAD:
                    runs.append(Run(i * n_target, n_target, PAD))
                    continue
                for t, k, s in inner.runs:
                    source = PAD if s == PAD else j * n_source + s
                    runs.append(Run(i * n_target + t, k, source))
        return IndexMap(self.n_source * n_source, self.n_target * n_target, _joined(runs))


ONE = IndexMap.identity(1)


def _joined(runs: Iterable[Run]) -> tuple[Run, ...]:
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and (
            run.source == PAD if last.source == PAD else run.source == last.source + last.length
        ):
            joined[-1] = Run(last.target, last.length + run.length, last.source)
        elif run.length:
            joined.append(run)
    return tuple(joined)


def concat_maps(maps: Sequence[IndexMap]) -> IndexMap:
    """Return the map of an axis that concatenates several segments (fused q, k, v)."""
    if len(maps) == 1 and not maps[0].is_identity:
        return maps[0]  # the same object, for all that it has cached
    runs: list[Run] = []
    n_source = n_target = 0
    for m in maps:
        runs += [Run(n_target + t, n, PAD if s == PAD else n_source + s) for t, n, s in m.runs]
        n_source, n_target = n_source + m.n_source, n_target + m.n_target
    if all(m.is_identity for m in maps):
        return IndexMap.identity(n_source)
    return IndexMap(n_source, n_target, tuple(runs))


def pair_copies(m: IndexMap) -> tuple[Vector, IndexMap]:
    """Pair the copies of each source coordinate; return a sign (1, -1, 0) per target coordinate, and the map to the first of its pair.

    Noise with these signs, drawn once per pair, sums to zero over the copies of every coordinate. A copy without partner has sign 0.
    """
    signed_runs = [(run.target, run.length, 0.0, run.target) for run in m.runs if run.source == PAD]
    for _, n, targets in m.source_ranges:
        for first, second in zip(targets[::2], targets[1::2], strict=False):
            signed_runs += [(first, n, 1.0, first), (second, n, -1.0, first)]
        if len(targets) % 2:
            signed_runs.append((targets[-1], n, 0.0, targets[-1]))
    signed_runs.sort()
    runs = (Run(target, n, first) for target, n, _, first in signed_runs)
    return (
        merged((sign, n) for _, n, sign, _ in signed_runs),
        IndexMap(m.n_target, m.n_target, _joined(runs)),
    )
