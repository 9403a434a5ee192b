"""What a backend writes: rectangles of tensors, with all their copies, their scales and their noise."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """One copy of the ``n`` rows (or columns) of a source rectangle: target coordinates, scales and noise.

    Attributes:
        target: First target row (column) of contiguous targets.
        targets: Target row of each row, int32 (n,); None for contiguous targets. Rows only.
        scale: Factor on all rows (columns).
        scales: Factor per row (column), (n,), in the arithmetic's dtype; None for 1.
        noise: Factor on the noise of all rows (columns).
        noises: Factor on the noise per row (column), (n,), in the arithmetic's dtype; None for 1.
        first_id: Noise counter of the first row (column); the other counters follow.
        ids: Noise counter per row (column), int32 (n,); None for consecutive counters.
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
        """True when the copy scales values."""
        return self.scale != 1.0 or self.scales is not None


@dataclass(frozen=True, slots=True, eq=False)
class Noise:
    """Noise of a tensor: ``std * normal(keys, row id, column id)``, times the factors of the copies.

    Attributes:
        std: 0-d tensor on the device, in the arithmetic's dtype: standard deviation / ``BYTES_STD``.
        keys: Offsets of the row counters and the column counters, int32 each: ``axis_keys(seed, tensor id)``.
    """

    std: Tensor
    keys: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """A rectangle of a source (R rows, C columns) and all its copies in a target.

    For every copy ``r`` in ``row_copies`` and ``c`` in ``col_copies``::

        dst[r.target + i, c.target + j] = (src[i, j] + noise) * (r.scale * c.scale) * r.scales[i] * c.scales[j]

    Attributes:
        src: Source of any strides (0 broadcasts): (R, C), or the matrix that ``rows`` and ``cols`` index.
        dst: The whole target as a matrix; columns are contiguous.
        row_copies: Copies of the rows.
        col_copies: Copies of the columns.
        rows: Source row of each row, int32 (R,); None for row ``i`` of ``src``.
        cols: Source column of each column, int32 (C,); None for column ``j`` of ``src``.
        noise: Noise that is added before scaling; None for no noise.
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
        """Number of rows and of columns of the rectangle."""
        n_rows, n_cols = self.src.shape
        return (
            n_rows if self.rows is None else len(self.rows),
            n_cols if self.cols is None else len(self.cols),
        )

    @property
    def n_read(self) -> int:
        """Bytes read from the source, counted once; 0 for a broadcast source."""
        n_rows, n_cols = self.src.shape
        if self.rows is not None:
            n_rows = min(n_rows, len(self.rows))
        return 0 if 0 in self.src.stride() else n_rows * n_cols * self.src.itemsize

    @property
    def n_written(self) -> int:
        """Bytes written to all copies."""
        n_copies = len(self.row_copies) * len(self.col_copies)
        return prod(self.shape) * n_copies * self.dst.itemsize

    @property
    def pure_copy(self) -> bool:
        """True when no arithmetic is done."""
        if self.noise is not None:
            return False
        return not any([copy.is_scaled for copy in (*self.row_copies, *self.col_copies)])


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """Tensors that are cut alike: the pieces of the first, and what stands in the places of its tensors in each of the others.

    Attributes:
        pieces: Pieces of the first tensor.
        origins: Per piece, the index in ``sources[i]`` of the tensor that its source is a part of.
        targets: Per tensor, the target; its elements lie as those of the first, which the pieces have as a matrix.
        sources: Per tensor, what its target is written from: (source, fill, ...), whose elements lie alike for every tensor.
        noises: Per tensor, the noise of the pieces with noise.
    """

    pieces: tuple[Piece, ...]
    origins: tuple[int, ...]
    targets: list[Tensor]
    sources: list[list[Tensor]]
    noises: list[Noise | None]

    @staticmethod
    def of(piece: Piece) -> "Group":
        """Return the group of a single piece."""
        return Group((piece,), (0,), [piece.dst], [[piece.src]], [piece.noise])

    @property
    def n_read(self) -> int:
        """Bytes read from the sources; see ``Piece.n_read``."""
        return len(self.targets) * sum(piece.n_read for piece in self.pieces)

    @property
    def n_written(self) -> int:
        """Bytes written to all targets."""
        return len(self.targets) * sum(piece.n_written for piece in self.pieces)

    def offset(self, k: int) -> int:
        """Return how many elements after the first of its tensor the source of piece ``k`` begins."""
        first = self.sources[0][self.origins[k]]
        return int(self.pieces[k].src.storage_offset()) - int(first.storage_offset())

    def pieces_of(self, i: int) -> Iterator[Piece]:
        """Yield the pieces of tensor ``i``."""
        if i == 0 or not self.pieces:
            yield from self.pieces
            return
        target, first = self.targets[i], self.pieces[0].dst
        dst = target.as_strided(first.shape, first.stride(), target.storage_offset())
        for k, piece in enumerate(self.pieces):
            read = self.sources[i][self.origins[k]]
            at = read.storage_offset() + self.offset(k)
            yield Piece(
                read.as_strided(piece.src.shape, piece.src.stride(), at), dst, piece.row_copies, piece.col_copies, piece.rows,
                piece.cols, self.noises[i] if piece.noise is not None else None,
            )  # fmt: skip
