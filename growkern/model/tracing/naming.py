"""Atoms of a trace -> spaces with names that users know: hidden, heads, kv_heads, ffn; and why the other atoms are fixed."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from growkern.model.size_values import SIZE_OF_SPACE, size_of_space
from growkern.model.tracing.terms import Dim, atoms, factors, segments
from growkern.model.tracing.values import Norm

INPUT = "an axis of the inputs"
OUTPUT = "an axis of the output"
SHARED = 3  # a normalized atom on more axes than this is a residual space
HIDDEN = {size: space for space, size in SIZE_OF_SPACE.items()}["hidden"]


@dataclass
class Spaces:
    """The spaces of a model.

    Attributes:
        names: Atom that can grow -> its space.
        sizes: Size that a user can name -> its value.
        fixed: Atom that cannot grow -> reason -> module.
        normed: Atoms that norms are over, each by itself.
        head_dims: Atoms inside heads.
        lost: Size that no atom has, because all atoms of its kind are fixed -> why.
    """

    names: dict[Dim, str] = field(default_factory=dict[Dim, str])
    sizes: dict[str, int] = field(default_factory=dict[str, int])
    fixed: dict[Dim, dict[str, str]] = field(default_factory=dict[Dim, dict[str, str]])
    normed: set[Dim] = field(default_factory=set[Dim])
    head_dims: set[Dim] = field(default_factory=set[Dim])
    lost: dict[str, str] = field(default_factory=dict[str, str])

    def size_of(self, atom: Dim) -> str | None:
        """Return the size that an atom belongs to, None for a fixed one."""
        return size_of_space(self.names[atom]) if atom in self.names else None

    def at(self, sizes: Mapping[str, int]) -> dict[Dim, int]:
        """Return the size of every named atom under named sizes."""
        own = self.sizes | dict(sizes)
        return {
            atom: own["heads"] // own["kv_heads"] if size == "group" else own[size]
            for atom in self.names
            if (size := self.size_of(atom))
        }


@dataclass
class _Heads:
    heads: set[Dim]
    group: set[Dim]
    inside: set[Dim]
    pairs: list[tuple[Dim, Dim]]  # (kv head, query heads of the kv head)


def name_spaces(
    weights: Mapping[str, Sequence[Dim]],
    norms: Sequence[Norm],
    products: Sequence[tuple[list[Dim], Dim]],
    written: set[Dim],
) -> Spaces:
    """Name the atoms of the weights.

    Args:
        weights: Dimensions of every parameter and buffer.
        norms: The norms.
        products: Products of activations: the dimensions of heads, and the dimension that is summed over.
        written: Atoms of the axes that write.

    Returns:
        The spaces.
    """
    axes: dict[Dim, int] = Counter(a for dims in weights.values() for d in dims for a in atoms(d))
    for atom in axes.keys() - written:
        atom.keeps_size.setdefault("no tensor of the model writes it", "")
    for atom in axes:
        if axes[atom] == 1:
            atom.keeps_size.setdefault("one tensor has it alone", "")
    found = _heads(weights, products, axes)
    special = found.heads | found.group | found.inside
    spaces, normed = Spaces(head_dims=found.inside), set[Dim]()
    for norm in norms:
        own = {a for d in norm.over for a in atoms(d)}
        free = [a for a in own if a in axes and not (a.keeps_size or a.keeps_order.keys() - {OUTPUT})]  # fmt: skip
        if len(own) == 1 or len(free) == 1:
            normed |= own
    spaces.normed = normed - special
    for atom in axes:
        why = atom.keeps_order | atom.keeps_size
        if atom in spaces.normed and axes[atom] > SHARED:
            why.pop(OUTPUT, None)
        if atom in found.inside:
            why.setdefault("head_dim stays", "")
        if why:
            spaces.fixed[atom] = why
    free = [a for a in axes if a not in spaces.fixed]
    hidden = [a for a in free if a in spaces.normed and axes[a] > SHARED and a not in special]
    _name_sizes(spaces, "hidden", hidden, axes)
    _name_sizes(spaces, "ffn", [a for a in free if a not in {*hidden, *special}], axes)
    _name_heads(spaces, found, free, axes, _beside(spaces, weights, found.heads))
    for atom in free:
        if atom not in spaces.names:
            spaces.fixed.setdefault(atom, {"growkern has no name for it": ""})
    for size, own in {"hidden": {a for a in normed if axes[a] > SHARED}, "heads": found.heads}.items():  # fmt: skip
        why = [reason for a in axes if a in own for reason in spaces.fixed.get(a, ())]
        if why and size not in spaces.sizes:
            spaces.lost[size] = next((w for w in why if w != OUTPUT), why[0])
    if "hidden" not in {**spaces.sizes, **spaces.lost}:
        spaces.lost["hidden"] = f"no norm is over an axis that more than {SHARED} tensors have"
    return spaces


def _heads(weights: Mapping[str, Sequence[Dim]], products: Sequence[tuple[list[Dim], Dim]], axes: Mapping[Dim, int]) -> _Heads:  # fmt: skip
    """Find heads by the products of activations; what stands inside heads in a weight is a head_dim."""
    heads, group, inside = set[Dim](), set[Dim](), set[Dim]()
    for dims, summed in products:
        own = [a for a in atoms(summed) if a in axes]
        if not own:
            continue
        inside |= {*own}
        outer = [f for d in dims for f in factors(d) if f in axes]
        if len(outer) == 2:
            group.add(outer[1])
            heads.add(outer[0])
        else:
            heads |= {*outer}
    pairs = dict[Dim, Dim]()
    for own in _factored(weights):
        if any(f in heads for f in own[:-1]) and own[-1] not in heads | group:
            inside |= {*atoms(own[-1])}
        for a, b in pairwise(own):
            if a in heads and b in group:
                pairs.setdefault(a, b)
    return _Heads(heads - inside, group - inside, inside, [*pairs.items()])


def _factored(weights: Mapping[str, Sequence[Dim]]) -> Iterator[list[Dim]]:
    """Yield the factors of every segment of every axis that is a product."""
    for dims in weights.values():
        for dim in dims:
            for segment in segments(dim):
                own = factors(segment)
                if len(own) > 1:
                    yield own


def _beside(spaces: Spaces, weights: Mapping[str, Sequence[Dim]], heads: set[Dim]) -> dict[int, str]:  # fmt: skip
    """Return number of heads -> size of the residual stream that the weights with these heads read or write."""
    found: dict[int, str] = {}
    for dims in weights.values():
        own = [a for d in dims for a in atoms(d)]
        for size in filter(None, map(spaces.size_of, own)):
            if size.startswith("hidden"):
                found |= {a.size: min(size, found.get(a.size, size)) for a in own if a in heads}
    return found


def _name_sizes(
    spaces: Spaces, kind: str, found: Sequence[Dim], axes: Mapping[Dim, int], beside: Mapping[int, str] = {}
) -> None:  # fmt: skip
    """Name the atoms of one kind: a size of its own for every length, those beside ``hidden`` first, then the most used."""
    by_size: dict[int, list[Dim]] = defaultdict(list)
    for atom in found:
        by_size[atom.size].append(atom)
    order = sorted(by_size, key=lambda n: (beside.get(n, ""), -sum(axes[a] for a in by_size[n])))
    for k, n in enumerate(order):
        size = f"{kind}{k + 1}" if k else kind
        space = size.replace("hidden", HIDDEN)
        spaces.sizes[size] = n
        for j, atom in enumerate(by_size[n]):
            alone = kind == "hidden" and len(by_size[n]) == 1
            spaces.names[atom] = space if alone else f"{space}.{j}"


def _name_heads(
    spaces: Spaces, found: _Heads, free: Sequence[Dim], axes: Mapping[Dim, int], beside: Mapping[int, str]
) -> None:  # fmt: skip
    grouped = {kv for kv, _ in found.pairs}
    pairs = [(kv, g) for kv, g in found.pairs if kv in free and g in free]
    plain = [a for a in free if a in found.heads - grouped]
    if not pairs:
        _name_sizes(spaces, "heads", plain, axes, beside)
        return
    if len({(kv.size, g.size) for kv, g in pairs}) > 1:
        for pair in pairs:
            for atom in pair:
                spaces.fixed[atom] = {"the model has several kinds of grouped heads": ""}
        _name_sizes(spaces, "heads", plain, axes, beside)
        return
    kv_heads, group = pairs[0][0].size, pairs[0][1].size
    spaces.sizes |= {"heads": kv_heads * group, "kv_heads": kv_heads}
    for j, (kv, g) in enumerate(pairs):
        spaces.names |= {kv: f"kv_heads.{j}", g: f"group.{j}"}
    for j, atom in enumerate(a for a in plain if a.size in (kv_heads * group, kv_heads)):
        size = "heads" if atom.size == kv_heads * group else "kv_heads"
        spaces.names[atom] = f"{size}.{len(pairs) + j}"
