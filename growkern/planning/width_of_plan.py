"""Recover the decision of a width method from the axes of a plan, so that a plan from a file can be held against the dual law.

A stream that alone makes up a segment of an axis is read from the axis. In a product of streams, the coordinates of one stream are read
along a line through a coordinate at which all lines cross. A product does not tell how its factors share a constant: a factor follows from
those that other axes tell; where no axis tells, the activation gets the scale 1 at the crossing, and the readers the scale with which the
shares of copies sum to 1 there. A stream that only the gain of a norm writes follows from the norm's input.
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod, sqrt
from typing import Any

from growkern.errors import PlanError
from growkern.model.size_values import Component, space_of, space_size
from growkern.model.spec import AxisUse, ModelSpec, Segment, writer_corrections
from growkern.planning.axis_scales import mean_square_factor
from growkern.planning.decisions import StreamScale, WidthDecision
from growkern.planning.growth_plan import AxisMap, GrowthPlan
from growkern.planning.index_map import PAD, IndexMap, Run
from growkern.planning.method_spaces import splits
from growkern.planning.vector import Vector, merged

WORK = 1 << 22  # coordinates that a check may visit beside those that the plan's text has


Scales = tuple[Vector, Vector]  # of the activation and of the readers


@dataclass(frozen=True)
class Line:
    """One component of a segment: its index map, and its scales along a line of the axis, relative to the scales at the crossing."""

    component: Component
    index_map: IndexMap
    relative: Scales
    place: int


@dataclass(frozen=True)
class Segmented:
    """One segment of an axis: its components, and the scales of the axis at the crossing of their lines."""

    axis: AxisUse
    own: AxisMap
    lines: tuple[Line, ...]
    crossing: tuple[float, float]


def width_of_plan(plan: GrowthPlan, spec: ModelSpec, *, norms_kept: bool) -> WidthDecision:
    """Return the decision from which the axes of a plan follow, if they follow from any.

    Args:
        plan: Plan with the spec's axes, each of the length that the target needs.
        spec: Description of the source model.
        norms_kept: Whether norms are not corrected for a changed mean square, which the axes do not tell.

    Raises:
        PlanError: An axis is no product of its streams.
        ArithmeticError: Scales of one stream do not fit each other.
    """
    found = _Found(spec, plan.target_sizes)
    segments = [s for axis, key in spec.axes.items() for s in found.segments(axis, plan.axes[key])]
    for segment in segments:
        found.add_maps(segment)
    maps = found.readers | found.maps
    readers = {space: m for space, m in found.readers.items() if m != maps[space]}
    joint: dict[tuple[str, str], IndexMap] = {}
    for group in (
        [space for space in spec.spaces if space.startswith("group")] if found.apart else []
    ):
        joint[group.replace("group", "kv_heads"), group] = IndexMap.identity(spec.sizes["heads"])
        maps[group], ones = IndexMap.identity(1), Vector.full(1.0, 1)
        found.scales |= dict.fromkeys(spec.spaces[group], (ones, ones))
    found.add_scales(segments)
    _solve_gains(spec, maps, found, [s for s in segments if s.axis.role == "gain"], norms_kept)
    used = [plan.axes[key] for axis, key in spec.axes.items() if axis.role != "gain"]
    return WidthDecision(
        maps,
        {stream: found.scale(stream) for stream in spec.streams},
        noise=max((own.noise for own in used), default=0.0),
        drawn=max((own.drawn for own in used), default=1.0),
        norms_kept=norms_kept,
        readers=readers,
        joint=joint,
    )


class _Found:
    """What the axes tell of every space and stream."""

    def __init__(self, spec: ModelSpec, sizes: Mapping[str, int]) -> None:
        self.sizes = spec.sizes, sizes
        self.apart = splits(spec, sizes) > 1
        self.corrections = writer_corrections(spec, sizes)
        self.maps, self.readers = dict[str, IndexMap](), dict[str, IndexMap]()
        self.scales = dict[str, Scales]()
        self.pads, self.reads = dict[str, Any](), dict[str, Any]()
        self.centered = set[str]()
        self.lines = dict[
            object, tuple[list[Line], tuple[float, float]]
        ]()  # blocks have equal axes

    def segments(self, axis: AxisUse, own: AxisMap) -> Iterator[Segmented]:
        """Yield the segments of an axis; query heads that kv heads divide count as one component of a fixed size."""
        source = target = 0
        for segment in axis.segments:
            sides = [(space_size(c, self.sizes[0]), space_size(c, self.sizes[1])) for c in segment]
            names = segment
            if self.apart and len(segment) > 1 and str(segment[1]).startswith("group"):
                joint = prod(n for n, _ in sides[:2]), prod(n for _, n in sides[:2])
                sides, names = [joint, *sides[2:]], (joint[1], *segment[2:])
            n_source, n_target = prod(n for n, _ in sides), prod(n for _, n in sides)
            window = slice(source, source + n_source), slice(target, target + n_target)
            reads = axis.role == "reader"
            key = own.index_map, own.weight_scale, own.grad_scale, source, target, reads, *sides
            if key not in self.lines:
                self.lines[key] = _split(own, window, sides, reads)
            lines, crossing = self.lines[key]
            named = (replace(line, component=c) for c, line in zip(names, lines, strict=True))
            yield Segmented(axis, own, tuple(named), crossing)
            source, target = source + n_source, target + n_target

    def add_maps(self, segment: Segmented) -> None:
        """Add the index maps and pads of a segment's streams."""
        role, own = segment.axis.role, segment.own
        maps = self.readers if role == "reader" else self.maps
        for line in segment.lines:
            for stream, source, target in self._streams(line.component):
                index_map = _window(line.index_map, source, target)
                maps.setdefault(space_of(stream), index_map)
                if index_map.has_pads and role != "gain":
                    (self.reads if role == "reader" else self.pads).setdefault(stream, own.pad)
                if own.centered:
                    self.centered.add(stream)

    def add_scales(self, segments: list[Segmented]) -> None:
        """Add the scales of all streams that readers and writers tell of, first those of which a segment leaves one component open."""
        left: list[Segmented] = [s for s in segments if s.axis.role != "gain"]
        while left:
            n_open = [len(self._open(s)) for s in left]
            first = min([n for n in n_open if n], default=0)
            if first > 1:  # the streams of one segment give those of others
                self._add(left.pop(n_open.index(first)))
                continue
            for segment in left:
                if len(self._open(segment)) == 1:
                    self._add(segment)
            left = list(filter(self._open, left))

    def _open(self, segment: Segmented) -> list[Line]:
        streams = [
            (line, stream)
            for line in segment.lines
            for stream, _, _ in self._streams(line.component)
        ]
        return [*{id(line): line for line, stream in streams if stream not in self.scales}.values()]

    def _add(self, segment: Segmented) -> None:
        """Add the scales of a segment's open components; the last one takes what the others leave of the scales at the crossing."""
        w, u = segment.crossing
        unknown = self._open(segment)
        for line in segment.lines:
            if line not in unknown and not isinstance(line.component, int):
                known = self._known(line.component, segment.axis.role)
                w, u = w / known[0][line.place], u / known[1][line.place]
        for line in unknown:
            own_w, own_u = line.relative
            if line is not unknown[-1]:
                total = _share(line)
                own_u = own_u.map(lambda x, t=total: x / t)
                u *= total
            else:
                own_w, own_u = own_w.map(lambda x, f=w: x * f), own_u.map(lambda x, f=u: x * f)
            for stream, _, target in self._streams(line.component):
                by = self._correction(stream, segment.axis.role)
                scales = _times(_cut(own_w, target), 1 / by), _times(_cut(own_u, target), by)
                self.scales.setdefault(stream, scales)

    def _known(self, component: Component, role: str) -> tuple[list[float], list[float]]:
        """Return the scales of a component whose streams are known, per coordinate, as its writers or readers have them."""
        w, u = list[float](), list[float]()
        for stream in component if isinstance(component, tuple) else (component,):
            if isinstance(stream, int):
                w, u = w + [1.0] * stream, u + [1.0] * stream
                continue
            by, scales = self._correction(stream, role), self.scales[stream]
            w += [x * by for x in scales[0].expanded()]
            u += [x / by for x in scales[1].expanded()]
        return w, u

    def _correction(self, stream: str, role: str) -> float:
        return 1.0 if role == "reader" else self.corrections.get(stream, 1.0)

    def _streams(self, component: Component) -> Iterator[tuple[str, slice, slice]]:
        """Yield every stream of a component with its coordinates in the source and in the target; none for a fixed size."""
        source = target = 0
        streams = component if isinstance(component, tuple) else (component,)
        for stream in streams:
            n_source, n_target = (
                space_size(stream, self.sizes[0]),
                space_size(stream, self.sizes[1]),
            )
            if isinstance(stream, str):
                yield stream, slice(source, source + n_source), slice(target, target + n_target)
            source, target = source + n_source, target + n_target

    def scale(self, stream: str) -> StreamScale:
        """Return the scale of a stream."""
        pad, reads = self.pads.get(stream, "zero"), self.reads.get(stream)
        return StreamScale(*self.scales[stream], pad, reads, stream in self.centered)


