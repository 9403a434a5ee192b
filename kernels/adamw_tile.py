"""Device functions of ``adamw``, to inline: load, update and store a stretch of a tensor, tile by tile."""

import triton
import triton.language as tl

import growkern.kernels.adamw_table as field
from growkern.kernels.write import vector


@triton.jit
def _risen(y, MATH: tl.constexpr):
    """``1 - exp(-y)``. In float32, a series replaces the difference where it would cancel; the next term is below 1e-8 of the sum."""
    large = 1 - tl.exp(-y)
    if tl.float64 == MATH:
        return large
    x = tl.minimum(y, 0.5)
    s = 1 - x * (1 / 7) * (1 - x * (1 / 8))
    s = 1 - x * (1 / 4) * (1 - x * (1 / 5) * (1 - x * (1 / 6) * s))
    return tl.where(y < 0.5, x * (1 - x * (1 / 2) * (1 - x * (1 / 3) * s)), large)


@triton.jit
def _slice(slices, rows_key: tl.constexpr, rows, cols, row_mask, col_mask, other, MATH: tl.constexpr):  # fmt: skip
    """Load the row and column vectors of a slice for a tile. Their addresses are adjacent in the list of slice addresses."""
    by_row = vector(tl.load(slices + rows_key), rows, row_mask, other, MATH)
    return by_row, vector(tl.load(slices + rows_key + 1), cols, col_mask, other, MATH)


