"""How tensors with the same axes are cut: a run of rows by a run of columns reads the source, the next layer's, or a fill."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from growkern.execution.axis_runs import AxisLayout, AxisRun, Reach
from growkern.optimizer.state_rules import Rule
from growkern.planning.axis_map import AxisMap, Pad
from growkern.planning.index_map import PAD

Slot = Literal[
    "source", "next layer", "zero", "mean", "mean row", "mean column", "mean of law", "rows of method", "columns of method",
]  # fmt: skip
MEANS: tuple[Slot, ...] = "mean", "mean row", "mean column", "mean of law"


class Cut(NamedTuple):
    """A run of rows by a run of columns that is written from one tensor of a job: the source, the next layer's, or a fill."""

    slot: Slot
    rows: AxisRun
    cols: AxisRun
    at: tuple[int, int]  # first row and column in the tensor that is read
    adds_noise: bool

    def of(self, read: Tensor) -> Tensor:
        """Return the part that is read; a row, a column or an element of a fill is repeated."""
        for axis, run in enumerate((self.rows, self.cols)):
            if run.index is None and (n := read.shape[axis]) != run.n:
                if n == 1:
                    read = read.expand(run.n, -1) if axis == 0 else read.expand(-1, run.n)
                else:
                    read = read.narrow(axis, self.at[axis], run.n)
        return read


class Tiling(NamedTuple):
    """How tensors with the same axes are cut."""

    rows: AxisLayout
    cols: AxisLayout
    cuts: list[Cut]
    slots: list[Slot]  # the tensors that the cuts read
    adds_noise: bool
    centered: list[int]  # axes along which the mean is subtracted first
    reach: Reach
    n_row_axes: int
    source: tuple[int, int]  # matrix shape
    target: tuple[int, int]

    @property
    def statistics(self) -> set[str]:
        """What a target needs of all elements of its source, apart from its noise scale: means, or the method's rows."""
        fills: set[str] = {*self.slots} - {"source", "next layer", "zero"}
        return fills | ({"mean along an axis"} if self.centered else set[str]())


def cut_of(rows: AxisLayout, cols: AxisLayout, r: AxisRun, c: AxisRun, rule: Rule, device: torch.device) -> Cut:  # fmt: skip
    """Decide what a run of rows by a run of columns reads. A weight gets noise if it has twin noise or a random pad, and no other pad."""
    pads: tuple[Pad, ...] = tuple(
        layout.pad for layout, run in ((rows, r), (cols, c)) if run.source == PAD
    )
    heard = all(any(copy.noise for copy in run.copies) for run in (r, c))
    heard = heard and (rows.noisy or cols.noisy)
    drawn = all(pad in ("random_reader", "random_writer") for pad in pads)
    adds_noise = rule.is_weight and drawn and (heard or "random_writer" in pads)
    at = r.source, c.source
    if not pads:
        slot = "next layer" if r.from_next_layer or c.from_next_layer else "source"
    elif not rule.is_weight and rule.missing == "mean":
        slot, r, c = "mean of law", r.unscaled.unindexed, c.unscaled.unindexed
    elif rule.is_weight and pads == ("from_method",):
        if r.source == PAD:
            slot, at = "rows of method", (rows.n_pads_before(r.copies[0].target), c.source)
        else:
            slot, at = "columns of method", (r.source, cols.n_pads_before(c.copies[0].target))
        r, c = r.unscaled, c.unscaled
    elif not rule.is_weight or any(pad != "mean" for pad in pads):
        slot = "zero"
        if adds_noise and "random_writer" in pads:
            r, c = r.drawn((rows if rows.has_random_writer else cols).drawn), c.drawn(1.0)
        r, c = r.unindexed, c.unindexed
    elif r.source == PAD:
        slot = "mean" if c.source == PAD else "mean row"
        if slot == "mean row" and rows.lines:  # the mean of an expert's rows, not of all experts'
            r = rows.by_line(r, device)
    else:
        slot = "mean column"
    return Cut(slot, r, c, at, adds_noise)


def n_row_axes(axes: tuple[AxisMap, ...]) -> int:
    """Return the number of row axes; the columns are the axes after a single grown axis, else the last grown axis and those after it."""
    grown = [i for i, axis in enumerate(axes) if not axis.is_identity]
    if len(grown) == 1 and grown[0] < len(axes) - 1:
        return grown[0] + 1
    return grown[-1] if grown else len(axes) - 1
