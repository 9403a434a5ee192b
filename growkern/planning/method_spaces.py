"""Helpers of width methods: sizes that a method grows, spaces and their norms, even splits, and scales of tied weights."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from growkern.errors import PlanError, raise_all
from growkern.model.size_values import size_of_space, space_of, space_size
from growkern.model.spec import ModelSpec, writer_corrections
from growkern.planning.decisions import StreamScale
from growkern.planning.index_map import IndexMap
from growkern.planning.sizes import width_of
from growkern.planning.vector import Vector

GROWS = ("hidden", "heads", "kv_heads", "ffn", "positions")
INNER = ("head_dim", "experts")  # sizes that only width.Lossless grows
OTHERS = dict.fromkeys((*GROWS, *INNER, "top_k"), "width.Lossless") | {"vocab": "growkern.vocab"}


class Space(NamedTuple):
    """One space of a model: its streams, its sizes before and after, the kinds of norms that read it, and streams behind activations."""

    name: str
    streams: list[str]
    n_source: int
    n_target: int
    norms: set[str]
    activated: list[str]

    @property
    def size(self) -> str:
        """Name of the size for users."""
        return size_of_space(self.name)

    @property
    def same(self) -> bool:
        """True when the space does not grow."""
        return self.n_target == self.n_source

    @property
    def whole(self) -> bool:
        """True when the target is a whole multiple of the source."""
        return self.n_target % self.n_source == 0


def refuse(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    who: str,
    problems: Iterable[str] = (),
    grows: Sequence[str] = GROWS,
) -> None:
    """Raise PlanError for sizes that the method ``who`` does not grow, and for its other problems."""
    deep = {"layers", *(stack.size for stack in spec.stacks)}
    unsupported = [
        f"{name}: {who} does not grow it ({spec.sizes[name]} -> {n}); it grows {', '.join(grows)}"
        + (f", and {OTHERS[name]} grows {name}, in a call of its own." if name in OTHERS else ".")
        for name, n in sizes.items()
        if n != spec.sizes[name] and width_of(name) not in grows and name not in deep
    ]
    if INNER[0] not in grows and splits(spec, sizes) > 1:
        unsupported.append(
            f"kv_heads: {who} keeps groups of heads whole; name heads too, or use width.Lossless, which splits the groups."
        )
    raise_all(PlanError, f"cannot widen {spec.family}:", [*unsupported, *problems])


def splits(spec: ModelSpec, sizes: Mapping[str, int]) -> int:
    """Return the number of kv heads that divide the queries of one source kv head: more than 1 if kv heads grow and heads do not."""
    if "kv_heads" not in sizes or sizes["heads"] != spec.sizes["heads"]:
        return 1
    return sizes["kv_heads"] // spec.sizes["kv_heads"]


def spaces(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[Space]:
    """Yield every space of the model."""
    norms = spec.normed
    for name, streams in spec.spaces.items():
        kinds = {kind for stream in streams if stream in norms for kind in norms[stream]}
        activated = [stream for stream in streams if stream in spec.activated]
        n_source, n_target = space_size(name, spec.sizes), space_size(name, sizes)
        yield Space(name, streams, n_source, n_target, kinds, activated)


def normed(spec: ModelSpec) -> set[str]:
    """Return the streams that norms read, and the parts of such streams."""
    return {*spec.normed, *spec.parts}


def even(index_map: IndexMap) -> StreamScale:
    """Return the scale of an even split: copies are not scaled, readers are divided by the number of copies: ``w = 1``, ``u = 1 / C``."""
    w = Vector.full(1.0, index_map.n_target)
    return StreamScale(w, index_map.per_copy(lambda count: 1 / count, pad=1.0))


def positions(index_map: IndexMap) -> StreamScale:
    """Return the scale of positions: a new position starts as the mean of the others."""
    ones = Vector.full(1.0, index_map.n_target)
    return StreamScale(ones, ones, "mean")


def solve_ties(
    spec: ModelSpec,
    sizes: Mapping[str, int],
    maps: Mapping[str, IndexMap],
    stream_scales: dict[str, StreamScale],
) -> None:
    """Set the scales of streams that tied tensors read: a tied tensor that writes one stream and reads another has only one scale.

    For a tied head, the factor 1/C goes into the final norm, which writes the stream that the head reads.
    """
    factors = writer_corrections(spec, sizes)
    for stream, origin in tied_streams(spec):
        if stream_scales[origin].centered:
            raise PlanError(
                f"cannot center {spec.family}: the tensor that writes {origin!r} is tied to the one that reads {stream!r}, so "
                "the mean would reach the logits; use norms='mean_pad'."
            )
        ones = Vector.full(factors.get(origin, 1.0), len(stream_scales[origin].activation))
        u = stream_scales[origin].activation.zip(ones, lambda w, factor: w * factor)
        counts = maps[space_of(stream)].per_copy(float, pad=1.0)
        stream_scales[stream] = StreamScale(
            u.zip(counts, lambda x, c: 1 / (x * c)), u, stream_scales[stream].pad
        )


def tied_streams(spec: ModelSpec) -> Iterator[tuple[str, str]]:
    """Yield the stream that a tied tensor reads and the stream that it writes.

    Raises:
        PlanError: The two streams are the same.
    """
    for tied, first in spec.ties.items():
        for use, other in zip(spec.tensors[tied], spec.tensors[first], strict=True):
            if (use.role, other.role) != ("reader", "writer") or not use.streams:
                continue
            stream, origin = str(use.segments[0][0]), str(other.segments[0][0])
            if stream == origin:
                raise PlanError(
                    f"cannot widen {spec.family}: {tied!r} reads the stream that it writes; name another stream "
                    "for the readers after the last norm."
                )
            yield stream, origin