@triton.jit
def _tile(
    table_ptr, now_ptr, scale_ptr, piece, row, col,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, S_TYPE: tl.constexpr, MATH: tl.constexpr,
    IS_WIDE: tl.constexpr, IS_SLICED: tl.constexpr, HAS_SCALER: tl.constexpr,
    N_WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    width = tl.load(piece + field.N_COLS)
    n_cols = width.to(tl.int32)
    if IS_WIDE:
        n_cols = tl.multiple_of(n_cols, N_WIDE)  # the mask does not split a 16-byte access
    rows = row + tl.arange(0, BLOCK_R)[:, None]
    cols = col + tl.arange(0, BLOCK_C)[None, :]
    row_mask = rows < tl.load(piece + field.N_ROWS).to(tl.int32)
    col_mask = cols < n_cols
    mask = row_mask & col_mask
    start = rows.to(tl.int64) * width + tl.load(piece + field.FIRST)
    now = now_ptr + 2 * tl.load(piece + field.TENSOR)
    g_ptr = tl.load(now).to(tl.pointer_type(G_TYPE)) + start
    m_ptr = tl.load(piece + field.M).to(tl.pointer_type(S_TYPE)) + start
    if IS_WIDE:  # in bytes, on the block: a hint on a scalar does not reach the access
        g_ptr = tl.multiple_of(g_ptr, [16, 16])
        m_ptr = tl.multiple_of(m_ptr, [16, 16])

    h = (now_ptr + tl.load(piece + field.HYPER)).to(tl.pointer_type(MATH))
    EACH: tl.constexpr = 1 if tl.float64 == MATH else 2  # numbers are 8 bytes apart
    g = tl.load(g_ptr + cols, mask=mask, other=0).to(MATH)
    if HAS_SCALER:
        g = g / tl.load(scale_ptr).to(MATH)
        tl.store(g_ptr + cols, g.to(G_TYPE), mask=mask)
    g = g * tl.load(h + field.SIGN * EACH)
    m = tl.load(m_ptr + cols, mask=mask, other=0).to(MATH)
    m += tl.load(h + field.LERP * EACH) * (g - m)
    tl.store(m_ptr + cols, m.to(S_TYPE), mask=mask)
    v_ptr = tl.load(piece + field.V).to(tl.pointer_type(S_TYPE)) + start
    if IS_WIDE:
        v_ptr = tl.multiple_of(v_ptr, [16, 16])
    v = tl.load(v_ptr + cols, mask=mask, other=0).to(MATH)
    v = v * tl.load(h + field.KEEP * EACH) + tl.load(h + field.SQUARE * EACH) * g * g
    tl.store(v_ptr + cols, v.to(S_TYPE), mask=mask)
    if tl.load(piece + field.V_MAX) != 0:
        top_ptr = tl.load(piece + field.V_MAX).to(tl.pointer_type(S_TYPE)) + start
        if IS_WIDE:
            top_ptr = tl.multiple_of(top_ptr, [16, 16])
        top = tl.load(top_ptr + cols, mask=mask, other=0).to(MATH)
        v = tl.maximum(top, v, propagate_nan=tl.PropagateNan.ALL)
        tl.store(top_ptr + cols, v.to(S_TYPE), mask=mask)
    step = tl.load((now + 1).to(tl.pointer_type(MATH)))
    if tl.load(piece + field.STEP) != 0:
        step = tl.load(tl.load(piece + field.STEP).to(tl.pointer_type(tl.float32))).to(MATH)
    eps = tl.load(h + field.EPS * EACH)
    lr = tl.load(h + field.LR * EACH)
    decay = tl.load(h + field.DECAY * EACH)
    t = step
    if IS_SLICED:
        slices = table_ptr + tl.load(piece + field.SLICED)
        r, c = _slice(slices, field.BORN_ROWS, rows, cols, row_mask, col_mask, 0, MATH)
        born = tl.maximum(r, c)
        t = tl.maximum(step - born, 1)
        r, c = _slice(slices, field.LR_ROWS, rows, cols, row_mask, col_mask, 1, MATH)
        lr = lr * r * c
        warm_ptr = tl.load(slices + field.REWARM).to(tl.pointer_type(MATH))
        if tl.load(slices + field.REWARM) != 0:
            rise = (tl.load(warm_ptr) - 1) * tl.minimum(t / tl.load(warm_ptr + 1), 1)
            lr = lr * tl.where(born > 0, 1 + rise, 1)
        r, c = _slice(slices, field.EPS_ROWS, rows, cols, row_mask, col_mask, 1, MATH)
        eps = eps * r * c
        r, c = _slice(slices, field.DECAY_ROWS, rows, cols, row_mask, col_mask, 1, MATH)
        decay = decay * r * c
    root = tl.sqrt(_risen(t * tl.load(h + field.RATE2 * EACH), MATH))
    size = lr / _risen(t * tl.load(h + field.RATE1 * EACH), MATH)
    delta = size * (m / (tl.sqrt(v) / root + eps))
    p_ptr = (
        tl.load(piece + field.P).to(tl.pointer_type(P_TYPE)) + start
    )  # here, so that its registers are free before
    if IS_WIDE:
        p_ptr = tl.multiple_of(p_ptr, [16, 16])
    p = tl.load(p_ptr + cols, mask=mask, other=0).to(MATH)
    p = p * (1 - decay) - delta

    tl.store(p_ptr + cols, p.to(P_TYPE), mask=mask)


@triton.jit
def update(
    table_ptr, now_ptr, scale_ptr, piece, row, col, end,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, S_TYPE: tl.constexpr, MATH: tl.constexpr,
    IS_SLICED: tl.constexpr, HAS_SCALER: tl.constexpr,
    N_WIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    if tl.load(piece + field.WIDE) != 0:
        while row < end:
            _tile(
                table_ptr, now_ptr, scale_ptr, piece, row, col, P_TYPE, G_TYPE, S_TYPE, MATH,
                True, IS_SLICED, HAS_SCALER, N_WIDE, BLOCK_R, BLOCK_C,
            )  # fmt: skip
            row += BLOCK_R
    else:  # unaligned: one address per element, so few rows per iteration
        while row < end:
            _tile(
                table_ptr, now_ptr, scale_ptr, piece, row, col, P_TYPE, G_TYPE, S_TYPE, MATH,
                False, IS_SLICED, HAS_SCALER, N_WIDE, BLOCK_NARROW, BLOCK_C,
            )  # fmt: skip
            row += BLOCK_NARROW
