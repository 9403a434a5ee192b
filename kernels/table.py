"""Pieces as a table of integers on the device, uploaded once: pointers, sizes, strides, and the copies of each rectangle."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain
from struct import pack, unpack
from typing import Any

import torch
import triton.language as tl

(
    FIRST_TILE,
    SRC_PTR,
    DST_PTR,
    STD,
    ROW_KEY,
    COL_KEY,
    N_ROWS,
    N_COLS,
    SRC_ROW,
    SRC_COL,
    DST_ROW,
    ROW_INDEX,
    COL_INDEX,
    FLAGS,
    ROW_COPIES,
    COL_COPIES,
    N_SRC,
    FIRST_COL,
) = map(tl.constexpr, range(18))  # fields of a piece record; *_COPIES: number << 32 | offset
N_FIELDS = tl.constexpr(18)
TARGET, TARGETS, SCALE, SCALES, FACTOR, FACTORS, FIRST_ID, IDS, DRAWS = map(
    tl.constexpr, range(9)
)  # fields of a copy record; DRAWS: 0 for a copy with the counters of the copy before, whose draw it shares
N_COPY = tl.constexpr(9)
SRC_WIDE, DST_WIDE, ARITHMETIC, NOISE = (
    tl.constexpr(1 << i) for i in range(4)
)  # bits of FLAGS; *_WIDE: access in aligned 16-byte groups


class Table:
    """Records of copies, and after them the records of pieces."""

    def __init__(self) -> None:
        self.numbers = array("q")  # records of copies
        self.copies: dict[int, int] = {}
        self.kept: list[Any] = []  # objects whose ids are keys above, kept alive
        self.records: list[torch.Tensor] = []
        self.n_records = 0

    def add(
        self, members: Sequence[tuple[Any, Sequence[int]]], block_r: int, block_c: int | None
    ) -> tuple[int, int, int]:
        """Append pieces, cut into tiles of ``block_r`` rows and ``block_c`` columns (None: all columns).

        Args:
            members: Groups of tensors that are cut alike (``growkern.execution.pieces.Group``), and the indices of the pieces to append.
            block_r: Rows of a tile.
            block_c: Columns of a tile.

        Returns:
            Number of records before, number of records, number of tiles.
        """
        before, n_tiles = self.n_records, 0
        for group, indices in members:
            fields, origins, tiles = list[tuple[int, ...]](), list[int](), list[int]()
            noisy = list[int]()
            for k in indices:
                at, origin = group.offset(k) * group.pieces[k].src.itemsize, group.origins[k]
                for own in self._stretches(group.pieces[k], block_c is None):
                    n_rows, n_cols, *_ = own
                    by_col = -(-n_cols // block_c) if block_c else min(n_cols, 1)
                    noisy += [] if group.pieces[k].noise is None else [len(fields)]
                    tiles.append(-(-n_rows // block_r) * by_col)
                    fields.append((0, at, 0, 0, 0, 0, *own))
                    origins.append(origin)
            if fields:
                records = _broadcast(group, fields, origins, noisy)
                *firsts, own_tiles = accumulate(tiles, initial=0)
                n, starts = len(records), _integers(firsts) + n_tiles
                records[:, :, FIRST_TILE.value] = torch.arange(n)[:, None] * own_tiles + starts
                n_tiles += n * own_tiles
                self.records.append(records.flatten())
                self.n_records += n * len(fields)
        return before, self.n_records - before, n_tiles

    def content(self) -> torch.Tensor:
        """Return the whole table, int64 (n,)."""
        return torch.cat([torch.frombuffer(self.numbers, dtype=torch.int64), *self.records])

    def _stretches(self, piece: Any, staged: bool) -> Iterator[tuple[int, ...]]:
        """Check a piece, and yield the fields of its stretches of columns from N_ROWS on."""
        check(piece)
        src, dst = piece.src, piece.dst
        flags = 0 if piece.pure_copy else ARITHMETIC.value
        flags |= 0 if piece.noise is None else NOISE.value
        n_rows, n_cols = piece.shape
        index = _pointer(piece.rows), _pointer(piece.cols)
        copies = self._copies(piece.row_copies), self._copies(piece.col_copies)
        for first, n, wide in stretches(piece, n_cols, staged):
            yield (
                n_rows,
                n,
                *src.stride(),
                dst.stride(0),
                *index,
                flags | wide,
                *copies,
                src.shape[1],
                first,
            )

    def _copies(self, copies: tuple[Any, ...]) -> int:
        """Return number and offset of the copies, packed; copies that pieces share are written once."""
        if id(copies) not in self.copies:
            self.kept.append(copies)
            self.copies[id(copies)] = len(copies) << 32 | len(self.numbers)
            before = None
            for copy in copies:
                counters = copy.first_id, _pointer(copy.ids)
                self.numbers.extend((*_copy(copy), int(counters != before)))
                before = counters
        return self.copies[id(copies)]


def _broadcast(
    group: Any, fields: list[tuple[int, ...]], origins: list[int], noisy: list[int]
) -> torch.Tensor:
    """Return the records of every tensor of a group, int64 (tensors, records, fields): those of the first, with each one's pointers."""
    n = len(group.targets)
    records = _integers(chain.from_iterable(fields)).view(len(fields), -1).repeat(n, 1, 1)
    sources = _pointers(chain.from_iterable(group.sources)).view(n, -1)
    records[:, :, SRC_PTR.value] += sources[:, origins]
    records[:, :, DST_PTR.value] = _pointers(group.targets)[:, None]
    if noisy:
        drawn = _integers(x for noise in group.noises for x in (noise.std.data_ptr(), *noise.keys))
        records[:, noisy, STD.value : COL_KEY.value + 1] = drawn.view(n, 1, -1)
    return records


