"""The torch backend: the reference for the kernels in ``kernels/``, with their names and signatures, and the backend on a CPU."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from itertools import product
from math import prod

import torch
from torch import Tensor

from growkern.execution.pieces import Copy, Group, Piece
from growkern.support.dtypes import arithmetic
from growkern.support.threads import run_each

BYTES_MEAN, BYTES_STD = (
    510,
    147.80054127099805,
)  # mean and standard deviation of a sum of four uniform bytes: 4 * 127.5, sqrt(4 * (256**2 - 1) / 12)
MULTIPLIERS = 0x7FEB352D, 0x846CA68B  # of the hash "lowbias32", C. Wellons, hash-prospector
SHIFTS = 16, 15, 16  # of the same hash
PART = 1 << 20  # elements that a thread writes at once
NOISY_PART = 1 << 19  # of noise, whose temporaries fit in cache
GOLDEN = 0x9E3779B9  # spreads neighboring counters before they are mixed


def expand(groups: Sequence[Group], on_written: Callable[[int], object] | None = None) -> None:
    """Write every piece; on a CPU, large work runs in threads of its own (``growkern.support.threads``).

    Args:
        groups: Pieces with disjoint targets, on one device. Values are rounded once, at the store; a pure copy is bit-exact.
        on_written: Called in the caller's thread with the bytes of a piece, when the last part of it is about to be written.
    """

    def parts() -> Iterator[list[_Part]]:
        """Yield parts of pieces, small ones together: to hand work to a thread takes time."""
        ready, n_ready = list[_Part](), 0
        for piece in (
            piece
            for group in groups
            for i in range(len(group.targets))
            for piece in group.pieces_of(i)
        ):  # tensor by tensor: pieces of one target share pages
            n_rows, n_cols = piece.shape
            most = PART if piece.noise is None else NOISY_PART
            step = max(1, most // max(1, n_cols))
            draws = [*_draws(piece)] if n_rows and n_cols else []
            for start in range(0, n_rows if n_cols else 0, step):
                rows = slice(start, min(n_rows, start + step))
                ready.append((piece, draws, rows))
                n_ready += (rows.stop - start) * n_cols
                if n_ready >= most // 2:
                    yield ready
                    ready, n_ready = [], 0
            if on_written is not None:
                on_written(piece.n_written)
        yield ready

    def worker() -> Callable[[list[_Part]], None]:
        scratch = Scratch()

        def write(ready: list[_Part]) -> None:
            for part in ready:
                _expand(*part, scratch)

        return write

    if groups:
        n_written = sum(group.n_written for group in groups)
        run_each(parts(), worker, groups[0].targets[0].device, n_written)


class Scratch:
    """Reused memory for temporaries, so that temporaries stay in cache."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, shape: Sequence[int], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a contiguous uninitialized tensor; it overwrites the previous tensor of the same name and element size."""
        n, buffer = prod(shape), self.buffers.get(key := f"{name} {dtype.itemsize}")
        if buffer is None or buffer.numel() < n or buffer.device != like.device:
            buffer = self.buffers[key] = torch.empty(n, dtype=dtype, device=like.device)
        return buffer[:n].view(dtype).view(*shape)


@dataclass(frozen=True, slots=True, eq=False)
class _Draw:
    """Copies that share one noise draw: mixed counters of rows (R,) and columns (C,), and (row copy, column copy, noise factor)."""

    rows: Tensor | None
    cols: Tensor | None
    pairs: list[tuple[Copy, Copy, float]]


_Part = tuple[Piece, list[_Draw], slice]  # rows of a piece


def _draws(piece: Piece) -> Iterator[_Draw]:
    if piece.noise is None:
        yield _Draw(None, None, [(r, c, 0.0) for r in piece.row_copies for c in piece.col_copies])
        return
    pairs: dict[object, list[tuple[Copy, Copy, float]]] = {}
    for r, c in product(piece.row_copies, piece.col_copies):
        factor = r.noise * c.noise
        key = (r.first_id, id(r.ids), c.first_id, id(c.ids)) if factor else None
        pairs.setdefault(key, []).append((r, c, factor))
    for key, members in pairs.items():
        if key is None:
            yield _Draw(None, None, members)
            continue
        (r, c, _), (of_rows, of_cols) = members[0], piece.noise.keys
        n_rows, n_cols = piece.shape
        rows, cols = (
            _noise_ids(r, n_rows, of_rows, piece.src),
            _noise_ids(c, n_cols, of_cols, piece.src),
        )
        yield _Draw(rows, cols, members)


def _expand(piece: Piece, draws: list[_Draw], at: slice, scratch: Scratch) -> None:
    """Write every copy of the rows ``at``; the rows stay in cache, so the source is read once."""
    src, rows, cols = piece.src, piece.rows, piece.cols
    if rows is None:
        src = _part(src, at)
    elif cols is None or len(src) >= at.stop - at.start:
        src, rows = src.index_select(0, _part(rows, at)), None
    if cols is not None:  # before the rows if the source has fewer rows
        if not piece.pure_copy:  # torch gathers columns of bfloat16 3.5 x slower
            src = src.to(arithmetic(piece.dst.dtype))
        src = src.index_select(1, cols)
    if rows is not None:
        src = src.index_select(0, _part(rows, at))
    for draw in draws:
        if piece.noise is None or draw.rows is None or draw.cols is None:
            for r, c, _ in draw.pairs:
                _store(src, piece.dst, r, c, at)
            continue
        drawn = _hash(draw.rows[at], draw.cols, scratch)
        values = scratch.get("values", src.shape, src, piece.noise.std.dtype)
        before = noise = None
        for r, c, factor in draw.pairs:
            plain = r.noises is None and c.noises is None
            if noise is not None and plain and before == -factor:  # twins
                torch.sub(src, noise, out=values)
            else:
                noise = _noise(drawn, factor * piece.noise.std, r, c, at, scratch)
                torch.add(src, noise, out=values)
                before = factor if plain else None
            _store(values, piece.dst, r, c, at)


