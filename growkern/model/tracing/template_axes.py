"""Tensors of a traced small model -> axes of a spec, whose spaces are named by the sizes that the hint of a family names."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from math import isclose

from torch import Tensor

from growkern.model.size_values import SIZE_OF_SPACE, Power, space_of
from growkern.model.spec import KEY, QUERY, RAW, SHARE, VALUE, AxisUse, Norm, Segment
from growkern.model.tracing.scalings import settled
from growkern.model.tracing.scores import ScoreTape
from growkern.model.tracing.terms import Dim, atoms, factors, find, is_enumerated, product, segments
from growkern.model.tracing.values import Stream, Use

SPACE_OF_SIZE = {size: space for space, size in SIZE_OF_SPACE.items()}
LOCAL = "heads", "kv_heads", "group", "ffn"  # sizes whose spaces belong to one block
RESIDUAL = SPACE_OF_SIZE["hidden"]
CHAIN = "chain"  # streams of post-norm blocks: a norm writes what the next branch is added to
FEW = 4  # rows of a table before its first position, at most


class Axes:
    """Names the axes of a small model.

    Args:
        tape: Its trace.
        sizes: Size -> its length.
        stacks: Paths of the stacks of blocks.
        eps: Module of a norm -> attribute with the epsilon.
        by_stack: See ``Hint``.
    """

    def __init__(
        self,
        tape: ScoreTape,
        sizes: Mapping[str, int],
        stacks: Sequence[str],
        eps: Mapping[str, str],
        by_stack: bool,
    ) -> None:
        self.tape, self.sizes, self.stacks, self.eps = tape, sizes, stacks, eps
        self.by_stack, self.scalings = by_stack, settled(tape)
        self.by_length = {n: size for size, n in reversed([*sizes.items()]) if not size.endswith("layers")}  # fmt: skip
        self.uses: dict[tuple[str, int], list[Use]] = defaultdict(list)
        for use in tape.uses:
            self.uses[use.tensor, use.axis].append(use)
        met = [
            (a.find(), b.find()) for dim, a, b, _ in tape.scores if dim.size == sizes["head_dim"]
        ]
        self.queries, self.keys = ({pair[i] for pair in met} for i in (0, 1))
        self.places: dict[Dim, set[tuple[str, str]]] = defaultdict(set)
        for name, value in tape.weights.items():
            for dim in value.dims:
                for factor in _inner(dim):
                    self.places[factor].add(self.block(name))
        self.shared = {(path, dim.size) for dim, own in self.places.items() if len(own) > 1 for path, _ in own}  # fmt: skip
        self.first = {name: own[0] for own in tape.names.values() for name in own}
        self.norm_modules = set[str]()
        reads = {use.tensor for use in tape.uses if use.role == "reader"}
        self.tables = {use.stream.find() for use in tape.uses if use.tensor not in reads and len(self._dims(use)) == 2}  # fmt: skip
        self.streams = self._name_streams()

    def block(self, name: str) -> tuple[str, str]:
        """Return the stack and the index of the block that a tensor or module is in; empty outside of stacks."""
        for path in self.stacks:
            if name.startswith(f"{path}."):
                return path, name.removeprefix(f"{path}.").partition(".")[0]
        return "", ""

    def powers(self) -> dict[str, Power]:
        """Return the streams of hidden that the forward multiplies by a power of hidden, whose growth their writers take back."""
        scaled = [own for own in self.scalings if own.dim.size == self.sizes["hidden"]]
        return {f"{RESIDUAL}:{self.streams[own.before.find()]}": Power("hidden", own.exponent) for own in scaled}  # fmt: skip

    def scaled_scores(self) -> bool:
        """True when attention multiplies scores by ``head_dim ** -0.5``."""
        return any(isclose(scale, self.sizes["head_dim"] ** -0.5) for *_, scale in self.tape.scores)

    def fixed(self, rotary: float) -> dict[str, str]:
        """Return why head_dim is fixed: attention splits it in another way than into the halves of RoPE and the rest."""
        n = self.sizes["head_dim"]
        half = int(n * rotary) // 2
        known = [k for k in (half, half, n - 2 * half) if k]
        split = [[find(part).size for part in segments(dim)] for dim, *_ in self.tape.scores if find(dim).size == n]  # fmt: skip
        plain = all(own == known for own in split)
        return {} if plain else {"head_dim": "attention splits it in another way than into halves that RoPE rotates"}  # fmt: skip

    def names(self) -> dict[Dim, str]:
        """Return the atoms that are as long as a size -> the space of the size."""
        every = {a for v in self.tape.weights.values() for dim in v.dims for a in atoms(dim)}
        named = ((a, self.by_length[a.size]) for a in every if a.size in self.by_length)
        return {a: SPACE_OF_SIZE.get(size, size) for a, size in named}

    def post_norm(self) -> bool:
        """True when a LayerNorm reads what another LayerNorm wrote into a stream."""
        norms = [n for n in self.tape.norms if n.kind == "layer"]
        writes = {n.writes.find() for n in norms}
        return any(n.reads.find() in writes for n in norms)

    def tensor(self, name: str, first: str, dims: Sequence[Dim]) -> tuple[AxisUse, ...]:
        """Return the axes of a tensor."""
        uses = [self.uses[name, i] or self.uses[first, i] for i in range(len(dims))]
        axes = [self._axis(name, i, dim, uses[i]) for i, dim in enumerate(dims)]
        written = [s for axis in axes[1:] if axis.role == "writer" for s in axis.streams]
        if "experts" in axes[0].streams and RESIDUAL in written:
            axes[0] = AxisUse("reader", ((SHARE,),))
        return tuple(axes)

    def plain(self, t: Tensor) -> tuple[AxisUse, ...]:
        """Return the axes of a tensor that no operation uses, by their lengths."""
        sizes = [self.by_length.get(n, n) for n in t.shape]
        return tuple(AxisUse("writer", ((SPACE_OF_SIZE.get(str(size), size),),)) for size in sizes)

    def _axis(self, name: str, i: int, dim: Dim, uses: Sequence[Use]) -> AxisUse:
        kinds = {use.role for use in uses}
        gain = next((u for u in uses if u.role == "gain" and u.norm and u.norm.kind != "l2"), None)
        role = "gain" if gain else "reader" if "reader" in kinds else "writer"
        stream = uses[0].stream.find() if uses else None
        own = tuple(self._segments(name, dim, role, stream))
        if sum(_is_head(c) for segment in own for c in segment) == 3:
            each = iter((QUERY, KEY, VALUE))
            own = tuple(tuple(next(each) if _is_head(c) else c for c in segment) for segment in own)
        if gain is None or gain.norm is None or gain.norm.kind == "l2":
            return AxisUse(role, own)
        reads = self._stream(name, gain.norm.reads.find(), space_of(str(own[0][0])), "norm")
        return AxisUse("gain", own, Norm(reads, gain.norm.kind, self.eps.get(gain.module, "eps"), gain.offset))  # fmt: skip

    def _segments(self, name: str, dim: Dim, role: str, stream: Stream | None) -> Iterator[Segment]:  # fmt: skip
        whole = find(dim)
        size = self.by_length.get(whole.size)
        if whole.kind != "product" and size:
            yield (self._component(name, whole, size, role, stream),)
            return
        positions = self.sizes.get("positions")
        if positions and whole.kind != "product" and positions < whole.size <= positions + FEW:
            yield from (((whole.size - positions,)), ("positions",))
            return
        parts = segments(dim) or [dim]
        lengths = {find(factor).size for part in parts for factor in factors(part)}
        if not lengths & {*self.by_length, 3 * self.sizes["head_dim"]}:
            yield (whole.size,)
            return
        for part in parts:
            own = factors(part)
            if len(own) > 1 and is_enumerated(own[0]) and find(own[0]).size not in self.by_length:
                yield from [*self._segments(name, product(own[1:]), role, stream)] * find(own[0]).size  # fmt: skip
                continue
            yield tuple(self._factor(name, f, role, stream) for f in own) or (1,)

    def _factor(self, name: str, factor: Dim, role: str, stream: Stream | None) -> str | int | tuple[str, ...]:  # fmt: skip
        n = find(factor).size
        if n in self.by_length:
            return self._component(name, find(factor), self.by_length[n], role, stream)
        if n == 3 * self.sizes["head_dim"]:
            return QUERY, KEY, VALUE
        return n

    def _component(self, name: str, dim: Dim, size: str, role: str, stream: Stream | None) -> str:
        if size == "head_dim":
            return self._head(role, stream)
        if size in LOCAL:
            return f"{size}{self._local(name, dim)}"
        return self._stream(name, stream, SPACE_OF_SIZE.get(size, size), role)

    def _local(self, name: str, dim: Dim) -> str:
        """Return the suffix of a space of one block, or of all blocks of a stack that share it."""
        path, index = self.block(name)
        own, shared = path.partition(".")[0], len(self.places[dim]) > 1
        if (path, dim.size) in self.shared and not shared:
            own = "across"  # the heads of a second attention, beside those that all blocks share
        return "".join(f".{part}" for part in (own * self.by_stack, "" if shared else index) if part)  # fmt: skip

    def _head(self, role: str, stream: Stream | None) -> str:
        """Return the stream of queries, keys or values."""
        if role == "reader" or stream is None:
            return VALUE
        found = QUERY if stream in self.queries else KEY if stream in self.keys else None
        if found:
            return found
        behind = next((n.writes.find() for n in self.tape.norms if n.reads.find() is stream), None)
        which = QUERY if behind in self.queries else KEY if behind in self.keys else None
        return RAW[which] if which else VALUE

    def _stream(self, name: str, stream: Stream | None, space: object, role: str) -> str:
        """Return the name of a stream on a space that has several."""
        if str(space).startswith("head_dim"):
            return self._head("writer", stream)
        own = self.streams.get(stream) if stream else None
        if space == "embedding":
            return "embedding" if stream in self.tables else "embedding:final"
        if space != RESIDUAL or own is None:
            return str(space)
        if own != CHAIN:
            return f"{RESIDUAL}:{own}".rstrip(":")
        if role == "writer" and name.rpartition(".")[0] in self.norm_modules:
            return RESIDUAL
        return RESIDUAL if role in ("reader", "gain") else f"{RESIDUAL}:sum"

    def _name_streams(self) -> dict[Stream, str]:
        """Return the names of the streams of hidden: the sum that blocks add to, what norms write, and what lies behind the blocks."""
        norms = [n for n in self.tape.norms if n.kind != "l2" and n.over[0].size == self.sizes["hidden"]]  # fmt: skip
        self.norm_modules = {n.module for n in norms}
        names: dict[Stream, str] = {}
        for path in self.stacks:
            inside = [n for n in norms if self.block(n.module)[0] == path]
            blocks = {self.block(n.module)[1] for n in inside}
            readers: dict[Stream, set[str]] = defaultdict(set)
            for norm in inside:
                readers[norm.reads.find()].add(self.block(norm.module)[1])
            through = [stream for stream, own in readers.items() if own == blocks]
            if through:
                names[through[0]] = ""
                names |= {n.writes.find(): "normed" for n in inside if n.writes.find() is not through[0]}  # fmt: skip
            else:
                names |= {s.find(): CHAIN for n in inside for s in (n.reads, n.writes)}
        after = iter([] if self.by_stack else ["final"])
        read = {n.reads.find() for n in norms}
        for use in self.tape.uses:
            stream = use.stream.find()
            if stream in names or use.role == "reader" or self._length(use) != self.sizes["hidden"]:
                continue
            names[stream] = self._outer(use, stream, read, after, CHAIN in names.values())
        return names

    def _outer(self, use: Use, stream: Stream, read: set[Stream], after: Iterator[str], chain: bool) -> str:  # fmt: skip
        """Return the name of a stream that neither passes through the blocks nor is a norm's in a block."""
        if self.block(use.tensor)[1]:
            return "branch"
        if use.role == "gain":
            return next(after, use.module.partition(".")[0])
        if stream in self.tables:
            return CHAIN if chain else "embedded"
        return "transform" if stream in read else "pooled"

    def _dims(self, use: Use) -> list[Dim]:
        return self.tape.weights[self.first[use.tensor]].dims

    def _length(self, use: Use) -> int:
        return find(self._dims(use)[use.axis]).size


def _is_head(component: object) -> bool:
    return str(component).startswith("head_dim")


def _inner(dim: Dim) -> Iterator[Dim]:
    """Yield the factors of all segments of a dimension."""
    yield find(dim)
    for part in segments(dim) or [dim]:
        yield from factors(part)
