"""Uses of parameters -> the axes of a spec: which streams an axis reads and writes, and the norms between streams."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from growkern.model.size_values import space_of
from growkern.model.spec import AxisUse, Norm, Segment
from growkern.model.tracing import values
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.terms import Dim, atoms, factors, find, is_enumerated, product, segments
from growkern.model.tracing.values import Stream, Use
from growkern.support.names import named_modules

EPS = "eps", "variance_epsilon", "epsilon", "norm_eps", "layer_norm_eps"


@dataclass
class Roles:
    """The tensors of a spec.

    Attributes:
        tensors: Name of every parameter and buffer -> its axes.
        ties: Name of a tied tensor -> first name of the same parameter.
        whole: Size -> why it grows by whole multiples only.
        bare: Stream that a norm without parameters reads -> kind of the norm. A stream that is to be copied counts as one.
        copied: Spaces that grow by copies of all coordinates.
        summed: Streams that norms alone read, and that are sums of what tensors write.
        post_norm: True when a LayerNorm reads what another LayerNorm wrote into a stream.
    """

    spaces: Spaces
    tensors: dict[str, tuple[AxisUse, ...]] = field(default_factory=dict[str, tuple[AxisUse, ...]])
    ties: dict[str, str] = field(default_factory=dict[str, str])
    whole: dict[str, str] = field(default_factory=dict[str, str])
    bare: dict[str, str] = field(default_factory=dict[str, str])
    copied: set[str] = field(default_factory=set[str])
    summed: list[str] = field(default_factory=list[str])
    post_norm: bool = False
    main: dict[Dim, Stream] = field(default_factory=dict[Dim, Stream])
    final: set[Stream] = field(default_factory=set[Stream])
    written_by_norms: set[Stream] = field(default_factory=set[Stream])
    scaled: dict[Stream, int] = field(default_factory=dict[Stream, int])
    numbers: dict[Stream, int] = field(default_factory=dict[Stream, int])

    def stream(self, atom: Dim, stream: Stream) -> str:
        """Return the name of a stream on a space: residual streams have names, other spaces have one stream."""
        name, own = self.spaces.names[atom], stream.find()
        if atom not in self.spaces.normed or own is self.main.get(atom):
            return name
        if own in self.scaled:
            return f"{name}:scaled{self.scaled[own] or ''}"
        if own in self.final:
            return f"{name}:final"
        if own in self.written_by_norms:
            return f"{name}:normed"
        return f"{name}:s{self.numbers.setdefault(own, len(self.numbers) + 1)}"

    def restrict(self, atom: Dim, why: str) -> None:
        """Say why the size of an atom grows by whole multiples only, and by copies of all coordinates."""
        size = self.spaces.size_of(atom)
        if size:
            self.whole.setdefault("heads" if size == "group" else size, why)
            self.copied.add(self.spaces.names[atom])


def eps_names(model: nn.Module, norms: Sequence[values.Norm]) -> dict[str, str]:
    """Return the attribute of every module that holds the epsilon of a norm."""
    modules = dict(named_modules(model))
    return {
        norm.module: name
        for norm in norms
        for name in reversed(EPS)
        if norm.eps is not None and getattr(modules[norm.module], name, None) == norm.eps
    }


def find_roles(
    spaces: Spaces,
    weights: Mapping[str, Sequence[Dim]],
    names: Mapping[str, Sequence[str]],
    uses: Sequence[Use],
    norms: Sequence[values.Norm],
    statistics: Sequence[values.Statistic],
    eps: Mapping[str, str],
    scalings: Sequence[values.Scaling],
) -> Roles:
    """Turn the uses of parameters into the axes of a spec.

    Args:
        spaces: The named spaces.
        weights: First name of every tensor -> its dimensions.
        names: First name of every tensor -> all its names.
        uses: Uses of the axes of the tensors.
        norms: The norms.
        statistics: Means and variances, those of norms among them.
        eps: Module of a norm -> attribute that holds its epsilon.
        scalings: Scalings that the writers of a stream can take back.
    """
    roles = Roles(spaces)
    for scaling in scalings:
        roles.scaled.setdefault(scaling.before.find(), len(roles.scaled))
    by_axis: dict[tuple[str, int], list[Use]] = defaultdict(list)
    for use in uses:
        by_axis[use.tensor, use.axis].append(use)
    _name_streams(roles, norms, uses, names)
    for first, dims in weights.items():
        for name in names[first]:
            if name != first:
                roles.ties[name] = first
            row = [
                _axis(roles, name, d, by_axis[name, i] or by_axis[first, i], eps)
                for i, d in enumerate(dims)
            ]
            roles.tensors[name] = tuple(row)
    _plain_readers(roles)
    _bare_norms(roles, norms, statistics)
    _nonlinear(roles, norms)
    _mark_copied(roles)
    roles.summed = [*_summed(roles, norms)]
    return roles


def _summed(roles: Roles, norms: Sequence[values.Norm]) -> Iterator[str]:
    """Yield the streams that norms alone read, and on which no operation acts that is not linear."""
    names = {a.norm.reads: "" for row in roles.tensors.values() for a in row if a.norm}
    read = {
        s for row in roles.tensors.values() for a in row if a.role == "reader" for s in a.streams
    }
    bent = {
        roles.stream(atom, norm.reads)
        for norm in norms
        if norm.reads.find().nonlinear
        for d in norm.over
        for atom in atoms(d)
        if atom in roles.spaces.names
    }
    yield from (name for name in names if name not in read | bent)


def _name_streams(roles: Roles, norms: Sequence[values.Norm], uses: Sequence[Use], names: Mapping[str, Sequence[str]]) -> None:  # fmt: skip
    """The main stream of a space is the one that most norms read; a tied tensor reads the final one."""
    counts: dict[Dim, Counter[Stream]] = defaultdict(Counter)
    for norm in norms:
        for atom in {a for d in norm.over for a in atoms(d)}:
            counts[atom][norm.reads.find()] += 1
    roles.main = {atom: count.most_common(1)[0][0] for atom, count in counts.items()}
    roles.written_by_norms = {u.norm.writes.find() for u in uses if u.norm}
    tied = {name for own in names.values() if len(own) > 1 for name in own}
    roles.final = {u.stream.find() for u in uses if u.tensor in tied and u.role == "reader"}
    writes = {n.writes.find() for n in norms if n.kind == "layer"}
    roles.post_norm = any(n.kind == "layer" and n.reads.find() in writes for n in norms)


def _axis(roles: Roles, name: str, dim: Dim, uses: Sequence[Use], eps: Mapping[str, str]) -> AxisUse:  # fmt: skip
    spaces = roles.spaces
    grown = [a for a in atoms(dim) if a in spaces.names]
    kinds = {u.role for u in uses}
    stream = uses[0].stream if uses else Stream()
    role = "reader" if "reader" in kinds else "writer"
    if not grown:
        return AxisUse("reader" if kinds == {"reader"} else "writer", _segments(roles, dim, stream))
    if "reader" in kinds and len(kinds) > 1:
        for atom in grown:
            spaces.fixed[atom] = {f"{name} is read and written under one name": ""}
    if len({u.stream.find() for u in uses}) > 1 and "gain" not in kinds and any(a in spaces.normed for a in grown):  # fmt: skip
        for atom in grown:
            roles.restrict(atom, f"{name} is used with several streams")
    gain = next((u for u in uses if u.role == "gain" and u.norm), None)
    if gain is not None and gain.norm is not None and gain.norm.kind != "l2":
        over = {a for d in gain.norm.over for a in atoms(d)}
        if len(grown) == 1 and grown[0] in over & spaces.normed and find(dim) is grown[0]:
            norm = Norm(roles.stream(grown[0], gain.norm.reads), gain.norm.kind, eps.get(gain.module), gain.offset)  # fmt: skip
            return AxisUse("gain", _segments(roles, dim, gain.stream), norm)
        for atom in grown:
            roles.restrict(atom, f"the norm of {name} is over several sizes")
    return AxisUse(role, _segments(roles, dim, stream))


def _segments(roles: Roles, dim: Dim, stream: Stream) -> tuple[Segment, ...]:
    result = list[Segment]()
    for part in segments(dim) or [dim]:
        own = factors(part)
        if len(own) > 1 and is_enumerated(own[0]):
            result += _segments(roles, product(own[1:]), stream) * find(own[0]).size
            continue
        components = [_component(roles, f, stream) for f in own]
        result.append(tuple(components) or (1,))
    return tuple(result)


def _component(roles: Roles, factor: Dim, stream: Stream) -> str | int | tuple[str | int, ...]:
    """Return one factor of a segment: a stream, a fixed size, or streams side by side."""
    names = roles.spaces.names
    if not any(a in names for a in atoms(factor)):
        return find(factor).size
    if find(factor).kind == "atom":
        return roles.stream(find(factor), stream)
    parts = list[str | int]()
    for part in segments(factor):
        own = factors(part)
        if len(own) == 1 and own[0] in names:
            parts.append(roles.stream(own[0], stream))
        elif not any(a in names for a in atoms(part)):
            parts.append(find(part).size)
        else:
            for atom in atoms(factor):
                roles.spaces.fixed[atom] = {"it stands beside other sizes inside a product": ""}
            return find(factor).size
    return tuple(parts)


def _plain_readers(roles: Roles) -> None:
    """A stream that is read and written by no tensor is computed: its readers read the main stream of its space."""
    written = {s for row in roles.tensors.values() for axis in row if axis.role != "reader" for s in axis.streams}  # fmt: skip

    def plain(stream: object) -> object:
        if isinstance(stream, tuple):
            return tuple(map(plain, stream))  # pyright: ignore
        return space_of(stream) if isinstance(stream, str) and stream not in written else stream

    for name, row in roles.tensors.items():
        roles.tensors[name] = tuple(_replaced(axis, plain, written) for axis in row)


def _replaced(axis: AxisUse, plain: Callable[[object], object], written: set[str]) -> AxisUse:
    if axis.role == "reader":
        own = tuple(tuple(plain(c) for c in segment) for segment in axis.segments)
        return replace(axis, segments=own)
    if axis.norm is not None:
        reads = plain(axis.norm.reads)
        if reads not in written:
            return AxisUse("writer", axis.segments)
        return replace(axis, norm=replace(axis.norm, reads=reads))
    return axis


def _bare_norms(roles: Roles, norms: Sequence[values.Norm], statistics: Sequence[values.Statistic]) -> None:  # fmt: skip
    """Note norms without parameters, norms over several sizes, and means that are no norm's: copies keep them, pads would not."""
    for norm in norms:
        own = {a for d in norm.over for a in atoms(d)}
        where = norm.module or "the model"
        several = len(own) > 1
        if norm.gained and norm.kind != "l2" and not several:
            continue
        why = f"an l2 norm in {where} is over it" if norm.kind == "l2" else f"a norm in {where} is over several sizes"  # fmt: skip
        _keep_squares(
            roles,
            own,
            norm.reads,
            "layer" if norm.kind == "layer" else "rms",
            why if several or norm.kind == "l2" else None,
        )
    for statistic in statistics:
        if not statistic.of_norm and statistic.op != "sum":
            own = {a for d in statistic.over for a in atoms(d)}
            _keep_squares(
                roles, own, statistic.stream, "layer", f"a {statistic.op} over it is used"
            )


