"""Jobs, and how the target of each is cut: tensors with the same axes and rule share a tiling, which is computed once.

A tensor is viewed as a matrix, and a run of rows and a run of columns form a tile. A tile is copied from the source to all its places in
the target, or holds pads: zeros, a mean, noise, or the method's rows.
"""

from collections import defaultdict
from collections.abc import Iterable
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from growkern.distributed.gather import Gather
from growkern.distributed.shards import Box, Range, box_of, local, placement
from growkern.execution import torch_backend as reference
from growkern.execution.axis_runs import AxisLayout, AxisRun, Reach, scale_of
from growkern.execution.fills import Given, weighted_sums
from growkern.execution.measures import KernelOf, roots_of_mean_squares
from growkern.execution.pieces import Noise
from growkern.execution.tiling import Tiling, cut_of, n_row_axes
from growkern.optimizer.state_rules import Rule
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

MEAN = "mean of law"  # the statistic that is known as a number, and needs no whole source


# ids of the axis maps of a row, the axis maps, and the axis that the next layer's copies are along
_Axes = tuple[tuple[int, ...], tuple[AxisMap, ...], int | None]


class Job(NamedTuple):
    """A tensor to grow; ``Tiler.job`` makes it.

    Attributes:
        row: Row of the plan.
        source: The whole source.
        target: Target, or the part of it that this process holds.
        rule: Rule of the tensor.
        tiling: How the whole target is cut; None for a constant target.
        next_layer: The next layer's source, for a row that copies a part of it.
        box: Where ``target`` lies in the whole target; None for the whole target.
        mean: Mean of all copied elements of ``source``, where it is known (``part_of_mean``).
    """

    row: TensorRow
    source: Tensor
    target: Tensor
    rule: Rule
    tiling: Tiling | None
    next_layer: Tensor | None = None
    box: Box | None = None
    mean: Tensor | None = None

    def place(self) -> tuple[Range, Range] | None:
        """Return the ranges of rows and columns of the target in the whole target as a matrix; None for a whole target.

        Raises:
            UnsupportedModelError: The target is no rectangle of this matrix.
        """
        if self.box is None or self.tiling is None:
            return None
        return self.box.rectangle(self.tiling.n_row_axes)

    @property
    def reach(self) -> Reach:
        """How far the job can change the size of an element; infinitely far if its weight is centered first."""
        assert self.tiling is not None, "a constant has no reach"
        return (
            self.tiling.reach._replace(largest=inf) if self.tiling.centered else self.tiling.reach
        )


