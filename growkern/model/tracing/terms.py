"""Algebra of dimensions: a dimension is an atom, a row-major product of dimensions, or a sum of dimensions side by side.

Views split atoms into products, slices split atoms into sums, and operations that combine two tensors make their dimensions equal. What
remains are the atoms of a model: the sets of coordinates that can be permuted, or grown, together.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, count, pairwise
from math import prod
from typing import Literal

_order = count()


class Dim:
    """One dimension of a tensor.

    Attributes:
        size: Number of coordinates.
        kind: ``"atom"``, ``"product"`` (row-major, of ``parts``) or ``"sum"`` (``parts`` side by side).
        keeps_order: Why the coordinates of the atom can neither be permuted nor grow: reason -> module.
        keeps_size: Why the atom cannot grow, although its coordinates can be permuted: reason -> module.
    """

    __slots__ = ("born", "keeps_order", "keeps_size", "kind", "parent", "parts", "size")

    def __init__(self, size: int, kind: Literal["atom", "product", "sum"] = "atom", parts: Sequence["Dim"] = ()) -> None:  # fmt: skip
        self.size, self.kind, self.parts = int(size), kind, list(parts)
        self.parent: Dim | None = None
        self.keeps_order: dict[str, str] = {}
        self.keeps_size: dict[str, str] = {}
        self.born = next(_order)

    def __repr__(self) -> str:
        return show(self)


class Conflict(Exception):
    """Two dimensions cannot be equal, or a dimension cannot be split as asked."""


def find(dim: Dim) -> Dim:
    """Return what a dimension has become."""
    while dim.parent is not None:
        if dim.parent.parent is not None:
            dim.parent = dim.parent.parent
        dim = dim.parent
    return dim


def factors(dim: Dim) -> list[Dim]:
    """Return the row-major factors of a dimension that are longer than 1: atoms and sums."""
    dim = find(dim)
    if dim.kind == "product":
        return [f for part in dim.parts for f in factors(part)]
    return [] if dim.size == 1 and dim.kind == "atom" else [dim]


def segments(dim: Dim) -> list[Dim]:
    """Return the dimensions that lie side by side in a dimension."""
    dim = find(dim)
    if dim.kind == "sum":
        return [s for part in dim.parts for s in segments(part)]
    own = factors(dim)
    return segments(own[0]) if len(own) == 1 and own[0].kind == "sum" else [dim]


def atoms(dim: Dim) -> list[Dim]:
    """Return every atom of a dimension that is longer than 1, in order."""
    dim = find(dim)
    if dim.kind == "atom":
        return [dim] if dim.size > 1 else []
    return [a for part in dim.parts for a in atoms(part)]


def is_enumerated(dim: Dim) -> bool:
    """True for a sum of single coordinates, each of which stands for itself."""
    dim = find(dim)
    return dim.kind == "sum" and all(find(part).size == 1 for part in dim.parts)


def product(dims: Sequence[Dim]) -> Dim:
    """Return the row-major product of dimensions."""
    own = [f for dim in dims for f in factors(dim)]
    if len(own) < 2:
        return own[0] if own else Dim(1)
    return Dim(prod(f.size for f in own), "product", own)


def side_by_side(dims: Sequence[Dim]) -> Dim:
    """Return dimensions side by side as one."""
    own = [s for dim in dims for s in segments(dim) if s.size > 0]
    return own[0] if len(own) == 1 else Dim(sum(s.size for s in own), "sum", own)


def enumerated(n: int) -> Dim:
    """Return ``n`` single coordinates."""
    return Dim(n, "sum", [Dim(1) for _ in range(n)]) if n > 1 else Dim(1)


def keep_order(dim: Dim, why: str, where: str) -> None:
    """Say why the atoms of a dimension can neither be permuted nor grow."""
    for atom in atoms(dim):
        atom.keeps_order.setdefault(why, where)


def keep_size(dim: Dim, why: str, where: str) -> None:
    """Say why the atoms of a dimension cannot grow."""
    for atom in atoms(dim):
        atom.keeps_size.setdefault(why, where)


def _become(atom: Dim, dim: Dim) -> None:
    """Replace an atom by a dimension, which inherits what the atom keeps."""
    if atom is dim:
        return
    if atom in atoms(dim):
        raise Conflict(f"{atom} inside {dim}")
    atom.parent = dim
    for why, where in atom.keeps_order.items():
        keep_order(dim, why, where)
    for why, where in atom.keeps_size.items():
        keep_size(dim, why, where)


def view(dims: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Reshape dimensions row-major to sizes; atoms split where a boundary falls inside them."""
    rest = [f for dim in dims for f in factors(dim)]
    result: list[Dim] = []
    for size in sizes:
        taken, n = list[Dim](), 1
        while n < size:
            if not rest or size % n:
                raise Conflict(f"view of {[f.size for f in rest]} as {[*sizes]}")
            factor, need = find(rest[0]), size // n
            if factor.kind == "product":
                rest[:1] = factors(factor)
            elif factor.size <= need:
                if need % factor.size:
                    raise Conflict(f"view of {[f.size for f in rest]} as {[*sizes]}")
                taken.append(factor)
                n *= factor.size
                rest.pop(0)
            else:
                if factor.size % need:
                    raise Conflict(f"view of {[f.size for f in rest]} as {[*sizes]}")
                rest[:1] = [f for part in _split(factor, need, factor.size // need) for f in factors(part)]  # fmt: skip
        result.append(product(taken))
    return result


def _split(factor: Dim, n: int, rest: int) -> list[Dim]:
    """Split an atom or a sum into a product of ``n`` and ``rest``."""
    if factor.kind == "atom":
        parts = [Dim(n), Dim(rest)]
        _become(factor, product(parts))
        return parts
    if is_enumerated(factor):
        return [enumerated(n), enumerated(rest)]
    if any(find(part).size % rest for part in factor.parts):
        raise Conflict(f"the segments of {factor} are no multiples of {rest}")
    heads, tail = list[Dim](), None
    for part in [*factor.parts]:
        head, own = view([part], [find(part).size // rest, rest])
        heads.append(head)
        if tail is None:
            tail = own
        else:
            same(tail, own)
    return [side_by_side(heads), tail or Dim(rest)]


def same(a: Dim, b: Dim) -> None:
    """Make two dimensions equal.

    Raises:
        Conflict: Their sizes, or the places where they were split, do not allow it.
    """
    a, b = find(a), find(b)
    if a is b or (a.size == b.size == 1):
        return
    if a.size != b.size:
        raise Conflict(f"{a} ({a.size}) with {b} ({b.size})")
    own, other = factors(a), factors(b)
    if len(own) == 1 and own[0].kind == "atom" and len(other) == 1 and other[0].kind == "atom":
        old, new = sorted((own[0], other[0]), key=lambda atom: atom.born)
        _become(new, old)
    elif len(own) == 1 and own[0].kind == "atom":
        _become(own[0], b)
    elif len(other) == 1 and other[0].kind == "atom":
        _become(other[0], a)
    elif len(own) == 1 and len(other) == 1:
        _same_sums(own[0], other[0])
    elif len(own) == 1 or len(other) == 1:
        one, several = (own[0], other) if len(own) == 1 else (other[0], own)
        rest = prod(f.size for f in several[1:])
        head, tail = _split(one, find(several[0]).size, rest)
        same(head, several[0])
        same(tail, product(several[1:]))
    else:
        _same_products(own, other)


def _same_products(own: list[Dim], other: list[Dim]) -> None:
    while own and other:
        x, y = find(own[0]), find(other[0])
        if x.kind == "product":
            own[:1] = factors(x)
        elif y.kind == "product":
            other[:1] = factors(y)
        elif x.size == y.size:
            same(x, y)
            own.pop(0)
            other.pop(0)
        else:
            longer, n, m = (own, x.size, y.size) if x.size > y.size else (other, y.size, x.size)
            if n % m:
                raise Conflict(f"factors {n} and {m}")
            longer[:1] = _split(find(longer[0]), m, n // m)


def _same_sums(a: Dim, b: Dim) -> None:
    own = _cut_at(a.parts, [find(part).size for part in b.parts])
    for x, y in zip(own, _cut_at(b.parts, [find(part).size for part in own]), strict=True):
        same(x, y)


def cut(dim: Dim, sizes: Sequence[int]) -> list[Dim | None]:
    """Cut a dimension into segments of the given sizes; None for a segment of size 0."""
    dim = find(dim)
    filled = [n for n in sizes if n]
    if len(filled) < 2:
        return [dim if n else None for n in sizes]
    own = factors(dim)
    if len(own) > 1:
        rest = prod(f.size for f in own[1:])
        if all(n % rest == 0 for n in sizes):
            heads = cut(own[0], [n // rest for n in sizes])
            return [product([head, *own[1:]]) if head else None for head in heads]
        for atom in atoms(dim):  # every coordinate stands for itself
            _become(atom, enumerated(atom.size))
        return [enumerated(n) if n else None for n in sizes]
    if own[0].kind == "atom":
        parts = [Dim(n) for n in filled]
        _become(own[0], side_by_side(parts))
        left = iter(parts)
        return [next(left) if n else None for n in sizes]
    own[0].parts = segments(own[0])  # a loop of slices would nest the rests
    pieces, result = iter(_cut_at(own[0].parts, sizes)), list[Dim | None]()
    for size in sizes:
        taken, n = list[Dim](), 0
        while n < size:
            taken.append(next(pieces))
            n += find(taken[-1]).size
        result.append(side_by_side(taken) if taken else None)
    return result


def _cut_at(parts: Sequence[Dim], sizes: Sequence[int]) -> list[Dim]:
    """Cut dimensions that lie side by side where segments of the given sizes end; each of them at once, so that no sums nest."""
    result, ends, start = list[Dim](), deque(accumulate(sizes)), 0
    for part in [*parts]:
        end = start + find(part).size
        at = [start]
        while ends and ends[0] <= end:
            at.append(ends.popleft())
        own = cut(part, [n - m for m, n in pairwise([*at, end])])
        result += [d for d in own if d]
        start = end
    return result


def inner(dim: Dim) -> Iterator[Dim]:
    """Yield a dimension, its parts, and the runs of neighboring parts."""
    dim = find(dim)
    yield dim
    for part in dim.parts:
        yield from inner(part)
    join = product if dim.kind == "product" else side_by_side
    for k in range(1, len(dim.parts) if len(dim.parts) < 8 else 0):
        yield join(dim.parts[:k])
        yield join(dim.parts[k:])


def size_at(dim: Dim, sizes: Mapping[Dim, int]) -> int:
    """Return the length of a dimension where its atoms have the given sizes (default: their own)."""
    dim = find(dim)
    if dim.kind == "atom":
        return sizes.get(dim, dim.size)
    parts = (size_at(part, sizes) for part in dim.parts)
    return prod(parts) if dim.kind == "product" else sum(parts)


def coordinates(dim: Dim, maps: Mapping[Dim, Sequence[int]]) -> list[int]:
    """Return the source coordinate of every coordinate of a dimension, where maps give the source coordinates of its atoms."""
    dim = find(dim)
    if dim.kind == "atom":
        return [*maps.get(dim, range(dim.size))]
    if dim.kind == "product":
        result = [0]
        for part in dim.parts:
            n, own = find(part).size, coordinates(part, maps)
            result = [i * n + j for i in result for j in own]
        return result
    result, start = list[int](), 0
    for part in dim.parts:
        result += [start + j for j in coordinates(part, maps)]
        start += find(part).size
    return result


def show(dim: Dim, names: Mapping[Dim, str] | None = None) -> str:
    """Return a dimension as text, such as ``heads x 12``."""
    dim = find(dim)
    if dim.kind == "atom":
        return (names or {}).get(dim, str(dim.size))
    if is_enumerated(dim):
        return str(dim.size)
    sign = " x " if dim.kind == "product" else " + "
    text = sign.join(show(part, names) for part in dim.parts)
    return text if dim.kind == "product" else f"[{text}]"