def _store(src: Tensor, dst: Tensor, r: Copy, c: Copy, at: slice) -> None:
    """Scale and write one copy."""
    columns = slice(c.target, c.target + src.shape[1])
    scale, vectors = (
        r.scale * c.scale,
        [v for v in (_column(r.scales, at), c.scales) if v is not None],
    )
    into = None
    if r.targets is None:
        whole = dst.shape == src.shape
        into = dst if whole else dst[r.target + at.start : r.target + at.stop, columns]
    if into is not None and not vectors and src.dtype == dst.dtype:
        if scale == 1.0:
            into.copy_(src)
        else:
            torch.mul(src, scale, out=into)
        return
    if scale != 1.0 or vectors:
        src = src.to(arithmetic(dst.dtype))
        src = src * scale if scale != 1.0 else src
    for vector in vectors[:-1]:
        src = src * vector
    if vectors and into is not None and src.dtype == dst.dtype:
        torch.mul(src, vectors[-1], out=into)
        return
    if vectors:
        src = src * vectors[-1]
    if into is not None:
        into.copy_(src)
    elif r.targets is not None:
        dst[:, columns].index_copy_(0, r.targets[at].long(), src.to(dst.dtype))


def _noise(drawn: Tensor, std: Tensor, r: Copy, c: Copy, at: slice, scratch: Scratch) -> Tensor:
    for vector in (_column(r.noises, at), c.noises):
        std = std if vector is None else std * vector
    noise = scratch.get("word", drawn.shape, drawn, std.dtype)  # ``_hash`` needs it no more
    return (
        torch.mul(drawn, std, out=noise)
        if drawn.dtype == std.dtype
        else noise.copy_(drawn).mul_(std)
    )


def _column(vector: Tensor | None, at: slice) -> Tensor | None:
    return None if vector is None else _part(vector, at)[:, None]


def _part(tensor: Tensor, at: slice) -> Tensor:
    """Return the rows ``at``; for all rows return the tensor itself, because a view takes longer than copying a small tensor."""
    return tensor if at.stop - at.start == len(tensor) else tensor[at]


def normal(keys: tuple[int, int], row_ids: Tensor, col_ids: Tensor) -> Tensor:
    """Draw integers of mean 0 and standard deviation ``BYTES_STD`` from counters: the sum of four bytes of a hash, minus its mean.

    All arithmetic is in integers, so every device gives the same bits. The distribution is close to a normal, cut off at 3.45
    standard deviations.

    Args:
        keys: Offsets from ``axis_keys``.
        row_ids: Row counters, int32 (R,).
        col_ids: Column counters, int32 (C,).

    Returns:
        float32 (R, C). Element (i, j) depends on ``keys``, ``row_ids[i]`` and ``col_ids[j]`` alone.
    """
    of_rows, of_cols = keys
    return _hash(_mixed(row_ids, of_rows), _mixed(col_ids, of_cols), Scratch())


def _noise_ids(copy: Copy, n: int, key: int, like: Tensor) -> Tensor:
    first, ids = copy.first_id, copy.ids
    if ids is None:
        ids = torch.arange(first, first + n, dtype=torch.int32, device=like.device)
    return _mixed(ids, key)


def _mixed(ids: Tensor, key: int) -> Tensor:
    return _mix(ids * signed(GOLDEN) + key, torch.empty_like(ids))


def _hash(rows: Tensor, cols: Tensor, scratch: Scratch) -> Tensor:
    """Compute the numbers of ``normal`` from mixed counters, in the memory of ``scratch``."""
    shape = len(rows), len(cols)
    word, spare = (scratch.get(name, shape, rows, torch.int32) for name in ("word", "spare"))
    _mix(torch.add(rows[:, None], cols, out=word), spare)
    torch.bitwise_right_shift(word, 8, out=spare).bitwise_and_(0x00FF00FF)
    word.bitwise_and_(0x00FF00FF).add_(spare)
    word.mul_(0x00010001).bitwise_right_shift_(16).add_(-BYTES_MEAN)
    return scratch.get("spare", shape, rows, torch.float32).copy_(word)


def _mix(x: Tensor, shifted: Tensor) -> Tensor:
    """Mix int32 in place; multiplication wraps, and a mask makes right shifts logical."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, None), strict=True):
        torch.bitwise_right_shift(x, shift, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << 32 - shift) - 1))
        if multiplier is not None:
            x.mul_(signed(multiplier))
    return x


def tensor_id(name: str) -> int:
    """Return 32 bits for a name, so that tensors get different noise."""
    return int.from_bytes(blake2b(name.encode(), digest_size=4).digest(), "little")


def axis_keys(seed: int, tensor_id: int) -> tuple[int, int]:
    """Return the offsets of row counters and of column counters, int32 each, for a 64-bit seed and a 32-bit tensor id."""
    of_rows = mix(_mixed_seed(seed) ^ tensor_id)
    return signed(of_rows), signed(mix(of_rows ^ GOLDEN))


@cache
def _mixed_seed(seed: int) -> int:
    return mix(mix(seed & 0xFFFFFFFF) ^ seed >> 32)


def mix(x: int) -> int:
    """Mix 32 bits: a bijection in which every output bit depends on every input bit."""
    for shift, multiplier in zip(SHIFTS, (*MULTIPLIERS, 1), strict=True):
        x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
    return x


def signed(x: int) -> int:
    """Return the int32 with the same 32 bits."""
    return x - (1 << 32) if x >> 31 else x