def _keep_squares(roles: Roles, own: set[Dim], stream: Stream, kind: str, why: str | None) -> None:
    for atom in own & roles.spaces.names.keys():
        if why:
            roles.restrict(atom, why)
        else:
            roles.bare[roles.stream(atom, stream)] = kind


def _mark_copied(roles: Roles) -> None:
    """Count a stream of each space that is to be copied as one that a norm without parameters reads, which growkern only copies."""
    kinds = {axis.norm.reads: axis.norm.kind for row in roles.tensors.values() for axis in row if axis.norm}  # fmt: skip
    streams = dict.fromkeys(
        s
        for row in roles.tensors.values()
        for axis in row
        for s in (*axis.streams, *((axis.norm.reads,) if axis.norm else ()))
    )
    for space in roles.copied:
        own = [s for s in streams if space_of(s) == space]
        if own:
            stream = next((s for s in own if s in kinds), own[0])
            roles.bare[stream] = kinds.get(stream, "rms")
    roles.bare = {stream: kind for stream, kind in roles.bare.items() if stream in streams}


def _nonlinear(roles: Roles, norms: Sequence[values.Norm]) -> None:
    """A normalized stream that more than sums write is not scaled by what scales its writers."""
    for norm in norms:
        why = norm.reads.find().nonlinear
        for atom in {a for d in norm.over for a in atoms(d)} & roles.spaces.names.keys():
            if why and atom in roles.spaces.normed:
                roles.restrict(atom, f"a norm reads a stream, and {why}")