def _share(line: Line) -> float:
    """Return the sum of the shares of the copies of the source coordinate at the crossing."""
    w, u = (vector.expanded() for vector in line.relative)
    indices = line.index_map.indices
    return sum(x * y for j, x, y in zip(indices, w, u, strict=True) if j == indices[line.place])


def _solve_gains(
    spec: ModelSpec, maps: Mapping[str, IndexMap], found: _Found, gains: Sequence[Segmented], norms_kept: bool
) -> None:  # fmt: skip
    """Set the scales of streams that only gains write, from the inputs of the norms; streams that nothing tells of are not scaled."""
    left = [(s.axis.norm, str(s.lines[0].component), s.own) for s in gains if s.axis.norm]
    while ready := [g for g in left if g[0].reads in found.scales and g[1] not in found.scales]:
        for norm, stream, own in ready:
            w, _ = found.scales[norm.reads]
            kept = 1.0 if norms_kept else mean_square_factor(maps[space_of(stream)], w)
            root, by = sqrt(kept or 1.0), found.corrections.get(stream, 1.0)
            back = w.map(lambda x, r=root, c=by: x / (r * c))
            scales = (
                own.weight_scale.zip(back, lambda x, y: x * y),
                own.grad_scale.zip(back, _ratio),
            )
            found.scales.setdefault(stream, scales)
    for stream in spec.streams:
        ones = Vector.full(1.0, maps[space_of(stream)].n_target)
        found.scales.setdefault(stream, (ones, ones))


