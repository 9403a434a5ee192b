"""What pads are filled from: zeros, means, and the rows of a width method. Sources that are cut alike are read together."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from growkern.errors import CommitError, PlanError
from growkern.execution.axis_runs import AxisLayout
from growkern.execution.measures import chunks
from growkern.support.threads import read_each

Given = Callable[[Tensor, int], Tensor]
Slot = Literal[
    "source", "next layer", "zero", "mean", "mean row", "mean column", "mean of law", "rows of method", "columns of method",
]  # fmt: skip
MEANS: tuple[Slot, ...] = "mean", "mean row", "mean column", "mean of law"
BROKEN = "Load a checkpoint with finite weights, or set these elements."


class Fills:
    """Fills of sources that are cut alike; ``measure`` computes their means.

    Attributes:
        statistics: Fills that were computed from elements of the sources, one per source in each list.
        n_statistics: Number of times that every source is read for them.
    """

    def __init__(
        self, names: Sequence[str], sources: Sequence[Tensor], rows: AxisLayout, cols: AxisLayout, slots: Sequence[Slot],
        shares: Callable[[AxisLayout], Tensor], given: Given | None, *, finite_only: bool,
    ) -> None:  # fmt: skip
        """``shares``: see ``AxisLayout.shares``; ``given``: see ``Tiler``; ``finite_only``: means are of the elements that are finite."""
        self.names, self.sources, self.rows, self.cols = names, sources, rows, cols
        self._given, self._finite_only = given, finite_only
        self.means: dict[Slot, list[Tensor]] = {slot: [*sources] for slot in slots if slot in MEANS}
        self._shares = (shares(rows), shares(cols)) if "mean of law" in slots else None
        self.statistics: list[list[Tensor]] = []
        self.n_statistics = len(self.means)

    def of(self, slot: Slot) -> list[Tensor]:
        """Return the fill of a slot for each source: (1, 1), one row, one column, or the method's new rows or columns."""
        if slot == "rows of method":
            made = self._new_rows
        elif slot == "columns of method":
            made = [new.T for new in self._new_rows]
        else:
            made = self.means[slot]
        if slot == "mean of law":
            sums = torch.stack(made)
            aligned = sums.new_empty(len(sums), 16 // sums.itemsize)  # each as if it were allocated
            aligned[:, 0] = sums
            made = [*aligned[:, None, :1].unbind()]
        self.statistics.append(made)
        return made

    def mean(self, slot: Slot, source: Tensor) -> Tensor:
        """Return a mean of a source: (1, 1), one row or one column; the mean by the law as ()."""
        if slot == "mean of law":
            return self._mean_of_law(source)
        return self._mean(source, slot != "mean column", slot != "mean row")

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
        rows = self.rows.pad == "from_method" and self.rows.index_map.has_pads
        source, layout = (source, self.rows) if rows else (source.T, self.cols)
        if n := int(source.isfinite().logical_not().sum()):  # the method would fail, or spread them
            raise CommitError(
                f"cannot compute new rows of {name}: {n} of {source.numel()} elements "
                f"{'is' if n == 1 else 'are'} not finite. {BROKEN} "
                "Nothing was changed."
            )
        return self._given(source, layout.index_map.n_target - layout.n_copied).contiguous()

    def _mean(self, source: Tensor, over_rows: bool, over_cols: bool) -> Tensor:
        """Return the mean over the rows, the columns or both, (1, C), (R, 1) or (1, 1); the rows of each line apart."""
        if over_rows and not over_cols and self.rows.lines is not None:
            lengths, _ = self.rows.lines
            n_cols = source.shape[1]
            return source.reshape(*lengths, n_cols).mean(1).view(-1, n_cols)
        parts = list(chunks(source))
        if over_cols:
            parts = [part.mean(1, keepdim=True) for part in parts]
        if not over_rows:
            return _joined(parts)
        sums = [part.sum(0, keepdim=True) for part in parts]
        return (sums[0] if len(sums) == 1 else torch.stack(sums).sum(0)) / max(1, source.shape[0])

    def _mean_of_law(self, source: Tensor) -> Tensor:
        """Return the mean of all copied elements, scaled by the law: the start value of an element that copies no source element."""
        assert self._shares is not None, "a mean by the law is wanted"
        rows, cols = self._shares
        if not self._finite_only:
            return weighted_sum(source, rows, cols)
        finite = source.isfinite()
        share = finite.double().mean().item() or 1
        return weighted_sum(source.where(finite, 0), rows, cols) / share


def measure(several: Sequence[Fills]) -> None:
    """Compute all means of several fills; on a CPU in threads that wait for each other once."""
    jobs: list[tuple[Fills, Slot, int, Tensor]] = [
        (fills, slot, i, source)
        for fills in several
        for slot in fills.means
        for i, source in enumerate(fills.sources)
    ]

    def one(job: tuple[Fills, Slot, int, Tensor]) -> None:
        fills, slot, i, source = job
        fills.means[slot][i] = fills.mean(slot, source)

    for kind in {source.device.type for *_, source in jobs}:
        own = [job for job in jobs if job[-1].device.type == kind]
        read_each(own, one, lambda job: job[-1])


def weighted_sum(source: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return ``sum(rows[i] * source[i, j] * cols[j])``, ()."""
    return rows @ _joined([chunk @ cols for chunk in chunks(source)])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
