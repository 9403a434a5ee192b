"""``dst[i, j] = (src[row(i), col(j)] + noise[i, j]) * scale * row_scale[i] * col_scale[j]`` over many rectangles per launch.

A piece is a rectangle of a target: a contiguous run of columns (or an indexed one), rows in order or indexed, a source of any
strides. One launch covers every piece of a (source dtype, target dtype, kind): weights and optimizer state of a whole model.
Gather, scale and twin noise are fused, so each source element is read once per copy and each target element written once.
Pointers, sizes and strides lie in a table on the device; a program finds its piece by a binary search over first tiles.
Bytes: R C (source) read + R C (target) written per piece, plus R + C of index and scale.
"""

from collections.abc import Sequence
from struct import pack, unpack
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_C = 128  # columns of a tile: fewer than threads, so that vectors along columns load in the layout of the tile
N_WARPS = 8
N_FIELDS = tl.constexpr(21)  # columns of the table, in the order of _row
BYTES_MEAN, INVERSE_STD = (
    tl.constexpr(510.0),
    tl.constexpr(1 / 147.80054127099805),
)  # of the sum of four uniform bytes
DTYPES = {
    getattr(torch, name): getattr(tl, name)
    for name in ("float64", "float32", "float16", "bfloat16", "int64")
}


def block_r(n_bytes: int, src_wide: bool, dst_wide: bool, noise: bool) -> int:
    """Rows of a tile: 32 bytes a thread where all is wide, less where addresses or noise need registers; not yet measured on a device."""
    return min(64 // n_bytes, 8 << (src_wide and dst_wide) + (dst_wide and not noise))


@triton.jit
def _normal(seed, tensor_id, rows, cols):
    """Mean 0, variance 1: the sum of the four bytes of a Philox word; four rows share a call, a word each."""
    zero = rows * 0 + cols * 0
    w0, w1, w2, w3 = tl.philox(seed, cols + zero, (rows >> 2) + zero, tensor_id + zero, zero)
    lane = rows & 3
    word = tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3))
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (((pairs & 0xFFFF) + (pairs >> 16)).to(tl.float32) - BYTES_MEAN) * INVERSE_STD


