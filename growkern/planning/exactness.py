"""Why a growth does not preserve the function: derived from a decision and the description of the model, whatever a method says."""

from collections.abc import Iterator
from math import isclose

from growkern.model.spec import KEY, QUERY, RAW, SHARE, ModelSpec, space_of
from growkern.planning.axis_scales import norm_factors
from growkern.planning.decisions import WidthDecision
from growkern.planning.growth_plan import AxisMap, GrowthPlan
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector

TOLERANCE = 1e-9


def inexact(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> Iterator[str]:
    """Yield the reasons why the target does not compute the source's function.

    Args:
        plan: Plan whose rows and axes follow from ``wide`` and its blocks.
        spec: Description of the source model.
        wide: Decision of the width or shrink method.
    """
    yield from _depth(plan, spec)
    if plan.target_sizes.get("vocab") != plan.source_sizes.get("vocab"):
        yield "the vocabulary changes"
    if any(row.next_layer_source for row in plan.tensors):
        yield "rows come from the next layer"
    if wide.readers:
        yield "readers copy other coordinates than their writers"
    split = {space for pair in wide.joint for space in pair}
    yield from _once(
        _stream(spec, wide, stream) for stream in spec.streams if space_of(stream) not in split
    )
    yield from _once(
        _norm(plan, spec, wide, stream, f) for stream, f in norm_factors(spec, wide).items()
    )
    if wide.norms_kept:
        yield "norms see coordinates that the source does not have"
    yield from _added(plan, spec, wide)
    yield from _once(_pads(plan, spec, wide, space) for space in spec.spaces)
    yield from _once(_noise(plan, spec, wide, stream) for stream in spec.streams if wide.noise)
    yield from _attention(plan, spec, wide)
    yield from _experts(plan, wide)
    yield from _ties(plan, spec)


def _once(reasons: Iterator[str | None]) -> Iterator[str]:
    yield from dict.fromkeys(reason for reason in reasons if reason)


def _depth(plan: GrowthPlan, spec: ModelSpec) -> Iterator[str]:
    """Yield the reasons of new blocks and of dropped blocks."""
    rows = {row.name: row for row in plan.tensors}
    for stack in spec.stacks:
        blocks = plan.stacks[stack.path]
        if len({block.source for block in blocks}) < spec.sizes[stack.size]:
            yield "blocks are dropped"
        if any(block.branch != 1 for block in blocks):
            yield "branches are scaled"
        new = [index for index, block in enumerate(blocks) if block.new]
        zeroed = (rows.get(f"{stack.path}.{index}.{name}") for index in new for name in stack.identity)  # fmt: skip
        if new and (not stack.identity or any(row and row.constant is None for row in zeroed)):
            yield "new blocks are no identity"
        elif new:
            yield from stack.reasons


def _stream(spec: ModelSpec, wide: WidthDecision, stream: str) -> str | None:
    """Return why readers of a stream do not get back what its writers write."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    if index_map.is_identity and scale.activation.uniform == scale.readout.uniform == 1:
        return None
    if not sums_to_one(index_map, _times(scale.activation, scale.readout)):
        return f"the shares of copies on {stream.partition('.')[0]!r} do not sum to 1"
    space = space_of(stream)
    normed = {space_of(norm.reads) for _, _, norm in spec.norms()}
    linear = space in normed or stream in (QUERY, KEY, SHARE, *RAW.values())
    if not linear and not _is_one(index_map, scale.activation):
        return f"activations on {space.partition('.')[0]!r} are scaled before a nonlinear function"
    return None


def _times(left: Vector, right: Vector) -> Vector:
    return left.zip(right, lambda x, y: x * y)


def _is_one(index_map: IndexMap, scale: Vector) -> bool:
    """True when all coordinates that copy a source coordinate have the scale 1."""
    if scale.uniform is not None:
        return isclose(scale.uniform, 1, rel_tol=TOLERANCE)
    pairs = zip(index_map.indices, scale.expanded(), strict=True)
    return all(j == PAD or isclose(x, 1, rel_tol=TOLERANCE) for j, x in pairs)


def sums_to_one(index_map: IndexMap, shares: Vector) -> bool:
    """True when the shares of the copies of every source coordinate sum to 1."""
    if (share := shares.uniform) is not None:
        return all(isclose(n * share, 1, rel_tol=TOLERANCE) for n, _ in index_map.counts.repeats)
    sums = [0.0] * index_map.n_source
    for j, share in zip(index_map.indices, shares.expanded(), strict=True):
        if j != PAD:
            sums[j] += share
    return all(isclose(total, 1, rel_tol=TOLERANCE) for total in sums)


def _norm(
    plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision, stream: str, factor: float | None
) -> str | None:
    """Return why a norm of a stream does not give the source's activations."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    kinds = {norm.kind for _, _, norm in spec.norms() if norm.reads == stream}
    if index_map.is_identity and scale.activation.uniform == 1:
        return None
    if factor is None:
        return f"the norms of {stream!r} see unequal copies"
    if "layer" in kinds and not _is_one(index_map, scale.activation):
        return f"the mean that the norms of {stream!r} subtract changes"
    if not index_map.has_pads:
        return None
    writers = [*_axes(plan, spec, stream, "writer")]
    gains = any(axis.role == "gain" and stream in axis.streams for axis in spec.axes)
    mean = all(own.pad == "mean" or (own.pad == "zero" and own.centered) for own in writers)
    zero = all(own.pad == "zero" and not own.centered for own in writers)
    if not (zero if kinds == {"rms"} else kinds == {"layer"} and mean and not gains):
        return f"the norms of {stream!r} see new coordinates"
    return None


def _added(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> Iterator[str]:
    """Yield a reason if a stream that is added to one that norms read has another scale than this one."""
    normed = {norm.reads for _, _, norm in spec.norms()}
    for stream in spec.activation_scales.keys() - normed - {QUERY, KEY}:
        space, w = space_of(stream), wide.stream_scales[stream].activation
        sums = [other for other in spec.spaces[space] if other in normed]
        if not [*_axes(plan, spec, stream, "reader")] and not all(
            close(w, wide.stream_scales[other].activation, wide.maps[space]) for other in sums
        ):
            yield f"{stream!r} has another scale than the stream that it is added to"


def _axes(plan: GrowthPlan, spec: ModelSpec, stream: str, role: str) -> Iterator[AxisMap]:
    for axis, key in spec.axes.items():
        if axis.role == role and stream in axis.streams:
            yield plan.axes[key]


def _pads(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision, space: str) -> str | None:
    """Return why new coordinates of a space reach the output: some activation is not 0, and some reader is not 0."""
    if not wide.maps[space].has_pads or space in ("vocab", "positions"):
        return None
    streams = spec.spaces[space]
    read = [axis for stream in streams for axis in _axes(plan, spec, stream, "reader")]
    normed = {norm.reads for _, _, norm in spec.norms()}
    silent = not normed & {*streams} and read and all(axis.pad == "zero" for axis in read)
    sources = {stream: [*_axes(plan, spec, stream, "writer")] for stream in streams}
    quiet = all(
        axis.pad == "zero" or (axis.pad == "mean" and stream in normed)
        for stream, axes in sources.items()
        for axis in axes
    )
    if silent or quiet:
        return None
    return f"readers see new coordinates of {space.partition('.')[0]!r}"


def _noise(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision, stream: str) -> str | None:
    """Return why twin noise, which is scaled as the reader is, does not cancel: the copies of a coordinate have unequal shares."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    shares = _times(scale.activation, scale.readout)
    if shares.uniform is not None or not [*_axes(plan, spec, stream, "reader")]:
        return None
    values = dict[int, float]()
    for j, x in zip(index_map.indices, shares.expanded(), strict=True):
        if j != PAD and not isclose(values.setdefault(j, x), x, rel_tol=TOLERANCE):
            return f"noise is on copies of unequal shares on {stream!r}"
    return None


def _attention(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> Iterator[str]:
    """Yield a reason if products of queries and keys change, or if RoPE turns a pair by another angle."""
    source, target = (sizes.get("head_dim", 1) for sizes in (plan.source_sizes, plan.target_sizes))
    if QUERY not in wide.stream_scales or KEY not in wide.stream_scales:
        if source != target:
            yield "head_dim grows, and nothing tells queries from keys"
        return
    index_map = wide.maps["head_dim"]
    products = _times(wide.stream_scales[QUERY].activation, wide.stream_scales[KEY].activation)
    if not sums_to_one(index_map, products):
        yield "products of queries and keys change"
    turned = int(source * spec.rotary), int(target * spec.rotary)
    if source == target or not turned[0]:
        return
    k = target // source
    pairs = [*zip(index_map.indices, products.expanded(), strict=True)]
    if target % source or turned[1] != k * turned[0] or any(
        x and (i != j * k if i < turned[1] else j < turned[0]) for i, (j, x) in enumerate(pairs)
    ):  # fmt: skip
        yield "RoPE turns copies by other angles"


def _experts(plan: GrowthPlan, wide: WidthDecision) -> Iterator[str]:
    """Yield a reason if the router chooses other experts, or weighs them in another way."""
    source, target = plan.source_sizes, plan.target_sizes
    if "experts" not in source or "experts" not in wide.maps:
        return
    counts = {n for n, _ in wide.maps["experts"].counts.repeats}
    top_k = target.get("top_k", 1) * source["experts"], source.get("top_k", 1) * target["experts"]
    if len(counts) > 1 or wide.maps["experts"].has_pads or top_k[0] != top_k[1]:
        yield "the router chooses other experts"


def _ties(plan: GrowthPlan, spec: ModelSpec) -> Iterator[str]:
    """Yield a reason if a tied tensor, which has no row of its own, has another scale than the tensor that it is tied to."""
    for tied, first in spec.ties.items():
        for one, other in zip(spec.tensors[tied], spec.tensors[first], strict=True):
            left, right = plan.axes[spec.axes[one]], plan.axes[spec.axes[other]]
            same = left.index_map == right.index_map and close(
                left.weight_scale, right.weight_scale, left.index_map
            )
            if not same:
                yield "tied tensors have different scales"
                return


def close(left: Vector, right: Vector, index_map: IndexMap | None = None) -> bool:
    """True when two vectors of a length agree up to rounding; with an index map, at coordinates that copy a source coordinate."""
    if len(left) != len(right):
        return False
    same = left.zip(right, lambda x, y: float(isclose(x, y, rel_tol=TOLERANCE, abs_tol=1e-30)))
    if index_map is not None and index_map.has_pads and same.uniform != 1:
        return all(ok or j == PAD for ok, j in zip(same.expanded(), index_map.indices, strict=True))
    return same.uniform == 1 or not left.repeats
