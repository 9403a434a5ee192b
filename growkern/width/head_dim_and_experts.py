"""Width growth of head_dim and experts, by copies.

head_dim: attention multiplies queries by keys. Only the first copy of a coordinate keeps its query; the other copies have query 0, so
that every product is counted once. All copies keep their key, which gives the zero queries a gradient. RoPE rotates coordinate ``j`` of
a half by an angle that falls with ``j / head_dim``, so source coordinate ``j`` has the angle of target coordinate ``k j`` at ``k`` times
the head_dim. Norms of queries and keys see copies; the zeros are in the gain of the query norm.

experts: the copies of an expert have equal router rows, so the router chooses them together and they share the expert's router weight.
"""

from collections.abc import Iterator, Mapping

from growkern.model.spec import KEY, QUERY, SHARE, ModelSpec
from growkern.planning.decisions import StreamScale
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.method_spaces import Space, even
from growkern.planning.vector import Vector


def problems(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield the reasons why head_dim, experts or top_k cannot grow to ``sizes``."""
    source, target = (s.get("head_dim", 1) for s in (spec.sizes, sizes))
    if target != source and not {QUERY, KEY} <= set(spec.streams):
        yield (
            f"head_dim: the spec of this {spec.family} does not tell queries from keys; "
            "name the streams growkern.model.spec.QUERY, KEY and VALUE in the spec."
        )
    turned = _turned(spec, source), _turned(spec, target)
    if (
        target != source
        and turned[0]
        and (target % source or turned[1] != turned[0] * (target // source))
    ):
        low = max(1, target // source) * source
        yield (
            f"head_dim: the pairs of RoPE keep their angles at whole multiples of {source} only, not at {target}; "
            f"nearest: {low}, {low + source}."
        )
    experts, top_k = ((spec.sizes.get(k, 1), sizes.get(k, 1)) for k in ("experts", "top_k"))
    if experts[1] % experts[0]:
        yield (
            f"experts: all {experts[0]} experts are copied equally often, which {experts[1]} does not allow; nearest whole multiples: "
            + ", ".join(str(experts[1] // experts[0] * experts[0] + n) for n in (0, experts[0]))
            + "."
        )
    elif top_k[1] * experts[0] != top_k[0] * experts[1]:
        yield (
            f"top_k: copies of an expert share its weight only if all of them are chosen: experts={experts[1]} "
            f"needs top_k={top_k[0] * experts[1] // experts[0]}, not {top_k[1]}."
        )


def index_map(spec: ModelSpec, space: Space) -> IndexMap:
    """Return the index map of head_dim or experts: cyclic, but with adjacent copies of the coordinates that RoPE rotates."""
    source, target = space.n_source, space.n_target
    if space.name != "head_dim" or not (turned := _turned(spec, source)):
        return IndexMap.cyclic(source, target)
    k, rest = target // source, source - turned
    passed = [turned + i % rest for i in range(k * rest)]
    return IndexMap.of([*(i // k for i in range(k * turned)), *passed], source)


def stream_scales(space: Space, index_map: IndexMap) -> Iterator[tuple[str, StreamScale]]:
    """Yield every stream of head_dim or experts with its scales."""
    ones = Vector.full(1.0, space.n_target)
    first = Vector.of(float(j != PAD) for j in index_map.first_copies().indices)
    share = even(index_map)
    for stream in space.streams:
        kind = stream.removeprefix("head_dim:raw_")
        if stream == QUERY:
            yield stream, StreamScale(first, first)
        elif stream == KEY or kind != stream:
            yield stream, StreamScale(ones, first)
        else:
            yield stream, StreamScale(share.readout, share.activation) if stream == SHARE else share


def is_split(space: Space, apart: int) -> bool:
    """True for the space of kv heads if they grow while heads do not, and for the space of the groups that they split."""
    return apart > 1 and space.size in ("kv_heads", "group")


def split(space: Space) -> IndexMap:
    """Return an index map with adjacent copies of a kv head: each copy serves the next share of the source head's queries."""
    copies = max(1, space.n_target // space.n_source)
    return IndexMap.of((i // copies for i in range(space.n_target)), space.n_source)


def joint(
    spec: ModelSpec, maps: Mapping[str, IndexMap], apart: int
) -> dict[tuple[str, str], IndexMap]:
    """Return identity maps of the query heads (kv_heads x group) if kv heads split their groups, else no maps."""
    heads = IndexMap.identity(spec.sizes.get("heads", 1))
    groups = [name for name in maps if name.startswith("group")] if apart > 1 else []
    return {(name.replace("group", "kv_heads"), name): heads for name in groups}


def notes(spec: ModelSpec, sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield notes for the user."""
    if (
        any(norm.reads.startswith("head_dim") for _, _, norm in spec.norms())
        and sizes["head_dim"] != spec.sizes["head_dim"]
    ):
        yield "norms of queries and keys see copies: the optimizer state before them is that of the first."
    if sizes.get("experts") != spec.sizes.get("experts"):
        yield f"a token goes through {sizes['top_k']} experts, not {spec.sizes['top_k']}: their compute grows with top_k."


def _turned(spec: ModelSpec, head_dim: int) -> int:
    return int(head_dim * spec.rotary)