@triton.jit(do_not_specialize=["n_pieces"])
def expand_kernel(
    table_ptr,
    n_pieces,
    SRC: tl.constexpr, DST: tl.constexpr, MATH: tl.constexpr,
    SRC_WIDE: tl.constexpr, DST_WIDE: tl.constexpr, N_WIDE: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NOISE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    low = 0
    high = n_pieces - 1
    while (
        low < high
    ):  # the last piece whose first tile is not after pid, so never one without tiles
        middle = (low + high + 1) // 2
        found = tl.load(table_ptr + middle.to(tl.int64) * N_FIELDS) <= pid
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle - 1)
    piece = table_ptr + low.to(tl.int64) * N_FIELDS
    n_rows = tl.load(piece + 3)
    n_cols = tl.load(piece + 4)
    if SRC_WIDE or DST_WIDE:
        n_cols = tl.multiple_of(n_cols, N_WIDE)  # the mask does not split a 16-byte access
    n_across = ((n_cols + BLOCK_C - 1) // BLOCK_C).to(tl.int32)
    tile = (pid - tl.load(piece)).to(tl.int32)
    rows = (tile // n_across).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = (tile % n_across).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    row_mask = rows < n_rows
    col_mask = cols < n_cols
    src_rows = rows
    src_cols = cols
    if HAS_INDEX:
        index = tl.load(piece + 9)
        found = tl.load(
            index.to(tl.pointer_type(tl.int32)) + rows, mask=row_mask & (index != 0), other=0
        )
        src_rows = tl.where(index != 0, found.to(tl.int64), rows)
    if HAS_INDEX and not SRC_WIDE:
        index = tl.load(piece + 10)
        found = tl.load(
            index.to(tl.pointer_type(tl.int32)) + cols, mask=col_mask & (index != 0), other=0
        )
        src_cols = tl.where(index != 0, found.to(tl.int64), cols)
    src_ptr = tl.load(piece + 1).to(tl.pointer_type(SRC)) + src_rows * tl.load(piece + 5)
    dst_ptr = tl.load(piece + 2).to(tl.pointer_type(DST)) + rows * tl.load(piece + 7)
    if SRC_WIDE:
        src_ptr = (
            tl.multiple_of(src_ptr, [16, 16]) + src_cols
        )  # bytes; on a block, as a hint on a scalar does not reach the load
    else:
        src_ptr += src_cols * tl.load(piece + 6)
    if DST_WIDE:
        dst_ptr = tl.multiple_of(dst_ptr, [16, 16]) + cols
    else:
        dst_ptr += cols * tl.load(piece + 8)

    values = tl.load(src_ptr, mask=row_mask & col_mask, other=0)
    if HAS_NOISE:
        row_ids = tl.load(
            tl.load(piece + 19).to(tl.pointer_type(tl.int32)) + rows, mask=row_mask, other=0
        )
        col_ids = tl.load(
            tl.load(piece + 20).to(tl.pointer_type(tl.int32)) + cols, mask=col_mask, other=0
        )
        normal = _normal(tl.load(piece + 14), tl.load(piece + 15).to(tl.int32), row_ids, col_ids)
        by_row = tl.load(
            tl.load(piece + 17).to(tl.pointer_type(tl.float32)) + rows, mask=row_mask, other=0
        )
        by_col = tl.load(
            tl.load(piece + 18).to(tl.pointer_type(tl.float32)) + cols, mask=col_mask, other=0
        )
        std = tl.load(tl.load(piece + 16).to(tl.pointer_type(MATH)))
        values = values.to(MATH) + std * by_row.to(MATH) * by_col.to(MATH) * normal.to(MATH)
    if HAS_SCALE:
        row_scale = tl.load(piece + 12)
        col_scale = tl.load(piece + 13)
        by_row = tl.load(
            row_scale.to(tl.pointer_type(MATH)) + rows, mask=row_mask & (row_scale != 0), other=1
        )
        by_col = tl.load(
            col_scale.to(tl.pointer_type(MATH)) + cols, mask=col_mask & (col_scale != 0), other=1
        )
        scale = tl.load(piece + 11).to(tl.float64, bitcast=True).to(MATH)
        values = values.to(MATH) * scale * by_row * by_col

    tl.store(dst_ptr, values.to(DST), mask=row_mask & col_mask)


def expand(pieces: Sequence[Any]) -> None:
    """Write every piece (``growkern.reference.Piece``), one launch per kind of piece.

    Args:
        pieces: Rectangles that do not overlap, on one device; their vectors (indices, scales, factors) are contiguous. Values are
            rounded once, at the store; a pure copy is bit-exact.
    """
    kinds: dict[tuple[Any, ...], list[Any]] = {}
    for piece in pieces:
        kinds.setdefault(_kind(piece), []).append(piece)
    for kind, members in kinds.items():
        options = launch_options(*kind)
        table, n_tiles = list[list[int]](), 0
        for piece in members:
            table.append([n_tiles, *_row(piece)])
            n_tiles += triton.cdiv(piece.dst.shape[0], options["BLOCK_R"]) * triton.cdiv(
                piece.dst.shape[1], BLOCK_C
            )
        if n_tiles:
            on_device = torch.tensor(table, dtype=torch.int64).to(members[0].dst.device)
            with torch.cuda.device_of(on_device):
                expand_kernel[(n_tiles,)](on_device, len(table), **options)


def _kind(piece: Any) -> tuple[Any, ...]:
    """The arguments of ``launch_options``."""
    src, dst = piece.src, piece.dst
    n_wide = 16 // min(src.itemsize, dst.itemsize)

    def wide(t: torch.Tensor) -> bool:
        return t.stride(1) == 1 and not (
            t.data_ptr() % 16 or t.stride(0) % n_wide or dst.shape[1] % n_wide
        )

    index = piece.rows is not None or piece.cols is not None
    scaled = piece.scale != 1.0 or piece.row_scale is not None or piece.col_scale is not None
    return (
        src.dtype,
        dst.dtype,
        piece.cols is None and wide(src),
        wide(dst),
        index,
        scaled,
        piece.noise is not None,
    )


def launch_options(
    src: torch.dtype,
    dst: torch.dtype,
    src_wide: bool,
    dst_wide: bool,
    index: bool,
    scale: bool,
    noise: bool,
) -> dict[str, Any]:
    """What a launch is specialised on: dtypes, which side has columns in aligned 16-byte groups, and what there is to do."""
    return dict(
        SRC=DTYPES[src], DST=DTYPES[dst], MATH=tl.float64 if dst == torch.float64 else tl.float32,
        SRC_WIDE=src_wide, DST_WIDE=dst_wide, N_WIDE=16 // min(src.itemsize, dst.itemsize),
        HAS_INDEX=index, HAS_SCALE=scale, HAS_NOISE=noise,
        BLOCK_R=block_r(dst.itemsize, src_wide, dst_wide, noise), BLOCK_C=BLOCK_C,
        num_warps=N_WARPS, enable_fp_fusion=False,  # no multiply-add in one rounding: the same bits as the torch backend
    )  # fmt: skip


def _row(piece: Any) -> list[int]:
    optional = (piece.rows, piece.cols), (piece.row_scale, piece.col_scale)
    index, scales = ([0 if t is None else t.data_ptr() for t in pair] for pair in optional)
    scale = unpack("<q", pack("<d", piece.scale))
    row = [
        piece.src.data_ptr(),
        piece.dst.data_ptr(),
        *piece.dst.shape,
        *piece.src.stride(),
        *piece.dst.stride(),
        *index,
        *scale,
        *scales,
    ]
    noise = piece.noise
    if noise is None:
        return row + [0] * (N_FIELDS.value - 1 - len(row))
    seed = unpack("<q", pack("<Q", noise.key[0]))
    return [
        *row,
        *seed,
        noise.key[1],
        *(t.data_ptr() for t in (noise.std, noise.rows, noise.cols, noise.row_ids, noise.col_ids)),
    ]