def _integers(numbers: Iterable[int]) -> torch.Tensor:
    """Return int64 (n,), ten times as fast as ``torch.tensor`` of a list."""
    return torch.frombuffer(array("q", numbers), dtype=torch.int64)


def _pointers(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return _integers(map(torch.Tensor.data_ptr, tensors))


def _copy(copy: Any) -> list[int]:
    scale, factor = unpack("<2q", pack("<2d", copy.scale, copy.noise))
    vectors = (_pointer(t) for t in (copy.targets, copy.scales, copy.noises, copy.ids))
    targets, scales, factors, ids = vectors
    return [copy.target, targets, scale, scales, factor, factors, copy.first_id, ids]


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def check(piece: Any) -> None:
    """Raise IndexError for a piece that reads or writes outside of its tensors. The growth plan has checked the index values."""
    (n_rows, n_cols), (dst_rows, dst_cols) = piece.shape, piece.dst.shape
    last_row = max((c.target + n_rows for c in piece.row_copies if c.targets is None), default=0)
    last_col = max((c.target + n_cols for c in piece.col_copies), default=0)
    if last_row > dst_rows or last_col > dst_cols or (piece.dst.stride(1) != 1 and dst_cols > 1):
        raise IndexError(
            f"a piece of {n_rows} x {n_cols} writes beyond a target of {dst_rows} x {dst_cols}"
        )
    if max(n_rows, n_cols, dst_rows, dst_cols) >= 1 << 31:
        raise IndexError(f"a side of {max(dst_rows, dst_cols)} is counted in 32 bits")
    if n_cols and dst_rows > 1 and piece.dst.stride(0) < dst_cols:
        raise IndexError("the rows of a target overlap")
    math = torch.float64 if piece.dst.dtype == torch.float64 else torch.float32
    whole = [(piece.rows, n_rows), (piece.cols, n_cols)]
    parts: list[tuple[Any, int]] = []
    for copies, n in ((piece.row_copies, n_rows), (piece.col_copies, n_cols)):
        whole += [(vector, n) for copy in copies for vector in (copy.targets, copy.ids)]
        parts += [(vector, n) for copy in copies for vector in (copy.scales, copy.noises)]
        if any(not copy.target >= 0 or not 0 <= copy.first_id <= (1 << 31) - n for copy in copies):
            raise IndexError(
                f"a copy of {n} rows or columns begins before its target or its counters"
            )
    if any(copy.targets is not None for copy in piece.col_copies):
        raise IndexError("columns cannot be scattered")
    if piece.noise is not None:
        parts.append((piece.noise.std.view(-1), 1))
    for vectors, dtype in ((whole, torch.int32), (parts, math)):
        for vector, n in vectors:
            if vector is None:
                continue
            if len(vector) != n:
                raise IndexError(f"a copy of {n} rows or columns has vectors of another length")
            if (
                vector.dtype != dtype
                or not vector.is_contiguous()
                or vector.device != piece.dst.device
            ):
                raise IndexError(
                    f"a vector is {vector.dtype} on {vector.device}; contiguous {dtype} is read"
                )
    if piece.src.device != piece.dst.device or piece.src.is_meta:
        raise IndexError(f"a piece goes from {piece.src.device} to {piece.dst.device}")


def stretches(piece: Any, n_cols: int, staged: bool = False) -> Iterator[tuple[int, int, int]]:
    """Yield stretches of columns (first, number, flags): a body of aligned 16-byte groups, and the unaligned head and tail.

    A piece whose source rows are staged is one stretch, because every stretch would stage its rows again.
    """
    src, dst = piece.src, piece.dst
    n_wide = 16 // min(src.itemsize, dst.itemsize)
    places = {copy.target % n_wide for copy in piece.col_copies}
    vectors = any(v is not None for c in piece.col_copies for v in (c.scales, c.noises, c.ids))
    aligned = len(places) == 1 and not dst.data_ptr() % 16 and not dst.stride(0) % n_wide
    if staged:
        wide = aligned and places == {0} and n_cols % n_wide == 0
        yield 0, n_cols, DST_WIDE.value if wide else 0
        return
    if vectors or piece.cols is not None or not aligned:
        yield 0, n_cols, 0
        return
    head = min(n_cols, -places.pop() % n_wide)
    body = (n_cols - head) // n_wide * n_wide
    wide = src.stride(1) == 1 and src.stride(0) % n_wide == 0
    wide = wide and (src.data_ptr() + head * src.itemsize) % 16 == 0
    flags = DST_WIDE.value | (SRC_WIDE.value if wide else 0)
    for first, n, own_flags in (
        (0, head, 0),
        (head, body, flags),
        (head + body, n_cols - head - body, 0),
    ):
        if n:
            yield first, n, own_flags
