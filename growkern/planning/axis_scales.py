"""Axis maps from the decision of a width method: one per axis, by role; corrections of norms; checks of gradients and of equal copies."""

from collections.abc import Iterator, Mapping, Set
from dataclasses import replace
from math import isclose, sqrt

from growkern.errors import PlanError
from growkern.model.size_values import Component, space_of
from growkern.model.spec import AxisUse, ModelSpec, Segment
from growkern.planning.axis_map import AxisMap, Pad
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.index_map import PAD, IndexMap, concat_maps
from growkern.planning.vector import Vector, concat_vectors

SYMMETRIC = "equal copies stay equal"  # begins the note on copies that nothing parts


def norm_factors(spec: ModelSpec, wide: WidthDecision) -> dict[str, float | None]:
    """Return the factor on the mean square of every normalized stream (1 under ``norms_kept``); None if the factor is not uniform."""
    return {reads: norm_factor(wide, reads) for reads in spec.normed}


def norm_factor(wide: WidthDecision, stream: str) -> float | None:
    """Return the factor on the mean square of a stream (1 under ``norms_kept``); None if the factor is not uniform."""
    index_map, w = wide.maps[space_of(stream)], wide.stream_scales[stream].activation
    return 1.0 if wide.norms_kept else mean_square_factor(index_map, w)


def refuse_unsaid(spec: ModelSpec, sizes: Mapping[str, int], wide: WidthDecision) -> None:
    """Raise PlanError where a norm that the spec may not name would change the function that the method promises to keep."""
    if not spec.unsaid or wide.reasons:
        return
    for stream in spec.spaces.get("residual", ()):
        if norm_factor(wide, stream) != 1:
            raise PlanError(
                f"cannot widen {spec.family} from hidden {spec.sizes['hidden']} to {sizes['hidden']} exactly: no norm in the spec reads "
                f"{stream!r}, whose mean square would change. Name norms without parameters (F.rms_norm) by "
                f"ModelSpec(non_affine_norms={{{stream!r}: 'rms'}}), pass non_affine_norms={{}} if forward has none, or grow hidden by "
                "whole multiples."
            )


def mean_square_factor(index_map: IndexMap, w: Vector) -> float | None:
    """Return the factor on the mean square of a stream with the activation scale ``w``; None if the factor is not uniform."""
    if index_map.is_identity:
        return 1.0
    weights = squares_of(index_map, w).repeats
    even = all(isclose(value, weights[0][0], rel_tol=1e-12) for value, _ in weights)
    factor = sum(value * n for value, n in weights) / index_map.n_target
    factor = 1.0 if isclose(factor, 1, rel_tol=1e-12) else factor
    return factor if even else None


def squares_of(index_map: IndexMap, w: Vector) -> Vector:
    """Return, per source coordinate, the sum of the squared scales ``w`` of its copies."""
    if (uniform := w.uniform) is not None:
        return index_map.counts.map(lambda count: count * uniform * uniform)
    sums = [0.0] * index_map.n_source
    for j, value in zip(index_map.indices, w.expanded(), strict=True):
        if j != PAD:
            sums[j] += value * value
    return Vector.of(sums)


def axis_maps(
    keys: Mapping[AxisUse, str],
    wide: WidthDecision,
    factors: Mapping[str, float | None],
    writer_corrections: Mapping[str, float],
) -> dict[str, AxisMap]:
    """Return the axis map of every axis, by key. Axes of different blocks share one object if their index maps and stream scales are equal.

    ``writer_corrections`` maps a stream to the factor on its writers (``growkern.model.spec.writer_corrections``).
    """

    def kin(stream: str | int) -> tuple[object, ...]:
        if isinstance(stream, int):
            return (stream,)
        space = space_of(stream)
        index_map, readers = wide.maps[space], wide.readers.get(space)
        return index_map, readers, wide.stream_scales[stream], writer_corrections.get(stream)

    maps_by_kind: dict[object, AxisMap] = {}
    axes: dict[str, AxisMap] = {}
    for axis, key in keys.items():
        parts = tuple(
            c if isinstance(c, int) else tuple(map(kin, c if isinstance(c, tuple) else (c,)))
            for segment in axis.segments
            for c in (*segment, -1)
        )
        reads = axis.norm and (wide.stream_scales[axis.norm.reads], factors[axis.norm.reads])
        kind = axis.role, parts, reads
        if kind not in maps_by_kind:
            maps_by_kind[kind] = _axis_map(axis, wide, factors, writer_corrections)
        axes[key] = maps_by_kind[kind]
    return axes


