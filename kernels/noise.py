"""``normal(key, row id, column id)``: the sum of the four bytes of a hash of two counters, minus its mean, for kernels to inline.

All arithmetic is in integers, so every device and launch shape draws the same bits as ``growkern.execution.torch_backend.normal``. The
mix is "lowbias32" of C. Wellons' hash-prospector. An element's number is independent of other elements, unlike a word of Philox.
"""

import triton
import triton.language as tl

MULTIPLIER_A, MULTIPLIER_B = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B - 2**32)
GOLDEN = tl.constexpr(0x9E3779B9 - 2**32)
BYTES_MEAN = tl.constexpr(510)  # mean of the sum of four uniform bytes


@triton.jit
def _mix(x):
    x ^= (x >> 16) & 0xFFFF  # the mask turns the int32 shift into a logical shift
    x *= MULTIPLIER_A
    x ^= (x >> 15) & 0x1FFFF
    x *= MULTIPLIER_B
    return x ^ ((x >> 16) & 0xFFFF)


@triton.jit
def normal(row_key, col_key, row_ids, col_ids):
    """Return integers of mean 0 as float32 (R, C). Keys are int32, ids int32 (R, 1) and (1, C)."""
    word = _mix(_mix(row_ids * GOLDEN + row_key) + _mix(col_ids * GOLDEN + col_key))
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (((pairs * 0x00010001) >> 16) - BYTES_MEAN).to(tl.float32)
