"""What pads are filled from: zeros, means, and the rows of a width method. Sources that are cut alike are read together."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from growkern.errors import CommitError, PlanError
from growkern.execution.measures import chunks
from growkern.execution.tiling import MEANS, Slot, Tiling
from growkern.support.threads import read_each

Given = Callable[[Tensor, int], Tensor]
FEW = 1 << 13  # elements of a source that is copied to be read together with others
TOGETHER = (
    1 << 15
)  # elements that are read together: an operator runs on one core, see ``support/threads.py``
BROKEN = "Load a checkpoint with finite weights, or set these elements."


class Fills:
    """Fills of sources that are cut alike; ``measure`` computes their means.

    Attributes:
        means: The mean of each source by slot, when they are measured.
        n_statistics: Number of times that every source is read for them.
    """

    def __init__(
        self, names: Sequence[str], sources: Sequence[Tensor], tiling: Tiling, slots: Sequence[Slot],
        shares: Callable[[], tuple[Tensor, Tensor]], given: Given | None, *, finite_only: bool,
    ) -> None:  # fmt: skip
        """``shares``: see ``AxisLayout.shares``, of rows and of columns; ``given``: see ``Tiler``; ``finite_only``: see ``grouped``."""
        self.names, self.sources, self.tiling = names, sources, tiling
        self._shares, self._given, self._finite_only = shares, given, finite_only
        self.means: dict[Slot, list[Tensor]] = {slot: [*sources] for slot in slots if slot in MEANS}
        self.n_statistics = len(self.means)

    def of(self, slot: Slot) -> list[Tensor]:
        """Return the fill of a slot for each source: (1, 1), one row, one column, or the method's new rows or columns."""
        if slot == "rows of method":
            return self._new_rows
        if slot == "columns of method":
            return [new.T for new in self._new_rows]
        if slot != "mean of law":
            return self.means[slot]
        sums = torch.stack(self.means[slot])
        aligned = sums.new_empty(len(sums), 16 // sums.itemsize)  # each as if it were allocated
        aligned[:, 0] = sums
        return [*aligned[:, None, :1].unbind()]

    def batches(self) -> Iterator[tuple[Slot, slice]]:
        """Yield the means to compute: a slot, and sources that are read together because they are small."""
        n = self.sources[0].numel()
        step = TOGETHER // max(1, n) if n <= FEW else 1
        for slot in self.means:
            for first in range(0, len(self.sources), step):
                yield slot, slice(first, first + step)

    def measure(self, slot: Slot, at: slice) -> None:
        """Compute a mean of some sources: (1, 1), one row or one column of each; the mean by the law as ()."""
        own = [source.view(self.tiling.source) for source in self.sources[at]]
        sources = torch.stack(own) if own[0].numel() <= FEW else own[0][None]
        self.means[slot][at] = self._means(sources, slot).unbind()

    @cached_property
    def _new_rows(self) -> list[Tensor]:
        """New rows, or new columns as rows, from the width method."""
        self.n_statistics += 1
        return [self._given_rows(*pair) for pair in zip(self.names, self.sources, strict=True)]

    def _given_rows(self, name: str, source: Tensor) -> Tensor:
        if self._given is None:
            raise PlanError(
                "the plan's width method computes the new coordinates: pass the method as width= beside plan=."
            )
        source, rows, cols = source.view(self.tiling.source), self.tiling.rows, self.tiling.cols
        by_row = rows.pad == "from_method" and rows.index_map.has_pads
        source, layout = (source, rows) if by_row else (source.T, cols)
        if n := int(source.isfinite().logical_not().sum()):  # the method would fail, or spread them
            raise CommitError(
                f"cannot compute new rows of {name}: {n} of {source.numel()} elements "
                f"{'is' if n == 1 else 'are'} not finite. {BROKEN} "
                "Nothing was changed."
            )
        return self._given(source, layout.index_map.n_target - layout.n_copied).contiguous()

    def _means(self, sources: Tensor, slot: Slot) -> Tensor:
        """Return a mean of each of (n, R, C): (n, 1, 1), rows (n, 1, C) or columns (n, R, 1); the mean by the law as (n,)."""
        if slot == "mean of law":
            return self._means_of_law(sources)
        n, n_rows, n_cols = sources.shape
        if slot == "mean row" and self.tiling.rows.lines is not None:  # the rows of each line apart
            lengths, _ = self.tiling.rows.lines
            return sources.reshape(n, *lengths, n_cols).mean(2).view(n, -1, n_cols)
        parts = list(chunks(sources, 1))
        if slot != "mean row":
            parts = [part.mean(2, keepdim=True) for part in parts]
        if slot == "mean column":
            return _joined(parts)
        sums = [part.sum(1, keepdim=True) for part in parts]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)) / max(1, n_rows)

    def _means_of_law(self, sources: Tensor) -> Tensor:
        """Return the mean of all copied elements, scaled by the law: the start value of an element that copies no source element."""
        if not self._finite_only:
            return weighted_sums(sources, *self._shares())
        finite = sources.isfinite()
        share = finite.double().mean((1, 2))
        sums = weighted_sums(sources.where(finite, 0), *self._shares())
        return sums / share.where(share > 0, 1).to(sums.dtype)


def measure(several: Sequence[Fills]) -> None:
    """Compute all means of several fills; on a CPU in threads that wait for each other once."""
    jobs = [(fills, *batch) for fills in several for batch in fills.batches()]

    def one(job: tuple[Fills, Slot, slice]) -> None:
        fills, slot, at = job
        fills.measure(slot, at)

    for kind in {fills.sources[0].device.type for fills, *_ in jobs}:
        own = [job for job in jobs if job[0].sources[0].device.type == kind]
        read_each(own, one, lambda job: job[0].sources[0])


def weighted_sums(sources: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return ``sum(rows[i] * sources[k, i, j] * cols[j])``, (n,); of small matrices the same bits whatever they are read together with."""
    if sources[0].numel() <= FEW:
        return ((sources.to(cols.dtype) * cols).sum(2) * rows).sum(1)
    return _joined([part @ cols for part in chunks(sources, 1)]) @ rows


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
