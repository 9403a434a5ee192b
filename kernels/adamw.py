"""``p = p * (1 - lr * wd * decay_ij) - lr * lr_ij * warm(t) / (1 - b1**t) * m / (sqrt(v) / sqrt(1 - b2**t) + eps * eps_ij)`` with
``m += (1 - b1) * (g - m)``, ``v = b2 * v + (1 - b2) * g**2`` and ``t = step - max(born_i, born_j)``, over many tensors per launch.

A launch runs all of AdamW in one pass over memory, with factors per row and per column for tensors that have slices.
Bytes: p, m, v read and written once, g read once; plus the slice vectors.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

import growkern.kernels.adamw_table as field
from growkern.kernels.adamw_table import Kind, Table, math
from growkern.kernels.adamw_tile import update
from growkern.kernels.expand import DTYPES, N_REGISTERS
from growkern.kernels.table import FIRST_TILE
from growkern.kernels.write import find

N_WARPS = 8


def block_c(n_bytes: int) -> int:
    """Columns of a tile."""
    return 256 if n_bytes < 8 else 128


def block_r(n_bytes: int) -> int:
    """Rows of a tile: 8 elements per thread, 2 elements of 8 bytes. Not yet measured on a device."""
    return 8 if n_bytes < 8 else 4


def sliced_r(n_bytes: int) -> int:
    """Rows per iteration for tensors with slices: fewer than ``block_r``, so that the column factors fit in registers too."""
    return 4 if n_bytes < 8 else 2


@triton.jit(do_not_specialize=["first_piece", "n_pieces"])
def adamw_kernel(
    table_ptr, now_ptr, scale_ptr, inf_ptr,
    first_piece, n_pieces,
    P_TYPE: tl.constexpr, G_TYPE: tl.constexpr, S_TYPE: tl.constexpr, MATH: tl.constexpr,
    HAS_SLICES: tl.constexpr, HAS_SCALER: tl.constexpr, N_WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_SLICED: tl.constexpr, BLOCK_NARROW: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    piece = find(table_ptr + first_piece, n_pieces, pid)
    tile = (pid - tl.load(piece + FIRST_TILE)).to(tl.int32)
    n_across = (tl.load(piece + field.N_COLS).to(tl.int32) + BLOCK_C - 1) // BLOCK_C
    row = tile // n_across * BLOCK_R
    col = tile % n_across * BLOCK_C
    end = tl.minimum(row + BLOCK_R, tl.load(piece + field.N_ROWS).to(tl.int32))
    if HAS_SCALER:
        end = tl.where(tl.load(inf_ptr) != 0, row, end)  # skip the step
    is_sliced = False
    if HAS_SLICES:
        is_sliced = tl.load(piece + field.SLICED) != 0
    if is_sliced:
        update(
            table_ptr, now_ptr, scale_ptr, piece, row, col, end, P_TYPE, G_TYPE, S_TYPE, MATH,
            True, HAS_SCALER, N_WIDE, BLOCK_SLICED, BLOCK_C, BLOCK_NARROW,
        )  # fmt: skip
    else:
        update(
            table_ptr, now_ptr, scale_ptr, piece, row, col, end, P_TYPE, G_TYPE, S_TYPE, MATH,
            False, HAS_SCALER, N_WIDE, BLOCK_R, BLOCK_C, BLOCK_NARROW,
        )  # fmt: skip


def adamw(
    updates: Sequence[Any], table: Table, grad_scale: torch.Tensor | None = None, found_inf: torch.Tensor | None = None
) -> None:  # fmt: skip
    """Update parameters and moments in place: one launch per combination of parameter, gradient and moment dtypes.

    Args:
        updates: ``growkern.optimizer.adamw_torch.Update`` on one device; step counts include this step. All tensors of an update have
            one memory layout, contiguous if it has slices.
        table: Table of that device, kept between steps.
        grad_scale: Divisor of the gradients, applied in place.
        found_inf: If not 0, nothing is updated.
    """
    if not updates:
        return
    device = updates[0].p.device
    now = table.prepare(updates, block_r, block_c)
    scaler: tuple[Any, Any] = (None, None)
    if grad_scale is not None or found_inf is not None:
        given = ((grad_scale, 1.0), (found_inf, 0.0))
        scaler = tuple(
            torch.full((), x, device=device) if t is None else t.to(device) for t, x in given
        )
    _launch(table, now, scaler)


def adamw_again(
    table: Table, grads: Sequence[int], counts: Sequence[float], hypers: Sequence[Any]
) -> None:
    """Update as in the step before: parameters, moments and the layouts of gradients are those that the table was built from.

    Args:
        table: Table of the parameters' device.
        grads: Addresses of the gradients, in the order of that step.
        counts: Step counts; they include this step.
        hypers: ``growkern.optimizer.adamw_torch.Hyper`` of every param group that has parameters, in order.
    """
    _launch(table, table.again(grads, counts, hypers), (None, None))


def _launch(table: Table, now: torch.Tensor, scaler: tuple[Any, Any]) -> None:
    has_scaler = scaler != (None, None)
    with torch.cuda.device_of(now):
        for kind, sliced, first, n_pieces, n_tiles in table.launches:
            if n_tiles:
                options = launch_options(kind, sliced, has_scaler)
                adamw_kernel[(n_tiles,)](table.on_device, now, *scaler, first, n_pieces, **options)


def launch_options(kind: Kind, has_slices: bool, has_scaler: bool) -> dict[str, Any]:
    """Options that a launch is specialized on."""
    p, g, s = kind
    rows = block_r(p.itemsize)
    options: dict[str, Any] = dict(
        P_TYPE=DTYPES[p], G_TYPE=DTYPES[g], S_TYPE=DTYPES[s], MATH=DTYPES[math(p)],
        HAS_SLICES=has_slices, HAS_SCALER=has_scaler, N_WIDE=16 // min(t.itemsize for t in kind),
        BLOCK_R=rows, BLOCK_C=block_c(p.itemsize), BLOCK_SLICED=sliced_r(p.itemsize), BLOCK_NARROW=rows // 4,
        num_warps=N_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return options if torch.version.hip else options | dict(maxnreg=N_REGISTERS)
