"""The torch backend: the meaning of every kernel, and the real backend on a CPU. Same names and signatures as ``kernels/``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = (
    1 << 16
)  # elements computed at a time where temporaries are needed, so that they stay in cache
BYTES_MEAN, BYTES_STD = (
    510.0,
    147.80054127099805,
)  # of the sum of four uniform bytes: 4 * 127.5, sqrt(4 * (256**2 - 1) / 12)


@dataclass(frozen=True, slots=True)
class Noise:
    """Noise of one piece (R rows, C columns): ``std * rows[i] * cols[j] * normal(row_ids[i], col_ids[j])``.

    Attributes:
        std: 0-d tensor on the device.
        key: 64-bit seed and 32-bit tensor id: the counters of Philox, so that noise depends on nothing else.
        rows: Factor per row, (R,).
        cols: Factor per column, (C,).
        row_ids: Counter per row, int32 (R,).
        col_ids: Counter per column, int32 (C,).
    """

    std: Tensor
    key: tuple[int, int]
    rows: Tensor
    cols: Tensor
    row_ids: Tensor
    col_ids: Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of a target: ``dst[i, j] = (src[row(i), col(j)] + noise[i, j]) * scale * row_scale[i] * col_scale[j]``.

    Attributes:
        src: Source, any strides (0 broadcasts); (R, C) where there is no index, else indexed.
        dst: Rectangle of the target, (R, C).
        rows: Source row of each row, int32 (R,); None for its own.
        cols: Source column of each column, int32 (C,); None for its own.
        scale: Factor on all.
        row_scale: Factor per row, (R,), in the arithmetic's dtype; None for 1.
        col_scale: Factor per column, (C,); None for 1.
        noise: What is added first; None for nothing.
    """

    src: Tensor
    dst: Tensor
    rows: Tensor | None = None
    cols: Tensor | None = None
    scale: float = 1.0
    row_scale: Tensor | None = None
    col_scale: Tensor | None = None
    noise: Noise | None = None

    @property
    def pure_copy(self) -> bool:
        """True when no arithmetic is done."""
        return (
            self.scale == 1.0
            and self.row_scale is None
            and self.col_scale is None
            and self.noise is None
        )


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand(pieces: Sequence[Piece]) -> None:
    """Write every piece.

    Args:
        pieces: Rectangles that do not overlap. Values are rounded once, at the store; a pure copy is bit-exact.
    """
    for piece in pieces:
        _expand(piece)


def _expand(piece: Piece) -> None:
    src, dst = piece.src, piece.dst
    if piece.rows is not None:
        src = src.index_select(0, piece.rows)
    if piece.cols is not None:
        src = src.index_select(1, piece.cols)
    if piece.pure_copy:
        dst.copy_(src)
    elif (
        piece.noise is None
        and piece.row_scale is None
        and piece.col_scale is None
        and src.dtype == dst.dtype
    ):
        torch.mul(src, piece.scale, out=dst)
    else:
        step = max(1, BLOCK // max(1, dst.shape[1]))
        for start in range(0, dst.shape[0], step):
            dst[start : start + step].copy_(_values(piece, src, slice(start, start + step)))


def _values(piece: Piece, src: Tensor, rows: slice) -> Tensor:
    values = src[rows].to(arithmetic(piece.dst.dtype))
    if piece.noise is not None:
        n = piece.noise
        amplitude = (
            n.std.to(values.dtype) * n.rows[rows, None].to(values.dtype) * n.cols.to(values.dtype)
        )
        values = values + amplitude * normal(n.key, n.row_ids[rows], n.col_ids).to(values.dtype)
    if piece.scale != 1.0:
        values = values * piece.scale
    if piece.row_scale is not None:
        values = values * piece.row_scale[rows, None]
    return values if piece.col_scale is None else values * piece.col_scale


def normal(key: tuple[int, int], row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Draw numbers of mean 0 and variance 1 from counters: the sum of four bytes of a Philox-4x32-10 word.

    Integers until the last step, so that every device gives the same bits; close to a normal, cut off at 3.45 deviations.

    Args:
        key: 64-bit seed, 32-bit tensor id.
        row_ids: Counters, (R,).
        col_ids: Counters, (C,).

    Returns:
        float32 (R, C). Element (i, j) depends on ``key``, ``row_ids[i]`` and ``col_ids[j]`` alone.

    Reference:
        Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    groups, place = _unique(row_ids >> 2)  # four rows share a Philox call, a word each
    seed, tensor_id = key
    shape = (len(groups), len(col_ids))
    fixed = [
        torch.full((1, 1), value, dtype=torch.int64, device=col_ids.device)
        for value in (tensor_id, 0)
    ]
    words = _philox(
        [col_ids.long().expand(shape), groups.long()[:, None].expand(shape), *fixed], seed
    )
    lanes = torch.stack([word.expand(shape) for word in words])
    word = lanes[(row_ids & 3).long(), place]
    pairs = (word & 0x00FF00FF) + ((word >> 8) & 0x00FF00FF)
    return (((pairs & 0xFFFF) + (pairs >> 16)).float() - BYTES_MEAN) * (1 / BYTES_STD)


def _unique(ids: Tensor) -> tuple[Tensor, Tensor]:
    return torch.unique(ids, return_inverse=True)  # pyright: ignore


def _philox(counters: list[Tensor], seed: int) -> list[Tensor]:
    c0, c1, c2, c3 = counters
    k0, k1, mask = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, 0xFFFFFFFF
    for _ in range(10):
        high_a, low_a = _multiply(c0, 0xD2511F53)
        high_b, low_b = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return [c0, c1, c2, c3]


def _multiply(x: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32-bit product: int64 wraps, so all 64 bits of it are right."""
    product = x * constant
    return product >> 32 & 0xFFFFFFFF, product & 0xFFFFFFFF
