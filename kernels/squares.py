"""``sums[k] = sum(round(x[k][i] / unit[k]) ** 2)`` over many tensors per launch, in integers: the same bits in every order of summation.

The root mean square of a weight scales its noise, so two devices must measure the same bits (``growkern.execution.measures``).
Bytes: every element read once.
"""

from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from growkern.kernels.expand import DTYPES
from growkern.kernels.table import FIRST_TILE, N_FIELDS, SRC_PTR
from growkern.kernels.write import find

# fields of a record after SRC_PTR: elements of the tensor, and its place among the tensors
N_ELEMENTS, INDEX = tl.constexpr(2), tl.constexpr(3)
BLOCK, N_BLOCKS = 2048, 16  # elements per step, and steps per program
N_WARPS = 8


@triton.jit
def _squares(
    address, n, inverse, TYPE: tl.constexpr, MATH: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Return the squares of a block of elements, in whole units, int32 (BLOCK,): at most 2**20 each."""
    at = tl.arange(0, BLOCK)
    ptr = address.to(tl.pointer_type(TYPE)) + at
    ptr = tl.multiple_of(tl.max_contiguous(ptr, [BLOCK]), [16])  # bytes
    values = tl.load(ptr, mask=at < n, other=0) if MASKED else tl.load(ptr)
    units = values.to(MATH) * inverse  # exact: a power of two
    units = (units + ROUND) - ROUND  # half to even
    whole = tl.where(tl.abs(units) <= 1024.0, units, 0.0).to(
        tl.int32
    )  # a number that is not finite has no integer
    return whole * whole


@triton.jit(do_not_specialize=["n_pieces"])
def squares_kernel(
    table_ptr, inverses_ptr, sums_ptr, n_pieces,
    TYPE: tl.constexpr, N_BYTES: tl.constexpr, MATH: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr,
):  # fmt: skip
    """A program finds its tensor once, sums its blocks, and adds to the tensor's sum."""
    pid = tl.program_id(0).to(tl.int64)
    piece = find(table_ptr, n_pieces, pid)
    k = tl.load(piece + INDEX)
    inverse = tl.load(inverses_ptr + k)
    start = (pid - tl.load(piece + FIRST_TILE)) * (BLOCK * N_BLOCKS)
    n = tl.load(piece + N_ELEMENTS) - start
    address = tl.load(piece + SRC_PTR) + start * N_BYTES
    total = tl.zeros([BLOCK], tl.int32)
    step = 0
    while step < N_BLOCKS:
        if n >= BLOCK:
            total += _squares(address, n, inverse, TYPE, MATH, ROUND, BLOCK, False)
        elif n > 0:
            total += _squares(address, n, inverse, TYPE, MATH, ROUND, BLOCK, True)
        n -= BLOCK
        address += BLOCK * N_BYTES
        step += 1
    tl.atomic_add(sums_ptr + k, tl.sum(total.to(tl.int64), 0))


def launch_options(dtype: torch.dtype) -> dict[str, Any]:
    """Options that a launch is specialized on."""
    math, n_bits = (tl.float64, 52) if dtype == torch.float64 else (tl.float32, 23)
    return dict(
        TYPE=DTYPES[dtype], N_BYTES=dtype.itemsize, MATH=math, ROUND=1.5 * 2**n_bits, BLOCK=BLOCK, N_BLOCKS=N_BLOCKS,
        num_warps=N_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def sums_of_squares(tensors: Sequence[torch.Tensor], inverses: torch.Tensor) -> torch.Tensor:
    """Return the sum of squares of each tensor in whole units, int64 (n,).

    Args:
        tensors: Contiguous tensors of one dtype on one device, aligned to 16 bytes; no element is larger than 2**10 units.
        inverses: 1 / unit of each tensor, a power of two, in the arithmetic's dtype (n,).
    """
    sums = torch.zeros(len(tensors), dtype=torch.int64, device=inverses.device)
    table, n_programs = array("q"), 0
    for k, tensor in enumerate(tensors):
        record = n_programs, tensor.data_ptr(), tensor.numel(), k
        table.extend((*record, *[0] * (N_FIELDS.value - len(record))))
        n_programs += -(-tensor.numel() // (BLOCK * N_BLOCKS))
    if n_programs:
        on_device = torch.frombuffer(table, dtype=torch.int64).to(sums.device, copy=True)
        with torch.cuda.device_of(sums):
            squares_kernel[(n_programs,)](
                on_device, inverses, sums, len(tensors), **launch_options(tensors[0].dtype)
            )
    return sums