def _axis_map(
    axis: AxisUse,
    wide: WidthDecision,
    factors: Mapping[str, float | None],
    writer_corrections: Mapping[str, float],
) -> AxisMap:
    """Build the axis map of one axis from its role and the scales of its streams."""
    parts = [
        list(_parts(segment, axis.role, wide, writer_corrections)) for segment in axis.segments
    ]
    maps, w, u = list[IndexMap](), list[Vector](), list[Vector]()
    for segment in parts:
        index_map, u_part, w_part = IndexMap.identity(1), Vector.full(1.0, 1), Vector.full(1.0, 1)
        for inner, stream_scale in segment:
            index_map = index_map.product(inner)
            w_part, u_part = (
                w_part.outer(stream_scale.activation),
                u_part.outer(stream_scale.readout),
            )
        maps.append(index_map)
        w.append(w_part)
        u.append(u_part)
    index_map, w_axis, u_axis = concat_maps(maps), concat_vectors(w), concat_vectors(u)
    if axis.role == "gain":
        return _gain(axis, wide, factors, (index_map, w_axis, u_axis))
    stream_scales = [
        stream_scale for segment in parts for inner, stream_scale in segment if inner.has_pads
    ]
    if axis.role == "writer":
        pads: set[Pad] = {stream_scale.pad for stream_scale in stream_scales}
        centered = any(stream_scale.centered for segment in parts for _, stream_scale in segment)
        pad = _only(pads)
        return AxisMap(index_map, w_axis, u_axis, pad, drawn=wide.drawn, centered=centered)
    copies = any(count > 1 for count, _ in index_map.counts.repeats)
    pad = _only(
        {
            c.reads or ("zero" if c.pad == "random_writer" else "random_reader")
            for c in stream_scales
        }
    )
    reads: Pad = "random_reader" if pad == "random_reader" or not index_map.has_pads else "zero"
    noise = wide.noise if copies else 0.0
    return AxisMap(index_map, u_axis, w_axis, reads, noise=noise, drawn=wide.drawn)


def _only(pads: Set[Pad]) -> Pad:
    """Return the only pad of a set, or ``"zero"`` if the set has none or several."""
    return next(iter(pads)) if len(pads) == 1 else "zero"


def _gain(
    axis: AxisUse,
    wide: WidthDecision,
    factors: Mapping[str, float | None],
    scales: tuple[IndexMap, Vector, Vector],
) -> AxisMap:
    """Build the axis map of a norm's gain, which divides out the scale of the norm's input."""
    index_map, w_axis, u_axis = scales
    norm = axis.norm
    assert norm is not None, "a gain has a norm"
    root = sqrt(factors[norm.reads] or 1.0)
    back = wide.stream_scales[norm.reads].activation.map(lambda value: root / value)
    return AxisMap(
        index_map,
        w_axis.zip(back, lambda x, y: x * y),
        u_axis.zip(back, lambda x, y: x / y),
        "mean",
    )


def _parts(
    segment: Segment, role: str, wide: WidthDecision, writer_corrections: Mapping[str, float]
) -> Iterator[tuple[IndexMap, StreamScale]]:
    """Yield index map and stream scale of every component of a segment; two components with a joint map count as one."""
    at = 0
    while at < len(segment):
        both = wide.joint.get(segment[at : at + 2])  # pyright: ignore[reportArgumentType, reportCallIssue]
        if both is not None:
            ones = Vector.full(1.0, both.n_target)
            yield both, StreamScale(ones, ones)
        else:
            yield _part(segment[at], role, wide, writer_corrections)
        at += 1 if both is None else 2


