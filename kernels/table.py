"""Pieces as a table of integers on the device, uploaded once: pointers, sizes, strides, and the copies of each rectangle."""

from array import array
from collections.abc import Iterator, Sequence
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
    """Records of copies and pieces, stored one after the other."""

    def __init__(self) -> None:
        self.numbers = array("q")
        self.copies: dict[int, int] = {}
        self.geometries: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        self.kept: list[Any] = []  # objects whose ids are keys above, kept alive

    def add(self, pieces: Sequence[Any], block_r: int, block_c: int | None) -> tuple[int, int, int]:
        """Append pieces, cut into tiles of ``block_r`` rows and ``block_c`` columns (None: all columns).

        Returns:
            Offset of the first record, number of records, number of tiles.
        """
        records, n_tiles, n_pieces = array("q"), 0, 0
        tiles: dict[int, int] = {}  # number of tiles by the id of a geometry's record
        target, dst, of_target = None, 0, ()
        for piece in pieces:
            if piece.dst is not target:  # the pieces of a target follow each other
                target, dst = piece.dst, piece.dst.data_ptr()
                of_target = target.shape, target.stride(), dst % 16, target.dtype
            src, noise = piece.src.data_ptr(), piece.noise
            drawn = (0, 0, 0) if noise is None else (noise.std.data_ptr(), *noise.keys)
            for fields in self._geometry(piece, src % 16, of_target, block_c is None):
                records.extend((n_tiles, src, dst, *drawn, *fields))
                n_pieces += 1
                if (n := tiles.get(id(fields))) is None:
                    n_rows, n_cols = fields[:2]
                    by_col = -(-n_cols // block_c) if block_c else min(n_cols, 1)
                    n = tiles[id(fields)] = -(-n_rows // block_r) * by_col
                n_tiles += n
        start = len(self.numbers)
        self.numbers.extend(records)
        return start, n_pieces, n_tiles

    def upload(self, device: torch.device) -> torch.Tensor:
        """Copy the table to a device."""
        return torch.frombuffer(self.numbers, dtype=torch.int64).to(device, copy=True)

    def _geometry(
        self, piece: Any, src_at: int, of_target: tuple[Any, ...], staged: bool
    ) -> list[tuple[int, ...]]:
        """Record fields from N_ROWS on, per stretch of columns; checked and computed once for all pieces of one shape and alignment."""
        src, dst = piece.src, piece.dst
        key = (
            id(piece.row_copies), id(piece.col_copies), id(piece.rows), id(piece.cols), piece.noise is None,
            src.shape, src.stride(), src_at, src.dtype, of_target,
        )  # fmt: skip
        records = self.geometries.get(key)
        if records is None:
            check(piece)
            self.kept.append(piece)
            flags = 0 if piece.pure_copy else ARITHMETIC.value
            flags |= 0 if piece.noise is None else NOISE.value
            n_rows, n_cols = piece.shape
            index = _pointer(piece.rows), _pointer(piece.cols)
            copies = self._copies(piece.row_copies), self._copies(piece.col_copies)
            records = self.geometries[key] = [
                (
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
                for first, n, wide in stretches(piece, n_cols, staged)
            ]
        return records

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
