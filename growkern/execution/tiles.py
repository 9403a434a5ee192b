"""Cut target tensors into pieces: a tensor is viewed as a matrix, and a run of rows and a run of columns form a tile.

A tile is copied from the source to all its places in the target, or holds pads: zeros, a mean, noise, or the method's rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from math import inf, prod
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.distributed.gather import Gather
from growkern.distributed.shards import Box, Range, box_of, local, placement
from growkern.execution import torch_backend as reference
from growkern.execution.axis_runs import AxisLayout, AxisRun, Reach, scale_of
from growkern.execution.boxes import narrowed
from growkern.execution.fills import Fills, Given, Slot, measure, weighted_sum
from growkern.execution.measures import KernelOf, roots_of_mean_squares
from growkern.execution.pieces import Group, Noise, Piece
from growkern.execution.tiling import Tiling, cut_of, n_row_axes
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

MEAN = "mean of law"  # the statistic that is known as a number, and needs no whole source


class Job(NamedTuple):
    """A tensor to grow.

    Attributes:
        row: Row of the plan.
        source: The whole source.
        target: Target, or the part of it that this process holds.
        rule: Rule of the tensor.
        next_layer: The next layer's source, for a row that copies a part of it.
        box: Where ``target`` lies in the whole target; None for the whole target.
        mean: Mean of all copied elements of ``source``, where it is known (``part_of_mean``).
    """

    row: TensorRow
    source: Tensor
    target: Tensor
    rule: Rule
    next_layer: Tensor | None = None
    box: Box | None = None
    mean: Tensor | None = None


class Tiler:
    """Cuts target tensors into pieces; computes axis layouts and axis runs once for all tensors with the same axes.

    ``given``: the width method's ``rows``, from source rows and the number of new rows to the new rows.
    ``stds``: noise scale by source, as far as known: master weights and averages get the same noise.
    """

    def __init__(self, plan: GrowthPlan, given: Given | None = None) -> None:
        self.plan, self.given = plan, given
        self.n_read: int = 0  # bytes read for statistics of sources
        self.finite_only = False  # True when means are of the elements that are finite
        # jobs, and of each a mean or rows that its target has
        self.statistics: list[tuple[Sequence[Job], list[Tensor]]] = []
        self._equal: dict[AxisMap, AxisMap] = {}
        self._axes = {key: self._equal.setdefault(axis, axis) for key, axis in plan.axes.items()}
        self._axis_layouts: dict[tuple[object, ...], AxisLayout] = {}
        self._tilings: dict[tuple[object, ...], Tiling] = {}
        self._tilings_of: dict[tuple[object, ...], tuple[TensorRow, Rule, Tiling]] = {}
        self._axis_runs: dict[tuple[object, ...], list[AxisRun]] = {}
        self.stds: dict[str, Tensor] = {}
        self._means: dict[tuple[AxisMap, Rule], AxisMap] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._uploaded: dict[tuple[AxisLayout, torch.dtype, torch.device], Tensor] = {}

    def measure(self, jobs: Iterable[Job], kernel: KernelOf, gather: Gather | None = None) -> None:
        """Measure the root mean square of all weights that get noise in one batch.

        Args:
            jobs: The jobs.
            kernel: Returns the kernel for the tensors of a device; see ``roots_of_mean_squares``.
            gather: Gathers the numbers of all processes where sources are sharded; each process reads its own part.
        """
        noisy: dict[tuple[object, ...], dict[str, Tensor]] = defaultdict(dict)
        seen = {*self.stds}  # a weight comes before its master weights, which get the same noise
        for row, source, target, rule, *_ in jobs:
            known = row.source in seen
            if known or not rule.is_weight or row.constant is not None or not source.numel():
                continue
            seen.add(row.source)
            kind = source.device, arithmetic(target.dtype)
            tiling = self._tiling(row, rule, *kind)
            if tiling.adds_noise and not tiling.centered:
                key = *kind, source.dtype, placement(source)
                noisy[key].setdefault(row.source, source)
        for by_name in noisy.values():
            sources = list(by_name.values())
            roots = roots_of_mean_squares(sources, kernel(sources[0].device), gather)
            stds = _std(roots, arithmetic(sources[0].dtype)).unbind()
            self.stds |= zip(by_name, stds, strict=True)
            self.n_read += 2 * sum(local(source).nbytes for source in sources)

    def groups(self, jobs: Iterable[Job]) -> list[Group]:
        """Cut target tensors (weights, gradients, state) by their rules; tensors that are cut alike share their pieces."""
        alike: dict[tuple[object, ...], list[Job]] = defaultdict(list)
        for job in jobs:
            tiling = None if job.row.constant is not None else self._tiling_of(job)
            of = job.source if tiling else job.target
            alike[
                id(tiling),
                of.device,
                of.dtype,
                job.target.dtype,
                job.row.constant,
                job.mean is None,
            ].append(job)
        kinds = [self._read(members) for members in alike.values()]
        measure([kind.fills for kind in kinds if kind.fills is not None])
        return [group for kind in kinds for group in self._groups(kind)]

    def _read(self, jobs: Sequence[Job]) -> "_Kind":
        """Return jobs of one tiling, or of one constant, with their sources, and the fills of their pads, which are not measured yet."""
        if jobs[0].row.constant is not None:
            return _Kind(jobs, None, [], None)
        tiling, dtype = self._tiling_of(jobs[0]), arithmetic(jobs[0].target.dtype)
        pairs = [self._sources(job, tiling) for job in jobs]
        slots: list[Slot] = [slot for slot in tiling.slots if slot != MEAN or jobs[0].mean is None]
        device = pairs[0][0].device
        fills = Fills(
            [job.row.source for job in jobs], [own for own, _ in pairs], tiling.rows, tiling.cols, slots,
            lambda layout: self._shares(layout, dtype, device), self.given, finite_only=self.finite_only,
        )  # fmt: skip
        return _Kind(jobs, tiling, pairs, fills)

    def _groups(self, kind: "_Kind") -> Iterable[Group]:
        """Cut targets whose strides and alignments may differ."""
        groups: dict[tuple[object, ...], Group] = {}
        tiling = kind.tiling
        for job, (read, noise) in zip(kind.jobs, self._reads(kind), strict=True):
            place, dst = self.place(job), job.target
            shape = prod(dst.shape[:-1]), prod(dst.shape[-1:])
            if tiling is not None:
                shape = tiling.target if place is None else (place[0][1], place[1][1])
            into = _matrix(dst, shape)
            key = job.box, shape, *((t.stride(), t.data_ptr() % 16) for t in (into, *read))
            group = groups.get(key)
            if group is None:
                pieces, origins = _pieces(tiling, into, read, noise, place)
                groups[key] = group = Group(pieces, origins, [], [], [])
            group.targets.append(into)
            group.sources.append(read)
            group.noises.append(noise)
        return groups.values()

    def _reads(self, kind: "_Kind") -> Iterator[tuple[list[Tensor], Noise | None]]:
        """Yield the tensors that each target is written from, in the order of ``tiling.slots``, and its noise."""
        jobs, tiling, pairs, fills = kind
        if tiling is None or fills is None:
            for job in jobs:
                yield [self._constant(job.row.constant or 0.0, job.target)], None
            return
        columns: list[list[Tensor]] = []
        for slot in tiling.slots:
            if slot == "source":
                columns.append([own for own, _ in pairs])
            elif slot == "next layer":
                columns.append([above for _, above in pairs])
            elif slot == "zero":
                columns.append([self._constant(0.0, pairs[0][0])] * len(jobs))
            elif slot == MEAN and jobs[0].mean is not None:
                columns.append([job.mean.view(1, 1) for job in jobs if job.mean is not None])
            else:
                columns.append(fills.of(slot))
        self.n_read += fills.n_statistics * sum(source.nbytes for source in fills.sources)
        self.statistics += [(jobs, made) for made in fills.statistics]
        for i, (job, (source, _)) in enumerate(zip(jobs, pairs, strict=True)):
            noise = self._noise(job, source) if tiling.adds_noise else None
            yield [column[i] for column in columns], noise

    def _sources(self, job: Job, tiling: Tiling) -> tuple[Tensor, Tensor]:
        """Return the source of a job and the next layer's as matrices, centered where the tiling says so."""
        own, above = job.source, job.source
        if job.row.next_layer_source is not None and job.next_layer is not None:
            above = job.next_layer
        same = above is own
        for axis in tiling.centered:
            self.n_read += 2 * own.nbytes
            own = own - own.mean(axis, keepdim=True)
            above = own if same else above - above.mean(axis, keepdim=True)
        own = _matrix(own, tiling.source)
        return own, own if same else _matrix(above, tiling.source)

    def _noise(self, job: Job, source: Tensor) -> Noise:
        row, dtype = job.row, arithmetic(job.target.dtype)
        std = self.stds.get(row.source)
        if std is None:  # a weight that is centered first
            self.n_read += 2 * source.nbytes
            std = self.stds[row.source] = _std(roots_of_mean_squares([source])[0], dtype)
        keys = reference.axis_keys(self.plan.seed, reference.tensor_id(row.name))
        return Noise(std.to(dtype), keys)

    def reach(self, row: TensorRow, source: Tensor, target: Tensor, rule: Rule) -> Reach:
        """Return how far a job can change the size of an element; infinitely far if its weight is centered first."""
        tiling = self._tiling(row, rule, source.device, arithmetic(target.dtype))
        return tiling.reach._replace(largest=inf) if tiling.centered else tiling.reach

    def place(self, job: Job) -> tuple[Range, Range] | None:
        """Return the ranges of rows and columns of a job's target in the whole target as a matrix; None for a whole target.

        Raises:
            UnsupportedModelError: The target is no rectangle of this matrix.
        """
        if job.box is None or job.row.constant is not None:
            return None
        return job.box.rectangle(self._tiling_of(job).n_row_axes)

    def reads_all(self, job: Job) -> bool:
        """True when ``groups`` reads all elements of a job's source: for statistics, or for a noise scale that is not known."""
        row, source, target, rule, *_ = job
        if row.constant is not None:
            return False
        kind = source.device, arithmetic(target.dtype)
        unknown = self._tiling(row, rule, *kind).adds_noise and row.source not in self.stds
        known = set[str]() if job.mean is None else {MEAN}
        return unknown or bool(self.statistics_of(row, rule, *kind) - known)

    def statistics_of(
        self, row: TensorRow, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> set[str]:
        """Return what a target needs of all elements of its source, apart from its noise scale: means, or the method's rows."""
        tiling = self._tiling(row, rule, device, arithmetic(dtype))
        fills: set[str] = {*tiling.slots} - {"source", "next layer", "zero"}
        return fills | ({"mean along an axis"} if tiling.centered else set[str]())

    def part_of_mean(self, row: TensorRow, source: Tensor, rule: Rule) -> Tensor:
        """Return the part of this process in the mean of all copied elements of a source, (); the mean is the sum of all parts."""
        own, dtype = local(source), arithmetic(source.dtype)
        tiling = self._tiling(row, rule, own.device, dtype)
        ranges = box_of(source, source.shape).rectangle(tiling.n_row_axes)
        rows, cols = (
            self._shares(layout, dtype, own.device).narrow(0, first, n)
            for layout, (first, n) in zip((tiling.rows, tiling.cols), ranges, strict=True)
        )
        return weighted_sum(own.reshape(len(rows), len(cols)), rows, cols)

    def std(self, row: TensorRow) -> Tensor:
        """Return the noise scale of a weight that was cut into pieces with noise."""
        return self.stds[row.source]

    def _tiling_of(self, job: Job) -> Tiling:
        return self._tiling(job.row, job.rule, job.source.device, arithmetic(job.target.dtype))

    def _tiling(
        self, row: TensorRow, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> Tiling:
        """Return the tiling of tensors with the row's axes, computed once."""
        own = id(row), id(rule), device, dtype
        if (known := self._tilings_of.get(own)) is None:
            mixed = None if row.next_layer_source is None else row.next_layer_axis
            axes = tuple(map(self._axes.__getitem__, row.axes))  # shared by blocks
            if row.factor != 1 or row.grad_factor != 1:
                scaled = axes[0].times(row.factor, row.grad_factor)
                axes = (self._equal.setdefault(scaled, scaled), *axes[1:])
            key = tuple(map(id, axes)), mixed, id(rule), device, dtype
            if (tiling := self._tilings.get(key)) is None:
                tiling = self._tilings[key] = self._tiled(axes, mixed, rule, device, dtype)
            known = self._tilings_of[own] = row, rule, tiling  # kept: their ids are in the keys
        return known[-1]

    def _tiled(
        self, axes: tuple[AxisMap, ...], mixed_axis: int | None, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> Tiling:  # fmt: skip
        mixed = None if mixed_axis is None else axes[mixed_axis]
        if rule.reduced is not None:
            at = len(axes) + rule.reduced
            axes = (*axes[:at], self._mean_of(axes[at], rule), *axes[at + 1 :])
        at = n_row_axes(axes)
        rows, cols = (self._axis_layout(part, rule, mixed) for part in (axes[:at], axes[at:]))
        with_ids = rule.is_weight and (rows.has_random_writer or cols.has_random_writer)
        by_row = self._runs_of(rows, device, dtype, True, with_ids)
        by_col = self._runs_of(cols, device, dtype, False, with_ids)
        cuts = [
            cut_of(rows, cols, r, c, rule, device) for r in by_row for c in by_col if r.n and c.n
        ]
        adds_noise = any(cut.adds_noise for cut in cuts)
        return Tiling(
            rows,
            cols,
            cuts,
            slots=[*dict.fromkeys(cut.slot for cut in cuts)],
            adds_noise=adds_noise,
            centered=[i for i, axis in enumerate(axes) if rule.is_weight and axis.centered],
            reach=Reach.of(rows, cols, noisy=adds_noise),
            n_row_axes=at,
            source=(rows.index_map.n_source, cols.index_map.n_source),
            target=(rows.index_map.n_target, cols.index_map.n_target),
        )

    def _mean_of(self, axis: AxisMap, rule: Rule) -> AxisMap:
        """Return an axis of size 1 in place of an axis that the state is averaged over; its factor is the mean of that axis's factors."""
        scale, runs = scale_of(axis, rule).expanded(), axis.index_map.runs
        copied = [scale[i] for run in runs if run.source != PAD for i in range(*run.span)]
        unit, power = Vector.full(1.0, 1), rule.grad or 1  # at power 0, all factors are 1
        mean = Vector.full((sum(copied) / max(1, len(copied))) ** (1 / power), 1)
        mean_axis = AxisMap(IndexMap.identity(1), unit, mean)
        return self._means.setdefault((axis, rule), mean_axis)

    def _axis_layout(
        self, axes: tuple[AxisMap, ...], rule: Rule, mixed: AxisMap | None
    ) -> AxisLayout:
        key = axes, mixed, rule
        if key not in self._axis_layouts:
            self._axis_layouts[key] = AxisLayout(axes, rule, mixed)
        return self._axis_layouts[key]

    def _runs_of(
        self,
        layout: AxisLayout,
        device: torch.device,
        dtype: torch.dtype,
        rows: bool,
        with_ids: bool,
    ) -> list[AxisRun]:
        key = layout, rows, with_ids, device, dtype
        if key not in self._axis_runs:
            self._axis_runs[key] = layout.axis_runs(device, dtype, rows=rows, with_ids=with_ids)
        return self._axis_runs[key]

    def _shares(self, layout: AxisLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``layout.shares`` on a device; each layout is uploaded once."""
        key = layout, dtype, device
        if key not in self._uploaded:
            self._uploaded[key] = torch.tensor(layout.shares, dtype=dtype, device=device)
        return self._uploaded[key]

    def _constant(self, value: float, like: Tensor) -> Tensor:
        key = value, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = torch.full((1, 1), value, dtype=like.dtype, device=like.device)
        return self._constants[key]


class _Kind(NamedTuple):
    """Jobs of one tiling, or of one constant.

    Attributes:
        jobs: The jobs.
        tiling: The tiling; None for a constant.
        sources: The source of each job and the next layer's, as matrices.
        fills: Fills of the pads; None for a constant.
    """

    jobs: Sequence[Job]
    tiling: Tiling | None
    sources: list[tuple[Tensor, Tensor]]
    fills: Fills | None


def _pieces(
    tiling: Tiling | None, target: Tensor, read: list[Tensor], noise: Noise | None, place: tuple[Range, Range] | None
) -> tuple[tuple[Piece, ...], tuple[int, ...]]:  # fmt: skip
    """Return the pieces of a target, and the index in ``read`` of the tensor that each reads; a constant target is one piece.

    ``place``: ranges of rows and columns that ``target`` is of the whole target; None for all.
    """
    if tiling is None:
        return (Piece(read[0].expand_as(target), target),), (0,)
    origins = tuple(tiling.slots.index(cut.slot) for cut in tiling.cuts)
    pieces = [
        Piece(
            cut.of(read[k]), target, cut.rows.copies, cut.cols.copies, cut.rows.index, cut.cols.index,
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
    if tensor.shape == shape:
        return tensor
    return tensor.view(shape) if tensor.dim() < 2 else tensor.reshape(shape)


def _std(rms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise scale of weights: their root mean squares, rounded to bfloat16."""
    return rms.to(torch.bfloat16).to(dtype) / reference.BYTES_STD
