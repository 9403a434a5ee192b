"""Tensors that pads are filled from: zeros, means, and the rows of a width method."""

from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from growkern.errors import CommitError, PlanError
from growkern.execution.axis_runs import AxisLayout
from growkern.execution.measures import chunks

Given = Callable[[Tensor, int], Tensor]
Slot = Literal[
    "source", "next layer", "zero", "mean", "mean row", "mean column", "mean of law", "rows of method", "columns of method",
]  # fmt: skip
BROKEN = "Load a checkpoint with finite weights, or set these elements."


class Fills:
    """Fills of one source; each is computed once.

    Attributes:
        statistics: Fills that were computed from elements of the source.
        n_statistics: Number of times that the whole source was read for them.
    """

    def __init__(
        self, name: str, source: Tensor, rows: AxisLayout, cols: AxisLayout, shares: Callable[[AxisLayout], Tensor],
        given: Given | None, *, finite_only: bool,
    ) -> None:  # fmt: skip
        """``shares``: see ``AxisLayout.shares``; ``given``: see ``Tiler``; ``finite_only``: means are of the elements that are finite."""
        self.name, self.source, self.rows, self.cols = name, source, rows, cols
        self._shares, self._given, self._finite_only = shares, given, finite_only
        self.statistics: list[Tensor] = []
        self.n_statistics = 0

    def of(self, slot: Slot) -> Tensor:
        """Return the fill of a slot: (1, 1), one row, one column, or the method's new rows or columns."""
        if slot == "mean of law":
            made = self._mean_of_law()
        elif slot == "rows of method":
            made = self._new_rows
        elif slot == "columns of method":
            made = self._new_rows.T
        else:
            made = self._mean(slot != "mean column", slot != "mean row")
        self.statistics.append(made)
        return made

    @cached_property
    def _new_rows(self) -> Tensor:
        """New rows, or new columns as rows, from the width method."""
        if self._given is None:
            raise PlanError(
                "the plan's width method computes the new coordinates: pass the method as width= beside plan=."
            )
        self.n_statistics += 1
        rows = self.rows.pad == "from_method" and self.rows.index_map.has_pads
        source, layout = (self.source, self.rows) if rows else (self.source.T, self.cols)
        if n := int(source.isfinite().logical_not().sum()):  # the method would fail, or spread them
            raise CommitError(
                f"cannot compute new rows of {self.name}: {n} of {source.numel()} elements "
                f"{'is' if n == 1 else 'are'} not finite. {BROKEN} "
                "Nothing was changed."
            )
        return self._given(source, layout.index_map.n_target - layout.n_copied).contiguous()

    def _mean(self, over_rows: bool, over_cols: bool) -> Tensor:
        """Return the mean over the rows, the columns or both, (1, C), (R, 1) or (1, 1); the rows of each line apart."""
        self.n_statistics += 1
        if over_rows and not over_cols and self.rows.lines is not None:
            lengths, _ = self.rows.lines
            n_cols = self.source.shape[1]
            return self.source.reshape(*lengths, n_cols).mean(1).view(-1, n_cols)
        parts = list(chunks(self.source))
        if over_cols:
            parts = [part.mean(1, keepdim=True) for part in parts]
        if over_rows:
            parts = [_joined([part.sum(0, keepdim=True) for part in parts])]
            return parts[0].sum(0, keepdim=True) / max(1, self.source.shape[0])
        return _joined(parts)

    def _mean_of_law(self) -> Tensor:
        """Return the mean of all copied elements, scaled by the law: the start value of an element that copies no source element."""
        rows, cols = map(self._shares, (self.rows, self.cols))
        self.n_statistics += 1
        source, share = self.source, 1.0
        if self._finite_only:
            finite = source.isfinite()
            source, share = source.where(finite, 0), finite.double().mean().item()
        mean = weighted_sum(source, rows, cols)
        return (mean if share == 1 else mean / (share or 1)).view(1, 1)


def weighted_sum(source: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """Return ``sum(rows[i] * source[i, j] * cols[j])``, ()."""
    return rows @ _joined([chunk @ cols for chunk in chunks(source)])


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
