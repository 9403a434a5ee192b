"""Why a growth does not preserve the function: derived from a decision and the description of the model, whatever a method says."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import replace
from math import isclose

from growkern.errors import PlanError
from growkern.model.size_values import space_of
from growkern.model.spec import KEY, QUERY, RAW, SHARE, ModelSpec, on_residual
from growkern.planning.axis_scales import mean_square_factor, norm_factors
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
    yield from inexact_width(plan, spec, wide)


def inexact_width(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> Iterator[str]:
    """Yield the reasons that the width method, not the depth method, gives; see ``inexact``."""
    if plan.target_sizes.get("vocab") != plan.source_sizes.get("vocab"):
        yield "the vocabulary changes"
    if any(row.next_layer_source for row in plan.tensors):
        yield "rows come from the next layer"
    if any(row.is_perturbed for row in plan.tensors):
        yield "weights are shrunk or perturbed"
    if any(index_map != wide.maps[space] for space, index_map in wide.readers.items()):
        yield "readers copy other coordinates than their writers"
    uses = _uses(plan, spec)
    split = {space for pair in wide.joint for space in pair}
    linear = _linear(spec)
    kinds = _kinds(wide, [stream for stream in spec.streams if space_of(stream) not in split])
    yield from _once(_stream(wide, stream, linear) for stream in kinds)
    yield from _once(
        _norm(spec, wide, uses, stream, f) for stream, f in norm_factors(spec, wide).items()
    )
    if wide.norms_kept and not _same_squares(wide, spec.normed):
        yield "norms see coordinates that the source does not have"
    if spec.unsaid and not _same_squares(wide, spec.spaces.get("residual", ())):
        yield "a norm that the spec does not name may see another mean square"
    yield from _added(spec, wide, uses)
    yield from _once(_pads(spec, wide, uses, space) for space in spec.spaces)
    yield from _raw(spec, wide, uses)
    noisy = _kinds(wide, [s for s in spec.streams if ("reader", s) in uses]) if wide.noise else ()
    yield from _once(_noise(wide, stream) for stream in noisy)
    yield from _attention(plan, spec, wide)
    yield from _experts(plan, wide)
    yield from _ties(plan, spec)


def checked(plan: GrowthPlan, spec: ModelSpec, wide: WidthDecision) -> GrowthPlan:
    """Return a plan with the reasons that its axes give, whatever the width method says; raise PlanError if the method promised none."""
    found = [*inexact_width(plan, spec, wide)]
    if found and wide.promised:
        why = f"cannot widen {spec.family} exactly by {plan.width}: {found[0]}."
        raise PlanError(
            f"{why} Whole multiples are exact more often; FPI() grows without a promise."
        )
    return replace(plan, reasons=(*dict.fromkeys((*plan.reasons, *found)),)) if found else plan


Uses = Mapping[tuple[str, str], list[AxisMap]]  # role and stream -> axes of that role


def _uses(plan: GrowthPlan, spec: ModelSpec) -> Uses:
    uses: dict[tuple[str, str], list[AxisMap]] = {}
    for axis, key in spec.axes.items():
        for stream in axis.streams:
            uses.setdefault((axis.role, stream), []).append(plan.axes[key])
    return uses


def _kinds(wide: WidthDecision, streams: Iterable[str]) -> Iterable[str]:
    """Return the streams without those that differ from another one in the block only."""
    kinds = {
        (stream.partition(".")[0], stream.partition(":")[2], id(wide.maps[space_of(stream)]), id(wide.stream_scales[stream])): stream
        for stream in streams
    }  # fmt: skip
    return kinds.values()


def _same_squares(wide: WidthDecision, streams: Iterable[str]) -> bool:
    maps, scales = wide.maps, wide.stream_scales
    return all(mean_square_factor(maps[space_of(s)], scales[s].activation) == 1 for s in streams)


def _linear(spec: ModelSpec) -> set[str]:
    """Return the streams whose scale reaches only norms, linear layers and products that cancel it."""
    normed = {space_of(stream) for stream in spec.normed} - {space_of(s) for s in spec.activated if not on_residual(s)}  # fmt: skip
    linear = {s for s in spec.streams if space_of(s) in normed and s not in spec.activated}
    return linear | {QUERY, KEY, SHARE, *RAW.values()}


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


def _stream(wide: WidthDecision, stream: str, linear: Set[str]) -> str | None:
    """Return why readers of a stream do not get back what its writers write."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    if index_map.is_identity and scale.activation.uniform == scale.readout.uniform == 1:
        return None
    if not sums_to_one(index_map, _times(scale.activation, scale.readout)):
        return f"the shares of copies on {stream.partition('.')[0]!r} do not sum to 1"
    if stream not in linear and not _is_one(index_map, scale.activation):
        name = space_of(stream).partition(".")[0]
        return f"activations on {name!r} are scaled before a nonlinear function"
    return None


def _times(left: Vector, right: Vector) -> Vector:
    return left.zip(right, lambda x, y: x * y)


def _is_one(index_map: IndexMap, scale: Vector) -> bool:
    """True when all coordinates that copy a source coordinate have the scale 1."""
    if scale.uniform is not None:
        return isclose(scale.uniform, 1, rel_tol=TOLERANCE)
    pairs = zip(index_map.indices, scale.expanded(), strict=True)
    return all(j == PAD or isclose(x, 1, rel_tol=TOLERANCE) for j, x in pairs)


