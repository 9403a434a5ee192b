"""Run-length encoded vectors: factors per coordinate, many adjacent ones equal."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby


@dataclass(frozen=True)
class Vector:
    """One number per target coordinate, as repeats ``(value, length)`` in order."""

    repeats: tuple[tuple[float, int], ...]

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # cached: a vector can have a repeat per coordinate, and many lookups have vectors in their keys
        return hash(self.repeats)

    @staticmethod
    def of(values: Iterable[float]) -> "Vector":
        """Compress a sequence of numbers."""
        return Vector(tuple((value, sum(1 for _ in same)) for value, same in groupby(values)))

    @staticmethod
    def full(value: float, n: int) -> "Vector":
        """Return a vector of one value, ``n`` times."""
        return Vector(((value, n),) if n else ())

    def __len__(self) -> int:
        return sum(length for _, length in self.repeats)

    def expanded(self) -> list[float]:
        """Return all values as a list."""
        return [value for value, length in self.repeats for _ in range(length)]

    @cached_property
    def changes(self) -> dict[int, float]:
        """First coordinate of each repeat -> value of the repeat."""
        starts = accumulate((length for _, length in self.repeats), initial=0)
        return {start: value for start, (value, _) in zip(starts, self.repeats, strict=False)}

    @cached_property
    def uniform(self) -> float | None:
        """The value that all coordinates have, or None when values differ."""
        values = {value for value, _ in self.repeats}
        return values.pop() if len(values) == 1 else None

    def map(self, function: Callable[[float], float]) -> "Vector":
        """Apply a function to every value."""
        return merged((function(value), length) for value, length in self.repeats)

    def zip(self, other: "Vector", function: Callable[[float, float], float]) -> "Vector":
        """Combine two vectors of equal length, value by value."""
        left, right = list(reversed(self.repeats)), list(reversed(other.repeats))
        repeats: list[tuple[float, int]] = []
        while left and right:
            (x, n), (y, m) = left.pop(), right.pop()
            length = min(n, m)
            repeats.append((function(x, y), length))
            if n > length:
                left.append((x, n - length))
            if m > length:
                right.append((y, m - length))
        if left or right:
            raise ValueError(f"vectors of {len(self)} and {len(other)} cannot be combined")
        return merged(repeats)

    def outer(self, inner: "Vector") -> "Vector":
        """Return all products, row-major: ``out[i * len(inner) + j] = self[i] * inner[j]``."""
        if len(self) == 1 and self.uniform == 1:
            return inner
        if inner.uniform is not None:
            return merged((v * inner.uniform, n * len(inner)) for v, n in self.repeats)
        values = inner.expanded()
        return Vector.of(v * w for v in self.expanded() for w in values)


def merged(repeats: Iterable[tuple[float, int]]) -> Vector:
    """Make a vector from ``(value, length)`` pairs in order; adjacent pairs of equal value are merged."""
    merged: list[tuple[float, int]] = []
    for value, length in repeats:
        if merged and merged[-1][0] == value:
            merged[-1] = (value, merged[-1][1] + length)
        else:
            merged.append((value, length))
    return Vector(tuple(merged))


def concat_vectors(vectors: Sequence[Vector]) -> Vector:
    """Concatenate vectors."""
    return merged(repeat for vector in vectors for repeat in vector.repeats)
