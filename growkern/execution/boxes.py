"""Narrow the pieces of a whole target to the rectangle that a process holds of it: counters of noise and scales keep their places."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from growkern.distributed.shards import Range
from growkern.execution.pieces import Copy, Piece


def narrowed(piece: Piece, rows: Range, cols: Range, target: Tensor) -> Iterator[Piece]:
    """Yield the parts of a piece that fall into a rectangle of its target.

    Args:
        piece: A piece of the whole target.
        rows: Range of rows of the rectangle.
        cols: Range of columns.
        target: The rectangle, which the pieces write.
    """
    n_rows, n_cols = piece.shape
    for at_rows, row_copies in _within(piece.row_copies, n_rows, rows):
        for at_cols, col_copies in _within(piece.col_copies, n_cols, cols):
            src, by_row = _read(piece.src, piece.rows, at_rows, 0)
            src, by_col = _read(src, piece.cols, at_cols, 1)
            yield Piece(src, target, row_copies, col_copies, by_row, by_col, piece.noise)


def _within(
    copies: Sequence[Copy], n: int, of: Range
) -> Iterator[tuple[slice | Tensor, tuple[Copy, ...]]]:
    """Yield coordinates of a source with their copies inside a range of the target; copies of the same coordinates stay together."""
    first, length = of
    together: dict[tuple[int, int], list[Copy]] = {}
    for copy in copies:
        if copy.targets is not None:
            inside = (copy.targets >= first) & (copy.targets < first + length)
            if len(at := inside.nonzero().flatten()):
                own = _part(copy, at)
                assert own.targets is not None
                yield at, (replace(own, targets=own.targets - first, ids=_ids(copy, at)),)
            continue
        start, stop = max(0, first - copy.target), min(n, first + length - copy.target)
        if start < stop:
            moved = replace(
                _part(copy, slice(start, stop)),
                target=copy.target + start - first,
                first_id=copy.first_id + start,
            )
            together.setdefault((start, stop), []).append(moved)
    for bounds, members in together.items():
        yield slice(*bounds), tuple(members)


def _part(copy: Copy, at: slice | Tensor) -> Copy:
    """Return a copy of some coordinates, with the vectors of these."""
    vectors = {
        name: None if (vector := getattr(copy, name)) is None else vector[at]
        for name in ("targets", "scales", "noises", "ids")
    }
    return replace(copy, **vectors)


def _ids(copy: Copy, at: Tensor) -> Tensor:
    return copy.first_id + at.to(torch.int32) if copy.ids is None else copy.ids[at]


def _read(
    src: Tensor, index: Tensor | None, at: slice | Tensor, axis: int
) -> tuple[Tensor, Tensor | None]:
    """Return what some coordinates of a piece read along an axis: the source or a part of it, and the index."""
    if index is not None:
        return src, index[at]
    if isinstance(at, Tensor):
        return src, at.to(torch.int32)
    return src.narrow(axis, at.start, at.stop - at.start), None
