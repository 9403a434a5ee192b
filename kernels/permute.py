"""``expand`` for index maps that are random on the columns: whole source rows are staged on chip, then permuted.

``dst[r.target + i, c.target + j] = (src[row(i), index[j]] + noise) * ...`` as in ``expand``. A gather from device memory fetches 32
bytes per element; with staging, each source row is read once, in order, and the gather runs in shared memory.
Bytes: R C_source read once + R C_target per copy of the rows written once, plus 4 C_target of index per tile of rows.
"""

import triton
import triton.language as tl

from growkern.kernels.table import (
    COL_INDEX,
    DST_WIDE,
    FIRST_TILE,
    FLAGS,
    N_COLS,
    N_ROWS,
    N_SRC,
    ROW_INDEX,
    SRC_COL,
    SRC_PTR,
    SRC_ROW,
)
from growkern.kernels.write import find, vector, write

SMALLEST, LARGEST = (
    1024,
    8192,
)  # column blocks for a staged row; longer rows are gathered through the caches
BLOCK_R = 8  # rows per program, one after the other
N_COLUMNS = tl.constexpr(4)  # adjacent columns per thread; more spill registers


def staged(n_cols: int, n_bytes: int) -> int:
    """Return the block that a source row of ``n_cols`` fits in; 0 if no block is large enough, and for float64, whose gather spills."""
    block = max(SMALLEST, triton.next_power_of_2(n_cols))
    return block if block <= LARGEST and n_bytes <= 4 else 0


def n_warps(block: int, warp_size: int) -> int:
    """Warps per program: at most 8 staged elements per thread, which fit in registers together with the operands of the stores.

    A program has at most 1024 threads.
    """
    return min(max(256, block // 8), 1024) // warp_size


@triton.jit
def _row(
    values, table_ptr, piece, row, DST: tl.constexpr, MATH: tl.constexpr, N_WIDE: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Permute a staged row and write it to all its target places, block by block of columns."""
    n_cols = tl.load(piece + N_COLS).to(tl.int32)
    if WIDE:
        n_cols = tl.multiple_of(n_cols, N_WIDE)  # the mask does not split a 16-byte access
    rows = row + tl.zeros([1, 1], tl.int32)
    block = 0
    while block * BLOCK_C < n_cols:
        cols = block * BLOCK_C + tl.arange(0, BLOCK_C)
        index = vector(tl.load(piece + COL_INDEX), cols, cols < n_cols, 0, tl.int32)
        taken = tl.gather(values, index, axis=0)[None, :]
        cols = cols[None, :]
        write(taken, table_ptr, piece, rows, cols, rows >= 0, cols < n_cols, DST, MATH, WIDE, True)
        block += 1


@triton.jit(do_not_specialize=["first_piece", "n_pieces"])
def permute_kernel(
    table_ptr,
    first_piece, n_pieces,
    SRC: tl.constexpr, DST: tl.constexpr, MATH: tl.constexpr, N_WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    piece = find(table_ptr + first_piece, n_pieces, pid)
    row = (pid - tl.load(piece + FIRST_TILE)).to(tl.int32) * BLOCK_R
    end = tl.minimum(row + BLOCK_R, tl.load(piece + N_ROWS).to(tl.int32))
    n_src = tl.load(piece + N_SRC).to(tl.int32)
    src_cols = tl.arange(0, BLOCK_S)
    while row < end:
        src_row = row
        if tl.load(piece + ROW_INDEX) != 0:
            src_row = tl.load(tl.load(piece + ROW_INDEX).to(tl.pointer_type(tl.int32)) + row)
        src_ptr = tl.load(piece + SRC_PTR).to(tl.pointer_type(SRC))
        src_ptr += src_row.to(tl.int64) * tl.load(piece + SRC_ROW)
        src_ptr += src_cols.to(tl.int64) * tl.load(piece + SRC_COL)

        values = tl.load(src_ptr, mask=src_cols < n_src, other=0)

        if tl.load(piece + FLAGS) & DST_WIDE != 0:
            _row(values, table_ptr, piece, row, DST, MATH, N_WIDE, True, BLOCK_C)
        else:  # unaligned: one address per element, so one column per thread
            _row(values, table_ptr, piece, row, DST, MATH, N_WIDE, False, BLOCK_C // N_COLUMNS)
        row += 1
