"""The torch backend: the meaning of every kernel, and the real backend on a CPU. Same names and signatures as ``kernels/``."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

BLOCK = 1 << 17  # elements computed at a time: temporaries stay in cache, and two threads have work
BYTES_MEAN, BYTES_STD = (
    510,
    147.80054127099805,
)  # of the sum of four uniform bytes: 4 * 127.5, sqrt(4 * (256**2 - 1) / 12)
MULTIPLIERS = 0x7FEB352D, 0x846CA68B  # of the mix, and
SHIFTS = 16, 15, 16  # its shifts: "lowbias32" of C. Wellons, hash-prospector
GOLDEN = 0x9E3779B9  # parts neighbouring counters before they are mixed


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """Where the rows (or the columns) of a source rectangle go, once. ``n`` of them.

    Attributes:
        target: First target row (column).
        targets: Target row of each, int32 (n,), where they do not follow each other; rows only.
        scale: Factor on all.
        scales: Factor on each, (n,), in the arithmetic's dtype; None for 1.
        noise: Factor on the noise of all.
        noises: Factor on the noise of each, (n,), in the arithmetic's dtype; None for 1.
        first_id: Counter of the first; the others follow.
        ids: Counter of each, int32 (n,), where they do not follow each other.
    """

    target: int = 0
    targets: Tensor | None = None
    scale: float = 1.0
    scales: Tensor | None = None
    noise: float = 1.0
    noises: Tensor | None = None
    first_id: int = 0
    ids: Tensor | None = None

    @property
    def is_scaled(self) -> bool:
        """True when values change on the way."""
        return self.scale != 1.0 or self.scales is not None


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Noise of a tensor: ``std * normal(key, row id, column id)``, times the factors of the copies.

    Attributes:
        std: 0-d tensor on the device, in the arithmetic's dtype: standard deviation / ``BYTES_STD``.
        key: 64-bit seed and 32-bit tensor id.
    """

    std: Tensor
    key: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A rectangle of a source (R rows, C columns) and all the places in a target that it goes to.

    For every copy ``r`` in ``row_copies`` and ``c`` in ``col_copies``::

        dst[r.target + i, c.target + j] = (src[i, j] + noise) * (r.scale * c.scale) * r.scales[i] * c.scales[j]

    Attributes:
        src: Source, any strides (0 broadcasts): (R, C) where there is no index, else indexed.
        dst: The whole target as a matrix; columns are contiguous.
        row_copies: Where the rows go.
        col_copies: Where the columns go.
        rows: Source row of each row, int32 (R,); None for its own.
        cols: Source column of each column, int32 (C,); None for its own.
        noise: What is added first; None for nothing.
    """

    src: Tensor
    dst: Tensor
    row_copies: tuple[Copy, ...] = (Copy(),)
    col_copies: tuple[Copy, ...] = (Copy(),)
    rows: Tensor | None = None
    cols: Tensor | None = None
    noise: Noise | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the rectangle."""
        n_rows, n_cols = self.src.shape
        return (
            n_rows if self.rows is None else len(self.rows),
            n_cols if self.cols is None else len(self.cols),
        )

    @property
    def n_read(self) -> int:
        """Bytes of the source, once; a broadcast one is as good as none."""
        n_rows, n_cols = (
            self.src.shape[0] if self.rows is None else len(self.rows),
            self.src.shape[1],
        )
        return 0 if 0 in self.src.stride() else n_rows * n_cols * self.src.itemsize

    @property
    def n_written(self) -> int:
        """Bytes of all copies."""
        n_copies = len(self.row_copies) * len(self.col_copies)
        return prod(self.shape) * n_copies * self.dst.itemsize

    @property
    def pure_copy(self) -> bool:
        """True when no arithmetic is done."""
        copies = (*self.row_copies, *self.col_copies)
        return self.noise is None and not any(copy.is_scaled for copy in copies)


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The dtype computed in: float64 for float64, float32 for every other."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expand(pieces: Sequence[Piece]) -> None:
    """Write every piece.

    Args:
        pieces: What they write does not overlap. Values are rounded once, at the store; a pure copy is bit-exact.
    """
    for piece in pieces:
        n_rows, n_cols = piece.shape
        step = max(1, BLOCK // max(1, n_cols))
        for start in range(0, n_rows if n_cols else 0, step):
            _expand(piece, slice(start, min(n_rows, start + step)))


def _expand(piece: Piece, at: slice) -> None:
    """Write every copy of some rows: they stay in cache, so each source is read once."""
    src = piece.src[at] if piece.rows is None else piece.src.index_select(0, piece.rows[at])
    if piece.cols is not None:
        src = src.index_select(1, piece.cols)
    drawn: dict[tuple[object, ...], Tensor] = {}
    for r in piece.row_copies:
        into = piece.dst[r.target + at.start : r.target + at.stop]
        for c in piece.col_copies:
            values = src
            if piece.noise is not None and (factor := r.noise * c.noise):
                key = (r.first_id, id(r.ids), c.first_id, id(c.ids))
                if key not in drawn:
                    ids = _ids(r, slice(at.start, at.stop), src), _ids(c, slice(src.shape[1]), src)
                    drawn[key] = normal(piece.noise.key, *ids)
                values = _noisy(values, drawn[key], factor * piece.noise.std, r, c, at)
            _store(values, into, r, c, at, piece.dst if r.targets is not None else None)


def _store(
    src: Tensor, into: Tensor, r: Copy, c: Copy, at: slice, scattered: Tensor | None
) -> None:
    """Scale and write one copy; ``scattered``: the target whose rows are named, not consecutive."""
    columns = slice(c.target, c.target + src.shape[1])
    scale, vectors = (
        r.scale * c.scale,
        [v for v in (_column(r.scales, at), c.scales) if v is not None],
    )
    dtype = into.dtype
    if scattered is None and not vectors and src.dtype == dtype:
        if scale == 1.0:
            into[:, columns].copy_(src)
        else:
            torch.mul(src, scale, out=into[:, columns])
        return
    if scale != 1.0 or vectors:
        src = src.to(arithmetic(dtype)) * scale
    for vector in vectors:
        src = src * vector
    if scattered is None:
        into[:, columns].copy_(src)
    elif r.targets is not None:
        scattered[:, columns].index_copy_(0, r.targets[at].long(), src.to(dtype))


def _noisy(src: Tensor, normal: Tensor, std: Tensor, r: Copy, c: Copy, at: slice) -> Tensor:
    amplitude = std
    for vector in (_column(r.noises, at), c.noises):
        amplitude = amplitude if vector is None else amplitude * vector
    noise = normal.to(std.dtype) * amplitude
    return noise.add_(src)


def _column(vector: Tensor | None, at: slice) -> Tensor | None:
    return None if vector is None else vector[at, None]


def _ids(copy: Copy, at: slice, like: Tensor) -> Tensor:
    if copy.ids is not None:
        return copy.ids[at]
    first, last = copy.first_id + (at.start or 0), copy.first_id + at.stop
    return torch.arange(first, last, dtype=torch.int32, device=like.device)


def normal(key: tuple[int, int], row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Draw whole numbers of mean 0 and standard deviation ``BYTES_STD`` from counters: the sum of four bytes of a hash, less its mean.

    Integers throughout, so that every device gives the same bits; close to a normal, cut off at 3.45 deviations.

    Args:
        key: 64-bit seed, 32-bit tensor id.
        row_ids: Counters, int32 (R,).
        col_ids: Counters, int32 (C,).

    Returns:
        float32 (R, C). Element (i, j) depends on ``key``, ``row_ids[i]`` and ``col_ids[j]`` alone.
    """
    of_rows, of_cols = axis_keys(key)
    rows, cols = (
        _mix(ids * signed(GOLDEN) + signed(key))
        for ids, key in ((row_ids, of_rows), (col_ids, of_cols))
    )
    word = _mix(rows[:, None] + cols)
    low = word & 0x00FF00FF
    word.bitwise_right_shift_(8).bitwise_and_(0x00FF00FF).add_(low)
    word.mul_(0x00010001).bitwise_right_shift_(16)
    return word.sub_(BYTES_MEAN).float()


def _mix(x: Tensor) -> Tensor:
    """Mix 32 bits in place; int32 wraps, and a mask makes its shifts logical."""
    shifted = torch.empty_like(x)
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))
        if multiplier is not None:
            x.mul_(signed(multiplier))
    return x


def axis_keys(key: tuple[int, int]) -> tuple[int, int]:
    """What the counters of rows and of columns start from: 32 bits each, of seed and tensor id."""
    seed, tensor_id = key
    of_rows = mix(mix(mix(seed & 0xFFFFFFFF) ^ seed >> 32) ^ tensor_id)
    return of_rows, mix(of_rows ^ GOLDEN)


def mix(x: int) -> int:
    """Mix 32 bits: a bijection after which every bit depends on every bit."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
    return x


def signed(x: int) -> int:
    """The int32 of the same 32 bits."""
    return x - (1 << 32) if x >> 31 else x
