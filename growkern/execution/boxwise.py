"""Compute one box of one target tensor at a time, from sources elsewhere, of which only the rows that the box copies are read."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from growkern.distributed.shards import Box, Range
from growkern.execution import torch_backend as reference
from growkern.execution.fills import Given
from growkern.execution.finite import check
from growkern.execution.grouping import grouped
from growkern.execution.perturb import finish
from growkern.execution.pieces import Piece
from growkern.execution.rows import merged
from growkern.execution.tiles import MEAN, Job, Tiler
from growkern.optimizer.state_rules import VALUE, Rule
from growkern.planning.growth_plan import GrowthPlan, TensorRow


class Stored(Protocol):
    """A source tensor that is not in memory.

    Attributes:
        name: Name of the tensor for the user.
        shape: Shape of the whole tensor.
        dtype: Dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self, into: Tensor, rows: Sequence[Range] | None = None) -> None:
        """Read rows (None: all) into the same rows of a tensor of the whole shape."""
        ...


class Boxwise:
    """A growth on the CPU that holds a source tensor and a box of a target at a time; the numbers are those of ``Execution``.

    Attributes:
        plan: The plan.
        tiler: ``Tiler`` of the plan; its ``stds`` are the noise scales that are known.
        notes: Notes on optimizer state for the user, so far.
    """

    def __init__(self, plan: GrowthPlan, given: Given | None = None) -> None:
        """``given``: see ``Tiler``."""
        self.plan, self.tiler = plan, Tiler(plan, given)
        self.notes: list[str] = []
        self._means: dict[tuple[str, str], Tensor] = {}  # by target and name of the source

    def grown(
        self, row: TensorRow, source: Stored, rule: Rule | None, next_layer: Stored | None = None, box: Box | None = None
    ) -> Tensor:  # fmt: skip
        """Compute a target tensor, or a box of it.

        Args:
            row: Row of the target in the plan.
            source: The row's source: a weight, or optimizer state.
            rule: Rule of the tensor; None for a tensor that is copied.
            next_layer: The next layer's tensor, for a row that copies a part of it.
            box: The box; None for the whole target.

        Raises:
            CommitError: Elements would become NaN or infinite.
        """
        shape = source.shape if rule is None else rule.shape(self.plan.shapes(row)[1])
        ranges = tuple((0, n) for n in shape) if box is None else box.ranges
        if row.source in self.plan.counters and rule is VALUE:
            numbers = torch.arange(shape[-1], dtype=source.dtype).expand(shape)
            return numbers[tuple(slice(first, first + n) for first, n in ranges)].contiguous()
        whole = torch.empty(
            source.shape, dtype=source.dtype
        )  # pages that are not read take no memory
        if rule is None or not self.plan.changes(row):
            source.read(whole, ranges[:1] if box else None)
            return whole if box is None else whole[box.slices].clone()
        target = torch.empty([n for _, n in ranges], dtype=source.dtype)
        above = whole if next_layer is None else torch.empty_like(whole)
        job = self.tiler.job(row, whole, target, rule, above, box)
        if target.numel():
            self._write(job, source, next_layer)
        return target

    def check(self, row: TensorRow, source: Stored, box: Box | None) -> None:
        """Raise UnsupportedModelError if a weight cannot be computed box by box."""
        if self.plan.changes(row):
            self._blank(row, source)._replace(box=box).place()

    def measure(self, row: TensorRow, source: Stored) -> None:
        """Read a weight to measure the strength of its noise, where it gets noise by its root mean square alone."""
        job = self._blank(row, source)
        source.read(job.source)
        self.tiler.measure([job], lambda _: None)

    def is_measured(self, row: TensorRow, source: Stored) -> bool:
        """True when a weight has to be read whole unless ``stds`` has the strength of its noise."""
        if row.source in self.tiler.stds or not source.dtype.is_floating_point:
            return False
        return self.plan.changes(row) and self.tiler.reads_all(self._blank(row, source))

    def _blank(self, row: TensorRow, source: Stored) -> Job:
        whole = torch.empty(source.shape, dtype=source.dtype)
        return self.tiler.job(row, whole, torch.empty(0, dtype=source.dtype), VALUE, whole)

    def _write(self, job: Job, source: Stored, next_layer: Stored | None) -> None:
        """Read what a job needs of its sources, and write its target."""
        row, whole, target, rule, tiling, above, box, _ = job
        assert above is not None
        job = job._replace(mean=self._means.get((row.name, source.name)))
        partly = box is not None and not self.tiler.reads_all(job)
        if not partly:
            source.read(whole)
            if next_layer is not None:
                next_layer.read(above)
            self.tiler.measure([job], lambda _: None)
            if box is not None and tiling is not None and MEAN in tiling.statistics:
                mean = self.tiler.part_of_mean(row, whole, rule)
                if mean.isfinite():  # the next box needs no other rows than its own
                    self._means[row.name, source.name] = mean
                    job = job._replace(mean=mean)
        made = grouped(self.tiler, [job])
        if partly:
            pieces = [piece for group in made.groups for piece in group.pieces]
            source.read(whole, rows_of(pieces, whole))
            if next_layer is not None:
                next_layer.read(above, rows_of(pieces, above))
        reference.expand(made.groups)
        finish(job, self.plan)
        statistics = made.statistics
        if partly:
            statistics = []  # they were of elements that were not read
            if not target.is_floating_point() or bool(target.isfinite().all()):
                return
            source.read(whole)
            if next_layer is not None:
                next_layer.read(above)
        self.notes += check(self.tiler, [job], statistics, lambda _row, _target: source.name)


def rows_of(pieces: Iterable[Piece], whole: Tensor) -> tuple[Range, ...]:
    """Return the ranges of rows, along the first axis of a contiguous tensor, that pieces read of it."""
    start, n_row = whole.data_ptr(), whole.numel() // max(1, len(whole)) * whole.element_size()
    spans = list[Range]()
    for piece in pieces:
        src = piece.src
        if src.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr():
            continue  # a constant, or a mean
        first, ends = src.data_ptr() - start, [n - 1 for n in src.shape]
        if piece.rows is not None:
            least = int(piece.rows.min())
            first += least * src.stride(0) * src.element_size()
            ends[0] = int(piece.rows.max()) - least
        last = (
            first + sum(n * s for n, s in zip(ends, src.stride(), strict=True)) * src.element_size()
        )
        spans.append((first // n_row, last // n_row + 1))
    return merged(spans)
