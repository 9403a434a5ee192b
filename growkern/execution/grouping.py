"""Pieces for a backend: jobs that are cut alike share the pieces of the first, and the means of their pads are measured in one pass."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from torch import Tensor

from growkern.execution.boxes import narrowed
from growkern.execution.fills import Fills, measure
from growkern.execution.pieces import Group, Noise, Piece
from growkern.execution.tiles import MEAN, Job, Tiler
from growkern.execution.tiling import Slot, Tiling
from growkern.support.dtypes import arithmetic

SOURCES = "source", "next layer"


@dataclass
class Grouped:
    """Jobs, ready to be written.

    Attributes:
        groups: What a backend writes.
        statistics: Jobs, and of each a mean or rows that its target has.
        n_read: Bytes read for statistics of sources.
    """

    groups: list[Group] = field(default_factory=list[Group])
    statistics: list[tuple[Sequence[Job], list[Tensor]]] = field(
        default_factory=list[tuple[Sequence[Job], list[Tensor]]]
    )
    n_read: int = 0


class _Kind(NamedTuple):
    """Jobs of one tiling, with what their pads are filled from.

    Attributes:
        jobs: The jobs.
        tiling: The tiling.
        sources: Sources whose elements lie as those of a matrix.
        above: The next layers' sources, likewise; empty where the tiling reads none.
        fills: Fills of the pads.
    """

    jobs: Sequence[Job]
    tiling: Tiling
    sources: list[Tensor]
    above: list[Tensor]
    fills: Fills


def grouped(tiler: Tiler, jobs: Iterable[Job], *, finite_only: bool = False) -> Grouped:
    """Cut target tensors (weights, gradients, state) by their tilings; tensors that are cut alike share their pieces.

    Args:
        tiler: The tiler of the jobs, which has measured the strength of their noise.
        jobs: The jobs.
        finite_only: True for means of the elements that are finite.
    """
    alike: dict[tuple[object, ...], list[Job]] = defaultdict(list)
    for job in jobs:
        of = job.source if job.tiling else job.target
        alike[
            id(job.tiling), of.device, of.dtype, job.target.dtype, job.row.constant, job.mean is None
        ].append(job)  # fmt: skip
    made, kinds = Grouped(), list[_Kind]()
    for members in alike.values():
        if (tiling := members[0].tiling) is not None:
            kinds.append(_kind(tiler, made, members, tiling, finite_only=finite_only))
            continue
        value = [tiler.constant(job.row.constant or 0.0, job.target) for job in members]
        made.groups += _groups(members, None, [value], [None] * len(members))
    measure([kind.fills for kind in kinds])
    for kind in kinds:
        made.groups += _groups(kind.jobs, kind.tiling, _columns(tiler, made, kind), _noises(tiler, made, kind))  # fmt: skip
    return made


def _kind(tiler: Tiler, made: Grouped, jobs: Sequence[Job], tiling: Tiling, *, finite_only: bool) -> _Kind:  # fmt: skip
    """Return jobs of one tiling with their sources, and the fills of their pads, which are not measured yet."""

    def of(tensors: list[Tensor]) -> list[Tensor]:
        for axis in tiling.centered:
            made.n_read += 2 * sum(t.nbytes for t in tensors)
            tensors = [t - t.mean(axis, keepdim=True) for t in tensors]
        return [t if t.is_contiguous() else t.reshape(tiling.source) for t in tensors]

    sources, above = of([job.source for job in jobs]), list[Tensor]()
    if jobs[0].row.next_layer_source is not None:
        above = of([job.source if job.next_layer is None else job.next_layer for job in jobs])
    slots: list[Slot] = [slot for slot in tiling.slots if slot != MEAN or jobs[0].mean is None]
    dtype, device = arithmetic(jobs[0].target.dtype), sources[0].device
    fills = Fills(
        [job.row.source for job in jobs], sources, tiling, slots,
        lambda: (tiler.shares(tiling.rows, dtype, device), tiler.shares(tiling.cols, dtype, device)),
        tiler.given, finite_only=finite_only,
    )  # fmt: skip
    return _Kind(jobs, tiling, sources, above, fills)


def _columns(tiler: Tiler, made: Grouped, kind: _Kind) -> list[list[Tensor]]:
    """Return, per slot of the tiling, the tensor that each target is written from."""
    jobs, tiling, sources, above, fills = kind
    columns: list[list[Tensor]] = []
    for slot in tiling.slots:
        if slot == "source":
            columns.append(sources)
        elif slot == "next layer":
            columns.append(above)
        elif slot == "zero":
            columns.append([tiler.constant(0.0, sources[0])] * len(jobs))
        elif slot == MEAN and jobs[0].mean is not None:
            columns.append([job.mean.view(1, 1) for job in jobs if job.mean is not None])
        else:
            columns.append(fills.of(slot))
            made.statistics.append((jobs, columns[-1]))
    made.n_read += fills.n_statistics * sum(source.nbytes for source in sources)
    return columns


def _noises(tiler: Tiler, made: Grouped, kind: _Kind) -> Sequence[Noise | None]:
    """Return the noise of each target, and measure weights that are centered first."""
    if not kind.tiling.adds_noise:
        return [None] * len(kind.jobs)
    pairs = [*zip(kind.jobs, kind.sources, strict=True)]
    made.n_read += sum(2 * t.nbytes for job, t in pairs if job.row.source not in tiler.stds)
    return [tiler.noise(job, source) for job, source in pairs]


def _groups(
    jobs: Sequence[Job], tiling: Tiling | None, columns: list[list[Tensor]], noises: Sequence[Noise | None]
) -> Iterable[Group]:  # fmt: skip
    """Group targets whose strides and alignments, and those of all that they are written from, are alike."""
    groups: dict[tuple[object, ...], Group] = {}
    targets = [job.target for job in jobs]
    layouts = [[(t.stride(), t.data_ptr() % 16) for t in ts] for ts in (targets, *columns)]
    for job, target, noise, layout, *read in zip(
        jobs, targets, noises, zip(*layouts, strict=True), *columns, strict=True
    ):
        key = job.box, target.shape, layout
        if (group := groups.get(key)) is None:
            pieces, origins = _pieces(job, tiling, read, noise)
            groups[key] = group = Group(pieces, origins, [], [], [])
        group.targets.append(target)
        group.sources.append(read)
        group.noises.append(noise)
    return groups.values()


def _pieces(
    job: Job, tiling: Tiling | None, read: list[Tensor], noise: Noise | None
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:
    """Return the pieces of a target, and the index in ``read`` of the tensor that each reads; a constant target is one piece."""
    target = job.target
    if tiling is None:
        target = _matrix(target, (prod(target.shape[:-1]), prod(target.shape[-1:])))
        return (Piece(read[0].expand_as(target), target),), (0,)
    place = job.place()
    target = _matrix(target, tiling.target if place is None else (place[0][1], place[1][1]))
    origins = tuple(tiling.slots.index(cut.slot) for cut in tiling.cuts)
    own = {k: _matrix(read[k], tiling.source) for k, slot in enumerate(tiling.slots) if slot in SOURCES}  # fmt: skip
    pieces = [
        Piece(
            cut.of(own.get(k, read[k])), target, cut.rows.copies, cut.cols.copies, cut.rows.index, cut.cols.index,
            noise if cut.adds_noise else None,
        )
        for k, cut in zip(origins, tiling.cuts, strict=True)
    ]  # fmt: skip
    if place is None:
        return tuple(pieces), origins
    parts = [
        (own, k)
        for piece, k in zip(pieces, origins, strict=True)
        for own in narrowed(piece, *place, target)
    ]
    return tuple(piece for piece, _ in parts), tuple(k for _, k in parts)


def _matrix(tensor: Tensor, shape: tuple[int, int]) -> Tensor:
    return tensor if tensor.shape == shape else tensor.view(shape)
