"""Device functions for a loaded tile, to inline: add noise, scale, and store the tile to all its target places."""

import triton
import triton.language as tl

from growkern.kernels.noise import normal
from growkern.kernels.table import (
    ARITHMETIC,
    COL_COPIES,
    COL_KEY,
    DRAWS,
    DST_PTR,
    DST_ROW,
    FACTOR,
    FACTORS,
    FIRST_COL,
    FIRST_ID,
    FLAGS,
    IDS,
    N_COPY,
    N_FIELDS,
    NOISE,
    ROW_COPIES,
    ROW_KEY,
    SCALE,
    SCALES,
    STD,
    TARGET,
    TARGETS,
)


@triton.jit
def find(table_ptr, n_pieces, pid):
    """Return the last piece whose first tile is at most ``pid``; a piece without tiles is never found."""
    low = 0
    high = n_pieces - 1
    while low < high:
        middle = (low + high + 1) // 2
        reached = tl.load(table_ptr + middle.to(tl.int64) * N_FIELDS) <= pid
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    return table_ptr + low.to(tl.int64) * N_FIELDS


@triton.jit
def vector(address, at, mask, other, DTYPE: tl.constexpr):
    known = (
        mask & (address != 0)
    ) != 0  # & makes integers in the interpreter, which triton 3.9 refuses as a mask
    return tl.load(address.to(tl.pointer_type(DTYPE)) + at, mask=known, other=other)


@triton.jit
def _product(record_r, record_c, field: tl.constexpr, MATH: tl.constexpr):
    r = tl.load(record_r + field).to(tl.float64, bitcast=True)
    return (r * tl.load(record_c + field).to(tl.float64, bitcast=True)).to(MATH)


@triton.jit
def draw(values, piece, r, c, rows, cols, row_mask, col_mask, MATH: tl.constexpr, COL_VECTORS: tl.constexpr):  # fmt: skip
    """Return the noise of the copies with the counters of ``r`` and ``c``, without their factors; the values if the piece has no noise."""
    drawn = values.to(MATH)
    if tl.load(piece + FLAGS) & NOISE != 0:
        row_ids = tl.load(r + FIRST_ID).to(tl.int32) + rows
        if tl.load(r + IDS) != 0:
            row_ids = vector(tl.load(r + IDS), rows, row_mask, 0, tl.int32)
        col_ids = tl.load(c + FIRST_ID).to(tl.int32) + cols
        if COL_VECTORS:  # noqa: SIM102  (constexpr and tensor do not combine)
            if tl.load(c + IDS) != 0:
                col_ids = vector(tl.load(c + IDS), cols, col_mask, 0, tl.int32)
        row_key = tl.load(piece + ROW_KEY).to(tl.int32)
        col_key = tl.load(piece + COL_KEY).to(tl.int32)
        drawn = normal(row_key, col_key, row_ids, col_ids).to(MATH)
    return drawn


@triton.jit
def grown(
    values, drawn, piece, r, c, rows, cols, row_mask, col_mask, MATH: tl.constexpr, COL_VECTORS: tl.constexpr,
):  # fmt: skip
    """Apply noise and scales of one copy; ``r`` and ``c`` point to its records."""
    x = values.to(MATH)
    factor = _product(r, c, FACTOR, MATH)
    if (tl.load(piece + FLAGS) & NOISE != 0) & (factor != 0):
        std = tl.load(tl.load(piece + STD).to(tl.pointer_type(MATH))) * factor
        amplitude = std * vector(tl.load(r + FACTORS), rows, row_mask, 1, MATH)
        if COL_VECTORS:
            amplitude *= vector(tl.load(c + FACTORS), cols, col_mask, 1, MATH)
        x += drawn * amplitude
    x = x * _product(r, c, SCALE, MATH) * vector(tl.load(r + SCALES), rows, row_mask, 1, MATH)
    if COL_VECTORS:
        x *= vector(tl.load(c + SCALES), cols, col_mask, 1, MATH)
    return x


@triton.jit
def write(
    values, table_ptr, piece, rows, cols, row_mask, col_mask,
    DST: tl.constexpr, MATH: tl.constexpr, WIDE: tl.constexpr, COL_VECTORS: tl.constexpr,
):  # fmt: skip
    """Write a tile to all its target places; ``cols`` count from the piece's first column. Twins along the columns share one draw."""
    arithmetic = tl.load(piece + FLAGS) & ARITHMETIC != 0
    dst = tl.load(piece + DST_PTR).to(tl.pointer_type(DST))
    stride = tl.load(piece + DST_ROW)
    first = tl.load(piece + FIRST_COL).to(tl.int32)
    mask = row_mask & col_mask
    i = 0
    while i < (tl.load(piece + ROW_COPIES) >> 32).to(tl.int32):
        r = table_ptr + (tl.load(piece + ROW_COPIES) & 0x7FFFFFFF) + i * N_COPY
        targets = tl.load(r + TARGET).to(tl.int32) + rows
        if tl.load(r + TARGETS) != 0:
            targets = vector(tl.load(r + TARGETS), rows, row_mask, 0, tl.int32)
        drawn = tl.zeros([rows.shape[0], cols.shape[1]], MATH)
        j = 0
        while j < (tl.load(piece + COL_COPIES) >> 32).to(tl.int32):
            c = table_ptr + (tl.load(piece + COL_COPIES) & 0x7FFFFFFF) + j * N_COPY
            into = dst + targets.to(tl.int64) * stride + tl.load(c + TARGET) + first
            if WIDE:  # in bytes, on the block: a hint on a scalar does not reach the store
                into = tl.multiple_of(into, [16, 16])
            into += cols
            if arithmetic:
                if tl.load(c + DRAWS) != 0:
                    drawn = draw(values, piece, r, c, rows, first + cols, row_mask, col_mask, MATH, COL_VECTORS)  # fmt: skip
                out = grown(values, drawn, piece, r, c, rows, first + cols, row_mask, col_mask, MATH, COL_VECTORS)  # fmt: skip
                tl.store(into, out.to(DST), mask=mask)
            else:
                tl.store(into, values.to(DST), mask=mask)
            j += 1
        i += 1