def _is_even(index_map: IndexMap, scale: Vector) -> bool:
    """True when all coordinates that copy a source coordinate have one scale."""
    first = next(x for j, x in zip(index_map.indices, scale.expanded(), strict=True) if j != PAD)
    return _is_one(index_map, scale.map(lambda x: x / first if first else x))


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
    spec: ModelSpec, wide: WidthDecision, uses: Uses, stream: str, factor: float | None
) -> str | None:
    """Return why a norm of a stream does not give the source's activations."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    kinds = spec.normed[stream]
    writers = uses.get(("writer", stream), [])
    if "rms" in kinds and any(own.centered for own in writers):
        return f"an RMSNorm of {stream!r} sees the mean, which is subtracted"
    if index_map.is_identity and scale.activation.uniform == 1:
        return None
    if factor is None:
        return f"the norms of {stream!r} see unequal copies"
    if factor != 1 and stream in (spec.non_affine_norms or ()):
        return f"the norm without parameters on {stream!r} sees another mean square"
    if factor != 1 and any(n.eps is None for _, _, n in spec.norms() if n.reads == stream):
        return f"a norm of {stream!r} sees another mean square, and its epsilon cannot change"
    if "layer" in kinds and not _is_even(index_map, scale.activation):
        return f"the mean that the norms of {stream!r} subtract changes"
    if not index_map.has_pads:
        return None
    if stream in spec.activated:
        return f"the norms of {stream!r} may see new coordinates behind an activation function"
    mean = all(own.pad == "mean" or (own.pad == "zero" and own.centered) for own in writers)
    zero = all(own.pad == "zero" and not own.centered for own in writers)
    quiet = mean and ("gain", stream) not in uses if kinds == {"layer"} else zero and kinds == {"rms"}  # fmt: skip
    return None if quiet else f"the norms of {stream!r} see new coordinates"


def _added(spec: ModelSpec, wide: WidthDecision, uses: Uses) -> Iterator[str]:
    """Yield a reason if a part of a stream that norms read has another scale or other pads than this stream."""
    for stream in sorted(spec.parts):
        space, w = space_of(stream), wide.stream_scales[stream].activation
        index_map, pads = wide.maps[space], _pads_of(uses, stream)
        sums = [other for other in spec.spaces[space] if other in spec.normed]
        if not all(close(w, wide.stream_scales[other].activation, index_map) for other in sums):
            yield f"{stream!r} has another scale than the stream that it is added to"
        elif index_map.has_pads and any(_pads_of(uses, other) - pads for other in sums):
            yield f"{stream!r} has other new coordinates than the stream that it is added to"


def _pads_of(uses: Uses, stream: str) -> set[tuple[str, bool]]:
    return {(own.pad, own.centered) for own in uses.get(("writer", stream), [])}


def _pads(spec: ModelSpec, wide: WidthDecision, uses: Uses, space: str) -> str | None:
    """Return why new coordinates of a space reach the output: some activation is not 0, and some reader is not 0."""
    if not wide.maps[space].has_pads or space in ("vocab", "positions"):
        return None
    streams = spec.spaces[space]
    read = [axis for stream in streams for axis in uses.get(("reader", stream), ())]
    normed = spec.normed.keys() & {*streams}
    silent = not normed and all(axis.pad == "zero" for axis in read)  # nothing may read it
    quiet = all(
        axis.pad == "zero" or (axis.pad == "mean" and (stream in normed or stream in spec.parts))
        for stream in streams
        for axis in uses.get(("writer", stream), ())
    )
    if silent or quiet:
        return None
    return f"readers see new coordinates of {space.partition('.')[0]!r}"


def _raw(spec: ModelSpec, wide: WidthDecision, uses: Uses) -> Iterator[str]:
    """Yield a reason for linear layers that read a residual stream without a norm: they see its pads, and lose what centering subtracts."""
    if not spec.raw:
        return
    tied = {
        str(axis.segments[0][0])
        for name in spec.ties
        for axis in spec.tensors[name]
        if axis.role == "reader"
    }  # the rows of a writer read them
    for stream in sorted(spec.raw):
        space = space_of(stream)
        written = {pads for s in spec.spaces[space] if ("gain", s) not in uses for pads in _pads_of(uses, s)}  # fmt: skip
        silent = stream not in tied and all(own.pad == "zero" for own in uses["reader", stream])
        if any(centered for _, centered in written):
            yield f"a linear layer reads {stream!r} without a norm, and loses the mean"
        elif wide.maps[space].has_pads and not silent and {pad for pad, _ in written} - {"zero"}:
            yield f"a linear layer reads {stream!r} without a norm, and sees new coordinates"


def _noise(wide: WidthDecision, stream: str) -> str | None:
    """Return why twin noise, which is scaled as the reader is, does not cancel: the copies of a coordinate have unequal shares."""
    index_map, scale = wide.maps[space_of(stream)], wide.stream_scales[stream]
    shares = _times(scale.activation, scale.readout)
    if shares.uniform is not None:
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