def _ratio(x: float, y: float) -> float:
    return x / y if y else 0.0


def _split(
    own: AxisMap, window: tuple[slice, slice], sides: Sequence[tuple[int, int]], reads: bool
) -> tuple[list[Line], tuple[float, float]]:
    """Return the components of one segment of an axis, without their names, and the scales at the crossing."""
    index_map = _window(own.index_map, *window)
    weight, grad = _cut(own.weight_scale, window[1]), _cut(own.grad_scale, window[1])
    scales = (grad, weight) if reads else (weight, grad)
    if len(sides) == 1:
        return [Line(0, index_map, scales, 0)], (1.0, 1.0)
    sources = [run.target for run in index_map.runs], index_map.runs
    tables = [_table(vector) for vector in scales]
    crossing = _crossing(index_map, tables)
    values = _at(tables[0], crossing), _at(tables[1], crossing)
    lines = list[Line]()
    inner_source, inner_target = index_map.n_source, index_map.n_target
    for n_source, n_target in sides:
        inner_source, inner_target = inner_source // n_source, inner_target // n_target
        start = crossing - (place := crossing // inner_target % n_target) * inner_target
        line = range(start, start + n_target * inner_target, inner_target)
        places = (_source(sources, i) for i in line)
        copied = IndexMap.of(
            (PAD if j == PAD else j // inner_source % n_source for j in places), n_source
        )
        relative = [
            Vector.of(_at(t, i) / v for i in line) for t, v in zip(tables, values, strict=True)
        ]
        lines.append(Line(0, copied, (relative[0], relative[1]), place))
    return lines, values


Table = tuple[list[int], list[float]]  # first coordinates of repeats, and their values


def _table(vector: Vector) -> Table:
    starts = [0, *accumulate(n for _, n in vector.repeats)]
    return starts[:-1], [value for value, _ in vector.repeats]


def _at(table: Table, i: int) -> float:
    return table[1][bisect_right(table[0], i) - 1]


def _source(sources: tuple[list[int], tuple[Run, ...]], i: int) -> int:
    run = sources[1][bisect_right(sources[0], i) - 1]
    return PAD if run.source == PAD else run.source + i - run.target


def _crossing(index_map: IndexMap, tables: Sequence[Table]) -> int:
    """Return the first coordinate that copies a source coordinate and has no scale of 0."""
    starts = sorted(
        {run.target for run in index_map.runs} | {i for table in tables for i in table[0]}
    )
    sources = [run.target for run in index_map.runs], index_map.runs
    for i in starts:
        if _source(sources, i) != PAD and all(_at(table, i) for table in tables):
            return i
    raise PlanError("an axis copies nothing, or has scales of 0 only.")


def _window(index_map: IndexMap, source: slice, target: slice) -> IndexMap:
    """Return the part of an index map between two bounds on both sides; raise PlanError for a run that leaves the part."""
    if index_map.n_target == target.stop and not target.start and index_map.n_source == source.stop:
        return index_map
    runs = list[Run]()
    for run in index_map.runs:
        start, stop = max(run.target, target.start), min(run.target + run.length, target.stop)
        if start < stop:
            first = PAD if run.source == PAD else run.source + start - run.target - source.start
            if first < 0 and run.source != PAD:
                raise PlanError("a segment of an axis copies another segment.")
            runs.append(Run(start - target.start, stop - start, first))
    return IndexMap(source.stop - source.start, target.stop - target.start, tuple(runs))


def _cut(vector: Vector, window: slice) -> Vector:
    """Return the values of a vector between two coordinates."""
    if not window.start and len(vector) == window.stop:
        return vector
    ends = [*accumulate(n for _, n in vector.repeats)]
    spans = ((v, max(e - n, window.start), min(e, window.stop)) for (v, n), e in zip(vector.repeats, ends, strict=True))  # fmt: skip
    return merged((value, stop - start) for value, start, stop in spans if start < stop)


def _times(vector: Vector, factor: float) -> Vector:
    return vector if factor == 1 else vector.map(lambda x: x * factor)


def work(plan: GrowthPlan, spec: ModelSpec) -> tuple[int, int]:
    """Return the number of coordinates that a check of the axes visits, and the number that it may visit."""
    sizes, done, size = plan.target_sizes, 0, 0
    seen = set[object]()
    for axis, key in spec.axes.items():
        own = plan.axes[key]
        n_runs, n_repeats = (
            len(own.index_map.runs),
            len(own.weight_scale.repeats) + len(own.grad_scale.repeats),
        )
        size += n_runs + n_repeats
        kind = own, *(tuple(space_size(c, sizes) for c in segment) for segment in axis.segments)
        if kind in seen:
            continue
        seen.add(kind)
        done += min(own.index_map.n_target, n_runs**2 + n_repeats)
        for segment in axis.segments:
            done += _work_of(segment, sizes, n_runs, n_repeats)
    return done, WORK + 64 * size


def _work_of(segment: Segment, sizes: Mapping[str, int], n_runs: int, n_repeats: int) -> int:
    """Return the number of coordinates that splitting a segment and joining it again visits."""
    each = [space_size(c, sizes) for c in segment]
    if len(each) == 1:
        return 0
    return 3 * sum(each) + (prod(each) if n_runs > 1 or n_repeats > 2 else 0)
