"""``dst[r.target + i, c.target + j] = (src[row(i), col(j)] + noise) * r.scale * c.scale * r.scales[i] * c.scales[j]`` for all copies
``r`` of the rows and ``c`` of the columns of a rectangle, over many rectangles per launch.

One launch covers all pieces of one (source dtype, target dtype): weights, gradients and optimizer state of a whole model. A program
finds its piece by a binary search over first tiles, loads a tile of the source once, and writes the tile to all its target places,
with scales, twin noise and fills (sources of stride 0) in the same pass.
Bytes: R C (source) read once + copies R C (target) written once per piece, plus the vectors of random index maps.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl

from growkern.kernels.permute import BLOCK_R as PERMUTED_R
from growkern.kernels.permute import N_COLUMNS, n_warps, permute_kernel, staged
from growkern.kernels.table import (
    COL_INDEX,
    DST_WIDE,
    FIRST_COL,
    FIRST_TILE,
    FLAGS,
    N_COLS,
    N_FIELDS,
    N_ROWS,
    ROW_INDEX,
    SRC_COL,
    SRC_PTR,
    SRC_ROW,
    SRC_WIDE,
    Table,
)
from growkern.kernels.write import find, vector, write

BLOCK_C = 256  # columns of a tile, no more than threads, so that vectors along columns load in the layout of the tile
N_WARPS = 8
N_REGISTERS = 64  # per thread, for 1024 threads at a time on an SM; without this limit ptxas spills registers to fit more threads
N_TILES, N_BUSY = 4, 1 << 25  # tiles per program of a launch of at least so many source elements
DTYPES = {
    getattr(torch, name): getattr(tl, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64")
}


def block_r(n_bytes: int) -> int:
    """Rows of a tile: 8 elements per thread, 2 elements of 8 bytes, which do not spill. Not yet measured on a device."""
    return 8 if n_bytes < 8 else 2


def narrow_r(n_bytes: int) -> int:
    """Rows per iteration for unaligned addresses: 2 elements per thread, 1 element of 8 bytes, so that the addresses fit in registers."""
    return 2 if n_bytes < 8 else 1


@triton.jit
def _tile(
    table_ptr, piece, row, block,
    SRC: tl.constexpr, DST: tl.constexpr, MATH: tl.constexpr,
    FROM_WIDE: tl.constexpr, TO_WIDE: tl.constexpr, N_WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy a tile: ``BLOCK_R`` rows from ``row`` on, of a block of columns.

    Columns count from the piece's first column, so that they align with groups of 16 bytes.
    """
    first = tl.load(piece + FIRST_COL).to(tl.int32)
    loaded = tl.load(piece + N_COLS)
    n_cols = loaded.to(tl.int32)
    if not FROM_WIDE:  # add a 0 that the compiler cannot know: it would hold the addresses of all columns between tiles, and spill
        block += (loaded >> 32).to(tl.int32)
    col = block * BLOCK_C
    if TO_WIDE:
        n_cols = tl.multiple_of(n_cols, N_WIDE)  # the mask does not split a 16-byte access
    rows = row + tl.arange(0, BLOCK_R)[:, None]
    cols = col + tl.arange(0, BLOCK_C)[None, :]
    row_mask = rows < tl.load(piece + N_ROWS).to(tl.int32)
    col_mask = cols < n_cols
    src_rows = rows
    if tl.load(piece + ROW_INDEX) != 0:
        src_rows = vector(tl.load(piece + ROW_INDEX), rows, row_mask, 0, tl.int32)
    src_ptr = tl.load(piece + SRC_PTR).to(tl.pointer_type(SRC))
    src_ptr += src_rows.to(tl.int64) * tl.load(piece + SRC_ROW)

    if FROM_WIDE:  # in bytes, on the block: a hint on a scalar does not reach the load
        src_ptr = tl.multiple_of(src_ptr + first, [16, 16]) + cols
    else:
        src_cols = first + cols
        if not TO_WIDE:  # noqa: SIM102  (constexpr and tensor do not combine)
            if tl.load(piece + COL_INDEX) != 0:
                src_cols = vector(tl.load(piece + COL_INDEX), src_cols, col_mask, 0, tl.int32)
        src_ptr += src_cols.to(tl.int64) * tl.load(piece + SRC_COL)
    values = tl.load(src_ptr, mask=row_mask & col_mask, other=0)

    write(values, table_ptr, piece, rows, cols, row_mask, col_mask, DST, MATH, TO_WIDE, not TO_WIDE)


