"""Index maps as runs, and vectors as run lengths: the arithmetic of growth, without tensors.

An index map sends target coordinate ``i`` to the source coordinate ``g(i)`` it copies, or to no one (a pad). It is stored as
runs ``(target, length, source)``: contiguous in the target and in the source, so a run is a slice on both sides.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

PAD = -1  # source of a run of target coordinates that copy nothing


class Run(NamedTuple):
    """Target coordinates ``target .. target + length`` copy source coordinates ``source .. source + length``."""

    target: int
    length: int
    source: int


@dataclass(frozen=True)
class Vector:
    """One number per target coordinate, as ``(value, length)`` pairs in order."""

    pieces: tuple[tuple[float, int], ...]

    @staticmethod
    def of(values: Iterable[float]) -> "Vector":
        """Compress a sequence of numbers."""
        return Vector(tuple((value, sum(1 for _ in same)) for value, same in groupby(values)))

    @staticmethod
    def full(value: float, n: int) -> "Vector":
        """One value, ``n`` times."""
        return Vector(((value, n),) if n else ())

    def __len__(self) -> int:
        return sum(length for _, length in self.pieces)

    def expanded(self) -> list[float]:
        """All values, one by one."""
        return [value for value, length in self.pieces for _ in range(length)]

    @property
    def uniform(self) -> float | None:
        """The one value of all coordinates, or None when they differ."""
        values = {value for value, _ in self.pieces}
        return values.pop() if len(values) == 1 else None

    def map(self, function: Callable[[float], float]) -> "Vector":
        """Apply a function to every value."""
        return _merged((function(value), length) for value, length in self.pieces)

    def zip(self, other: "Vector", function: Callable[[float, float], float]) -> "Vector":
        """Combine two vectors of one length, value by value."""
        if self.uniform is not None and other.uniform is not None:
            return Vector.full(function(self.uniform, other.uniform), len(self))
        return Vector.of(map(function, self.expanded(), other.expanded()))

    def outer(self, inner: "Vector") -> "Vector":
        """All products, row-major: ``out[i * len(inner) + j] = self[i] * inner[j]``."""
        if inner.uniform is not None:
            return _merged((v * inner.uniform, n * len(inner)) for v, n in self.pieces)
        return Vector.of(v * w for v in self.expanded() for w in inner.expanded())


def _merged(pieces: Iterable[tuple[float, int]]) -> Vector:
    merged: list[tuple[float, int]] = []
    for value, length in pieces:
        if merged and merged[-1][0] == value:
            merged[-1] = (value, merged[-1][1] + length)
        else:
            merged.append((value, length))
    return Vector(tuple(merged))


def concat_vectors(vectors: Sequence[Vector]) -> Vector:
    """One vector after the other."""
    return _merged(piece for vector in vectors for piece in vector.pieces)


@dataclass(frozen=True)
class IndexMap:
    """Where each target coordinate of a space or an axis comes from.

    Attributes:
        n_source: Source size in coordinates.
        n_target: Target size in coordinates.
        runs: In target order, without gaps or overlaps; ``source`` is ``PAD`` where nothing is copied.
    """

    n_source: int
    n_target: int
    runs: tuple[Run, ...]

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
        """As many whole copies as fit; the rest are pads."""
        n_copied = n_target // n_source * n_source
        runs = IndexMap.cyclic(n_source, n_copied).runs
        return IndexMap(
            n_source,
            n_target,
            (*runs, Run(n_copied, n_target - n_copied, PAD)) if n_target > n_copied else runs,
        )

    @staticmethod
    def of(indices: Iterable[int], n_source: int) -> "IndexMap":
        """Compress a list of source coordinates (``PAD`` for a pad)."""
        runs: list[Run] = []
        for i, source in enumerate(indices):
            last = runs[-1] if runs else None
            if last and (
                source == PAD if last.source == PAD else source == last.source + last.length
            ):
                runs[-1] = Run(last.target, last.length + 1, last.source)
            else:
                runs.append(Run(i, 1, source))
        return IndexMap(n_source, runs[-1].target + runs[-1].length if runs else 0, tuple(runs))

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
    def counts(self) -> tuple[int, ...]:
        """``counts[j]`` = target coordinates that copy source coordinate ``j``."""
        counts = [0] * self.n_source
        for j in self.indices:
            if j != PAD:
                counts[j] += 1
        return tuple(counts)

    @property
    def is_identity(self) -> bool:
        """True when nothing moves and nothing is added."""
        return self.n_source == self.n_target and all(run.target == run.source for run in self.runs)

    @property
    def has_pads(self) -> bool:
        """True when some target coordinate copies nothing."""
        return any(run.source == PAD for run in self.runs)

    def per_copy(self, function: Callable[[int], float], pad: float) -> Vector:
        """``function(C(g(i)))`` for every target coordinate ``i``; ``pad`` where it copies nothing."""
        if self.is_identity:
            return Vector.full(function(1), self.n_target)
        return Vector.of(pad if j == PAD else function(self.counts[j]) for j in self.indices)

    def product(self, inner: "IndexMap") -> "IndexMap":
        """The map of a row-major product of two spaces: coordinate ``i * inner.n + j``."""
        n_source, n_target = self.n_source * inner.n_source, self.n_target * inner.n_target
        if inner.is_identity:
            n = inner.n_source
            return IndexMap(
                n_source,
                n_target,
                tuple(Run(t * n, k * n, PAD if s == PAD else s * n) for t, k, s in self.runs),
            )
        return IndexMap.of(
            (
                PAD if PAD in (i, j) else i * inner.n_source + j
                for i in self.indices
                for j in inner.indices
            ),
            n_source,
        )


def concat_maps(maps: Sequence[IndexMap]) -> IndexMap:
    """The map of an axis that holds several segments one after the other (fused q, k, v)."""
    runs: list[Run] = []
    n_source = n_target = 0
    for m in maps:
        runs += [Run(n_target + t, n, PAD if s == PAD else n_source + s) for t, n, s in m.runs]
        n_source, n_target = n_source + m.n_source, n_target + m.n_target
    if all(m.is_identity for m in maps):
        return IndexMap.identity(n_source)
    return IndexMap(n_source, n_target, tuple(runs))


def twins(m: IndexMap) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Pair the copies of each source coordinate: per target coordinate a sign (1, -1, 0) and the first of its pair.

    Noise with these signs, drawn once per pair, sums to zero over the copies of every coordinate. An odd copy has sign 0.
    """
    signs, partners, open_pair = [0] * m.n_target, list(range(m.n_target)), dict[int, int]()
    for i, j in enumerate(m.indices):
        if j == PAD:
            continue
        if j in open_pair:
            first = open_pair.pop(j)
            signs[first], signs[i], partners[i] = 1, -1, first
        else:
            open_pair[j] = i
    return tuple(signs), tuple(partners)