class Tiler:
    """Decides how target tensors are cut; computes axis layouts, axis runs and tilings once for all tensors with the same axes.

    ``given``: the width method's ``rows``, from source rows and the number of new rows to the new rows.
    ``stds``: noise scale by source, as far as known: master weights and averages get the same noise.
    """

    def __init__(self, plan: GrowthPlan, given: Given | None = None) -> None:
        self.plan, self.given = plan, given
        self._equal: dict[AxisMap, AxisMap] = {}
        self._axes = {key: self._equal.setdefault(axis, axis) for key, axis in plan.axes.items()}
        self._kinds: dict[tuple[object, ...], _Axes] = {}
        self._axis_layouts: dict[tuple[object, ...], AxisLayout] = {}
        self._tilings: dict[tuple[object, ...], tuple[Rule, Tiling]] = {}
        self._axis_runs: dict[tuple[object, ...], list[AxisRun]] = {}
        self.stds: dict[str, Tensor] = {}
        self._means: dict[tuple[AxisMap, Rule], AxisMap] = {}
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        self._uploaded: dict[tuple[AxisLayout, torch.dtype, torch.device], Tensor] = {}

    def job(
        self, row: TensorRow, source: Tensor, target: Tensor, rule: Rule, next_layer: Tensor | None = None, box: Box | None = None,
        mean: Tensor | None = None,
    ) -> Job:  # fmt: skip
        """Return the job of a target; see ``Job``."""
        constant = row.constant is not None
        tiling = None if constant else self.tiling(row, rule, source.device, target.dtype)
        return Job(row, source, target, rule, tiling, next_layer, box, mean)

    def measure(self, jobs: Iterable[Job], kernel: KernelOf, gather: Gather | None = None) -> int:
        """Measure the root mean square of all weights that get noise in one batch; return the bytes that were read.

        Args:
            jobs: The jobs.
            kernel: Returns the kernel for the tensors of a device; see ``roots_of_mean_squares``.
            gather: Gathers the numbers of all processes where sources are sharded; each process reads its own part.
        """
        noisy: dict[tuple[object, ...], dict[str, Tensor]] = defaultdict(dict)
        seen = {*self.stds}  # a weight comes before its master weights, which get the same noise
        for row, source, _, rule, tiling, *_ in jobs:
            if row.source in seen or not rule.is_weight or tiling is None or not source.numel():
                continue
            seen.add(row.source)
            if tiling.adds_noise and not tiling.centered:
                noisy[source.device, source.dtype, placement(source)][row.source] = source
        n_read = 0
        for by_name in noisy.values():
            sources = list(by_name.values())
            roots = roots_of_mean_squares(sources, kernel(sources[0].device), gather)
            stds = _std(roots, arithmetic(sources[0].dtype)).unbind()
            self.stds |= zip(by_name, stds, strict=True)
            n_read += 2 * sum(local(source).nbytes for source in sources)
        return n_read

    def noise(self, job: Job, source: Tensor) -> Noise:
        """Return the noise of a weight; ``source`` is measured if ``measure`` has left it out: a weight that is centered first."""
        name, dtype = job.row.source, arithmetic(job.target.dtype)
        if name not in self.stds:
            self.stds[name] = _std(roots_of_mean_squares([source])[0], dtype)
        keys = reference.axis_keys(self.plan.seed, reference.tensor_id(job.row.name))
        return Noise(self.stds[name].to(dtype), keys)

    def reads_all(self, job: Job) -> bool:
        """True when ``groups`` reads all elements of a job's source: for statistics, or for a noise scale that is not known."""
        if job.tiling is None:
            return False
        unknown = job.tiling.adds_noise and job.row.source not in self.stds
        known = set[str]() if job.mean is None else {MEAN}
        return unknown or bool(job.tiling.statistics - known)

    def part_of_mean(self, row: TensorRow, source: Tensor, rule: Rule) -> Tensor:
        """Return the part of this process in the mean of all copied elements of a source, (); the mean is the sum of all parts."""
        own, dtype = local(source), arithmetic(source.dtype)
        tiling = self.tiling(row, rule, own.device, dtype)
        ranges = box_of(source, source.shape).rectangle(tiling.n_row_axes)
        rows, cols = (
            self.shares(layout, dtype, own.device).narrow(0, first, n)
            for layout, (first, n) in zip((tiling.rows, tiling.cols), ranges, strict=True)
        )
        return weighted_sums(own.reshape(1, len(rows), len(cols)), rows, cols)[0]

    def tiling(
        self, row: TensorRow, rule: Rule, device: torch.device, dtype: torch.dtype
    ) -> Tiling:
        """Return the tiling of tensors of a dtype with the row's axes, computed once."""
        mixed = None if row.next_layer_source is None else row.next_layer_axis
        of_row = row.axes, row.factor, row.grad_factor, mixed
        if (kind := self._kinds.get(of_row)) is None:
            axes = tuple(map(self._axes.__getitem__, row.axes))  # shared by blocks
            if row.factor != 1 or row.grad_factor != 1:
                scaled = axes[0].times(row.factor, row.grad_factor)
                axes = (self._equal.setdefault(scaled, scaled), *axes[1:])
            kind = self._kinds[of_row] = tuple(map(id, axes)), axes, mixed
        key = kind[0], mixed, id(rule), device, dtype
        if (known := self._tilings.get(key)) is None:
            tiling = self._tiled(kind[1], mixed, rule, device, arithmetic(dtype))
            known = self._tilings[key] = rule, tiling  # the rule is kept: its id is in the key
        return known[1]

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

    def shares(self, layout: AxisLayout, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return ``layout.shares`` on a device; each layout is uploaded once."""
        key = layout, dtype, device
        if key not in self._uploaded:
            self._uploaded[key] = torch.tensor(layout.shares, dtype=dtype, device=device)
        return self._uploaded[key]

    def constant(self, value: float, like: Tensor) -> Tensor:
        """Return a number as (1, 1), of the dtype and device of a tensor."""
        key = value, like.dtype, like.device
        if key not in self._constants:
            self._constants[key] = torch.full((1, 1), value, dtype=like.dtype, device=like.device)
        return self._constants[key]


def _std(rms: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the noise scale of weights: their root mean squares, rounded to bfloat16."""
    return rms.to(torch.bfloat16).to(dtype) / reference.BYTES_STD