@triton.jit(do_not_specialize=["first_piece", "n_pieces", "n_rows"])
def expand_kernel(
    table_ptr,
    first_piece, n_pieces, n_rows,
    SRC: tl.constexpr, DST: tl.constexpr, MATH: tl.constexpr,
    N_WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    """A program finds its piece once and copies ``n_rows`` of its rows, a tile after the other."""
    pid = tl.program_id(0).to(tl.int64)
    piece = find(table_ptr + first_piece, n_pieces, pid)
    tile = (pid - tl.load(piece + FIRST_TILE)).to(tl.int32)
    n_across = (tl.load(piece + N_COLS).to(tl.int32) + BLOCK_C - 1) // BLOCK_C
    row = tile // n_across * n_rows
    block = tile % n_across
    flags = tl.load(piece + FLAGS)
    end = tl.minimum(row + n_rows, tl.load(piece + N_ROWS).to(tl.int32))
    if flags & SRC_WIDE != 0:
        while row < end:  # no range(): the interpreter of triton 3.6 cannot loop to a loaded bound
            _tile(
                table_ptr, piece, row, block, SRC, DST, MATH, True, True, N_WIDE, BLOCK_R, BLOCK_C
            )
            row += BLOCK_R
    elif flags & DST_WIDE != 0:
        while row < end:
            _tile(
                table_ptr, piece, row, block, SRC, DST, MATH, False, True, N_WIDE, BLOCK_R, BLOCK_C
            )
            row += BLOCK_R
    else:  # unaligned: one address per element, so few rows per iteration
        while row < end:
            _tile(table_ptr, piece, row, block, SRC, DST, MATH, False, False, N_WIDE, BLOCK_NARROW, BLOCK_C)  # fmt: skip
            row += BLOCK_NARROW


def expand(groups: Sequence[Any]) -> None:
    """Write every piece: one launch per pair of dtypes, one more per length of staged rows.

    Args:
        groups: Groups of tensors (``growkern.execution.pieces.Group``) on one device, with contiguous vectors and without overlap in the
            targets. Values are rounded once, at the store; a pure copy is bit-exact.

    Raises:
        IndexError: A piece does not fit its tensors (index values are not checked); nothing has been launched.
    """
    table, launches = tabled(groups)
    if not any(n_programs for *_, n_programs in launches):
        return
    on_device = table.content().to(groups[0].targets[0].device)
    with torch.cuda.device_of(on_device):
        for kernel, options, n_rows, first, n_pieces, n_programs in launches:
            if n_programs:
                kernel[(n_programs,)](on_device, first, n_pieces, *n_rows, **options)


Member = tuple[Any, list[int]]  # a group, and the indices of its pieces in a launch
# kernel, options, rows of a program of expand_kernel, offset of the first piece, number of pieces, number of programs
Launch = tuple[Any, dict[str, Any], tuple[int, ...], int, int, int]


def tabled(groups: Sequence[Any]) -> tuple[Table, list[Launch]]:
    """Do all host work: build the table, and list the launches."""
    table, launches = Table(), list[Launch]()
    for (src, dst, n_staged), members in kinds(groups).items():
        options = launch_options(src, dst, n_staged)
        if n_staged:
            launches.append((permute_kernel, options, (), *table.add(members, PERMUTED_R, None)))
        else:
            n_rows = rows_of_program(options["BLOCK_R"], members)
            launches.append((expand_kernel, options, (n_rows,), *table.add(members, n_rows, BLOCK_C)))  # fmt: skip
    start = len(table.numbers)  # the records of pieces follow those of copies
    return table, [
        (kernel, options, n_rows, start + before * N_FIELDS.value, n_pieces, n_programs)
        for kernel, options, n_rows, before, n_pieces, n_programs in launches
    ]


def rows_of_program(block: int, members: Sequence[Member]) -> int:
    """Rows per program: several tiles where a launch has so many elements that every multiprocessor is busy either way."""
    shapes = ((len(group.targets), *group.pieces[k].shape) for group, at in members for k in at)
    return block * (N_TILES if sum(map(prod, shapes)) >= N_BUSY else 1)


def kinds(groups: Sequence[Any]) -> dict[tuple[torch.dtype, torch.dtype, int], list[Member]]:
    """Sort pieces by launch: source dtype, target dtype, and the block that a staged row fits in (0: rows are not staged)."""
    found: dict[tuple[torch.dtype, torch.dtype, int], list[Member]] = {}
    for group in groups:
        own: dict[tuple[torch.dtype, torch.dtype, int], list[int]] = {}
        for k, piece in enumerate(group.pieces):
            n_staged = 0 if piece.cols is None else staged(piece.src.shape[1], piece.src.itemsize)
            own.setdefault((piece.src.dtype, piece.dst.dtype, n_staged), []).append(k)
        for kind, indices in own.items():
            found.setdefault(kind, []).append((group, indices))
    return found


def launch_options(src: torch.dtype, dst: torch.dtype, n_staged: int) -> dict[str, Any]:
    """Options that a launch is specialized on."""
    options: dict[str, Any] = dict(
        SRC=DTYPES[src], DST=DTYPES[dst], MATH=tl.float64 if dst == torch.float64 else tl.float32,
        num_warps=N_WARPS, enable_fp_fusion=False,  # no fused multiply-add: the same bits as the torch backend
    )  # fmt: skip
    if torch.version.hip is None:
        options |= dict(maxnreg=N_REGISTERS)
    if n_staged:
        warp_size = 32 if torch.version.hip is None else 64
        warps = n_warps(n_staged, warp_size)
        return options | dict(
            num_warps=warps, BLOCK_R=PERMUTED_R, BLOCK_S=n_staged, BLOCK_C=N_COLUMNS.value * warp_size * warps, N_WIDE=16 // dst.itemsize,
        )  # fmt: skip
    n_wide, rows = 16 // min(src.itemsize, dst.itemsize), block_r(dst.itemsize)
    return options | dict(
        N_WIDE=n_wide, BLOCK_R=rows, BLOCK_C=BLOCK_C, BLOCK_NARROW=narrow_r(dst.itemsize)
    )
