"""``dst[i, j] = (src[row(i), col(j)] + noise[i, j]) * scale * row_scale[i] * col_scale[j]`` over many rectangles per launch.

A piece is a rectangle of a target: a contiguous run of columns (or an indexed one), rows in order or indexed, a source of any
strides. One launch covers every piece of a (source dtype, target dtype, kind): weights and optimizer state of a whole model.
Gather, scale and twin noise are fused, so each source element is read once per copy and each target element written once.
Pointers, sizes and strides lie in a table on the device; a program finds its tile by a binary search in a prefix sum.
Bytes: R C (source) read + R C (target) written per piece, plus R + C of index and scale.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

BLOCK_R = 8  # rows of a tile
BLOCK_C = 256  # columns of a tile: 16-byte accesses of 4 warps span 512 float32 or 1024 bf16; not yet measured on a device
N_FIELDS = 19  # columns of the table
BYTES_MEAN, INVERSE_STD = tl.constexpr(510.0), tl.constexpr(1 / 147.80054127099805)  # of the sum of four uniform bytes


@triton.jit
def _normal(seed, tensor_id, rows, cols):
    """Mean 0, variance 1: the sum of the four bytes of a Philox word; four rows share a call, a word each."""
    groups = (rows >> 2) + cols * 0
    zero = groups * 0
    w0, w1, w2, w3 = tl.philox(seed, cols + zero, groups, zero + tensor_id, zero)
    lane = (rows & 3) + zero
    word = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (((pairs & 0xFFFF) + (pairs >> 16)).to(tl.float32) - BYTES_MEAN) * INVERSE_STD


@triton.jit
def _pointer(table, field: tl.constexpr, dtype: tl.constexpr):
    return tl.load(table + field).to(tl.pointer_type(dtype))


@triton.jit
def expand_kernel(
    table_ptr, scales_ptr, tiles_ptr,
    n_pieces,
    SRC: tl.constexpr, DST: tl.constexpr, MATH: tl.constexpr,
    N_FIELDS: tl.constexpr, SEARCH: tl.constexpr, UNIT: tl.constexpr, ALIGN: tl.constexpr,
    HAS_INDEX: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_NOISE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    low, high = tl.to_tensor(0), n_pieces - 1  # the piece whose tiles hold pid: tiles[piece] <= pid < tiles[piece + 1]
    for _ in tl.static_range(SEARCH):
        middle = (low + high + 1) // 2
        found = tl.load(tiles_ptr + middle) <= pid
        low = tl.where(found, middle, low)
        high = tl.where(found, high, middle - 1)
    table = table_ptr + low.to(tl.int64) * N_FIELDS
    n_rows, n_cols = tl.load(table + 2), tl.load(table + 3)
    tile = pid - tl.load(tiles_ptr + low)
    n_across = tl.cdiv(n_cols, BLOCK_C)
    rows = (tile // n_across) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    cols = (tile % n_across) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    row_mask, col_mask = rows < n_rows, cols < n_cols
    mask = row_mask & col_mask
    src_rows, src_cols = rows, cols
    if HAS_INDEX:
        row_index, col_index = tl.load(table + 8), tl.load(table + 9)
        gathered = tl.load(row_index.to(tl.pointer_type(tl.int32)) + rows, mask=row_mask & (row_index != 0), other=0)
        src_rows = tl.where(row_index != 0, gathered.to(tl.int64), rows)
        gathered = tl.load(col_index.to(tl.pointer_type(tl.int32)) + cols, mask=col_mask & (col_index != 0), other=0)
        src_cols = tl.where(col_index != 0, gathered.to(tl.int64), cols)
    src_row, src_col, dst_row, dst_col = tl.load(table + 4), tl.load(table + 5), tl.load(table + 6), tl.load(table + 7)
    if UNIT:
        src_row, dst_row = tl.multiple_of(src_row, ALIGN), tl.multiple_of(dst_row, ALIGN)
        src_at = tl.multiple_of(_pointer(table, 0, SRC), 16) + src_rows * src_row + src_cols
        dst_at = tl.multiple_of(_pointer(table, 1, DST), 16) + rows * dst_row + cols
    else:
        src_at = _pointer(table, 0, SRC) + src_rows * src_row + src_cols * src_col
        dst_at = _pointer(table, 1, DST) + rows * dst_row + cols * dst_col

    values = tl.load(src_at, mask=mask, other=0)
    if HAS_NOISE:
        values = values.to(MATH)
        seed, tensor_id = tl.load(table + 12), tl.load(table + 13).to(tl.int32)
        row_ids = tl.load(_pointer(table, 14, tl.int32) + rows, mask=row_mask, other=0)
        col_ids = tl.load(_pointer(table, 15, tl.int32) + cols, mask=col_mask, other=0)
        row_factor = tl.load(_pointer(table, 16, tl.float32) + rows, mask=row_mask, other=0).to(MATH)
        col_factor = tl.load(_pointer(table, 17, tl.float32) + cols, mask=col_mask, other=0).to(MATH)
        std = tl.load(_pointer(table, 18, MATH))
        values += std * row_factor * col_factor * _normal(seed, tensor_id, row_ids, col_ids).to(MATH)
    if HAS_SCALE:
        row_scale, col_scale = tl.load(table + 10), tl.load(table + 11)
        by_row = tl.load(row_scale.to(tl.pointer_type(MATH)) + rows, mask=row_mask & (row_scale != 0), other=1)
        by_col = tl.load(col_scale.to(tl.pointer_type(MATH)) + cols, mask=col_mask & (col_scale != 0), other=1)
        values = values.to(MATH) * tl.load(scales_ptr + low).to(MATH)
        values = values * tl.where(row_scale != 0, by_row, 1) * tl.where(col_scale != 0, by_col, 1)

    tl.store(dst_at, values.to(DST), mask=mask)


def expand(pieces: Sequence[Any]) -> None:
    """Write every piece (``growkern.reference.Piece``), one launch per kind of piece.

    Args:
        pieces: Rectangles that do not overlap, on one device. Values are rounded once, at the store; a pure copy is bit-exact.
    """
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for piece in pieces:
        if piece.dst.numel():
            groups.setdefault(_kind(piece), []).append(piece)
    for kind, members in groups.items():
        _launch(kind, members)


def _kind(piece: Any) -> tuple[Any, ...]:
    """What a launch is specialised on."""
    src, dst = piece.src, piece.dst
    unit = src.stride(1) == dst.stride(1) == 1 and piece.cols is None
    n_16 = 16 // min(src.element_size(), dst.element_size())
    aligned = unit and not any(s % n_16 for s in (src.stride(0), dst.stride(0))) and not any(t.data_ptr() % 16 for t in (src, dst))
    index = piece.rows is not None or piece.cols is not None
    scaled = piece.scale != 1.0 or piece.row_scale is not None or piece.col_scale is not None
    return src.dtype, dst.dtype, aligned, n_16, index, scaled, piece.noise is not None


def _launch(kind: tuple[Any, ...], pieces: list[Any]) -> None:
    src, dst, aligned, n_16, index, scaled, noisy = kind
    device = pieces[0].dst.device
    n_tiles = [triton.cdiv(p.dst.shape[0], BLOCK_R) * triton.cdiv(p.dst.shape[1], BLOCK_C) for p in pieces]
    table = torch.tensor([_row(p) for p in pieces], dtype=torch.int64).to(device)
    scales = torch.tensor([p.scale for p in pieces], dtype=torch.float64).to(device)
    tiles = torch.tensor([0, *n_tiles], dtype=torch.int64).cumsum(0).to(device)
    math = torch.float64 if dst == torch.float64 else torch.float32
    expand_kernel[(sum(n_tiles),)](
        table, scales, tiles,
        len(pieces),
        SRC=_TYPES[src], DST=_TYPES[dst], MATH=_TYPES[math],
        N_FIELDS=N_FIELDS, SEARCH=len(pieces).bit_length(), UNIT=aligned, ALIGN=n_16,
        HAS_INDEX=index, HAS_SCALE=scaled, HAS_NOISE=noisy,
        BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C,
    )  # fmt: skip


def _row(piece: Any) -> list[int]:
    noise = piece.noise
    row = [
        piece.src.data_ptr(), piece.dst.data_ptr(), *piece.dst.shape, *piece.src.stride(), *piece.dst.stride(),
        *(0 if t is None else t.data_ptr() for t in (piece.rows, piece.cols, piece.row_scale, piece.col_scale)),
    ]  # fmt: skip
    if noise is None:
        return row + [0] * (N_FIELDS - len(row))
    seed = noise.key[0] - (1 << 64) if noise.key[0] >> 63 else noise.key[0]
    tensors = (noise.row_ids, noise.col_ids, noise.rows, noise.cols, noise.std)
    return [*row, seed, noise.key[1], *(t.data_ptr() for t in tensors)]


_TYPES = {
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.int64: tl.int64, torch.int32: tl.int32, torch.uint8: tl.uint8, torch.bool: tl.int8,
}  # fmt: skip