def _part(
    component: Component, role: str, wide: WidthDecision, writer_corrections: Mapping[str, float]
) -> tuple[IndexMap, StreamScale]:
    """Return index map and stream scale of a component: a stream, a fixed number of coordinates, or a tuple of components, concatenated."""
    if isinstance(component, tuple):
        own, stream_scales = zip(
            *(_part(c, role, wide, writer_corrections) for c in component), strict=True
        )
        return concat_maps(own), replace(
            stream_scales[0],
            activation=concat_vectors([c.activation for c in stream_scales]),
            readout=concat_vectors([c.readout for c in stream_scales]),
        )
    if isinstance(component, int):
        full = Vector.full(1, component)
        return IndexMap.identity(component), StreamScale(full, full)
    space = space_of(component)
    readers: Mapping[str, IndexMap] = wide.readers if role == "reader" else {}
    stream_scale = wide.stream_scales[component]
    if role != "reader" and (factor := writer_corrections.get(component, 1.0)) != 1:
        w, u = (
            stream_scale.activation.map(lambda x: x * factor),
            stream_scale.readout.map(lambda x: x / factor),
        )
        stream_scale = replace(stream_scale, activation=w, readout=u)
    return readers.get(space, wide.maps[space]), stream_scale


def gradients_exact(spec: ModelSpec, wide: WidthDecision, *, relative: bool = False) -> bool:
    """True when every gradient of the target is a gradient of the source, copied and scaled.

    False if a coordinate is a pad or has a scale of 0; if the streams before and after a norm split gradients over copies in different
    shares, because the mean in the norm's backward pass reaches all copies equally; or if copies of a kv head divide its queries.
    ``relative``: shares count up to a constant, which a plan's axes do not tell of heads and head_dim.
    """
    if wide.joint:
        return False
    scaled_maps = {(c, wide.maps[space_of(s)]) for s, c in wide.stream_scales.items()}
    for stream_scale, index_map in scaled_maps:
        values = {
            value
            for vector in (stream_scale.activation, stream_scale.readout)
            for value, _ in vector.repeats
        }
        if index_map.has_pads or 0 in values:
            return False
    pairs = {(norm.reads, axis.segments) for _, axis, norm in spec.norms()}
    return all(
        _shares(wide.stream_scales[reads], relative)
        == _shares(wide.stream_scales[str(segments[0][0])], relative)
        for reads, segments in pairs
    )


def _shares(stream_scale: StreamScale, relative: bool) -> Vector:
    """Return each copy's share of the gradient, ``w u``, rounded to 12 decimals; or its ratio to the first share that is not 0."""
    shares = stream_scale.activation.zip(stream_scale.readout, lambda w, u: w * u)
    first = next((x for x, _ in shares.repeats if x), 1.0) if relative else 1.0
    return shares.map(lambda x: round(x / first, 12))


def symmetric_copies(wide: WidthDecision) -> Iterator[str]:
    """Yield a note that names the spaces whose equal copies get equal gradients and so never diverge."""
    if wide.noise or wide.next_layer or wide.perturbs:
        return
    # most blocks have equal index maps and stream scales
    has_equal: dict[tuple[IndexMap, StreamScale], bool] = {}
    equal: dict[str, bool] = {}  # by space: copies diverge if one stream reads them unevenly
    for stream, stream_scale in wide.stream_scales.items():
        index_map = wide.maps[space_of(stream)]
        key = index_map, stream_scale
        if key not in has_equal:
            has_equal[key] = _some_equal(index_map, stream_scale.readout)
        space = space_of(stream).partition(".")[0]
        equal[space] = equal.get(space, True) and has_equal[key]
    split = {space.partition(".")[0] for pair in wide.joint for space in pair}  # queries differ
    if spaces := [space for space, same in equal.items() if same and space not in split]:
        yield (
            f"{SYMMETRIC} ({', '.join(spaces)}): twin noise, an uneven split, rows of the next layer or "
            "state='asymmetric' part them."
        )


def _some_equal(index_map: IndexMap, u: Vector) -> bool:
    """True when two copies of a coordinate have the same readout scale."""
    if u.uniform is not None or not any(count > 1 for count, _ in index_map.counts.repeats):
        return any(count > 1 for count, _ in index_map.counts.repeats)
    pairs = [(j, x) for j, x in zip(index_map.indices, u.expanded(), strict=True) if j != PAD]
    return len(set(pairs)) < len(pairs)
