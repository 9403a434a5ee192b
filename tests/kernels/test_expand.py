"""The expand kernel equals the reference, the reference equals loops over elements, and both backends grow a model to equal tensors.

The tests run in Triton's interpreter, or on a GPU where the machine has one and TRITON_INTERPRET is not set.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import product
from math import prod, sqrt

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from models import grow, make
from torch import Tensor

from growkern.execution import torch_backend as reference
from growkern.execution.grouping import grouped
from growkern.execution.pieces import Copy, Group, Noise, Piece
from growkern.execution.tiles import Tiler
from growkern.execution.torch_backend import axis_keys, normal
from growkern.kernels import expand as expand_module
from growkern.kernels import table
from growkern.kernels.expand import BLOCK_C, N_BUSY, N_TILES, block_r, expand, kinds, tabled
from growkern.kernels.permute import LARGEST, SMALLEST, n_warps, staged
from growkern.optimizer.state_rules import VALUE
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import IndexMap
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, F16, BF16, I64 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64
BITS = {
    8: I64,
    4: torch.int32,
    2: torch.int16,
}  # bytes -> integer dtype, in which NaN payloads and -0.0 are compared
POISON = {
    8: 0x7FF8DEADDEADDEAD,
    4: 0x7FC0DEAD,
    2: 0x7FFF,
}  # NaN as float64, float32, and as both float16 and bfloat16
ROWS = [1, 3, 4, 5, 8, 9, 17]  # tiles have 8 rows (2 of 8 bytes), 2 where addresses are not aligned
COLS = [1, 13, 64, BLOCK_C - 1, BLOCK_C, BLOCK_C + 1, 2 * BLOCK_C + 8]
SOURCES = [
    "plain",
    "offset",
    "transposed",
    "strided",
    "row",
    "column",
    "element",
]  # the last three broadcast
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.itemsize])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Draw from all bit patterns: NaN with payloads, infinities, -0.0 and subnormals."""
    n = 8 * dtype.itemsize
    return torch.randint(
        -(2 ** (n - 1)), 2 ** (n - 1) - 1, shape, generator=g, dtype=BITS[dtype.itemsize]
    ).view(dtype)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Draw zeros and numbers of many sizes and both signs; none is subnormal, because the interpreter's bfloat16 has no subnormals."""
    values = torch.randn(shape, generator=g, dtype=F64) * 10.0 ** torch.randint(
        -2, 3, shape, generator=g
    )
    return torch.where(torch.rand(shape, generator=g) < 0.1, 0.0 * values, values).to(dtype)


def factors(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Draw numbers in (-2, 2), some of them 0, so that no product leaves the range of float16."""
    values = 4 * torch.rand(n, generator=g, dtype=F64) - 2
    return torch.where(torch.rand(n, generator=g) < 0.1, 0.0 * values, values).to(DEVICE, dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the values under other strides; broadcast layouts repeat the first row, column or element."""
    r, c = values.shape
    if layout == "offset":
        return torch.nn.functional.pad(values, (3, 2, 1, 1))[1 : r + 1, 3 : c + 3]
    if layout == "strided":
        return values.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3]
    return {
        "plain": values,
        "transposed": values.T.contiguous().T,
        "row": values[:1].expand(r, c),
        "column": values[:, :1].expand(r, c),
        "element": values[:1, :1].expand(r, c),
    }[layout]


@dataclass(frozen=True)
class Case:
    """The arguments that a piece is built from.

    ``n_copies`` counts the copies of the rows and of the columns. ``n_sources`` counts the rows and columns of the source, where an index
    gathers them. ``vectors`` gives the rows (the columns) a scale, a noise factor and a counter each, in place of one for all.
    ``scattered`` sends every row to a place of its own. ``twins``: the first two of
    three copies have the same counters. ``offset`` moves the target in memory, in columns; ``skip`` counts the columns of
    the target before the first copy.
    """

    src: torch.dtype
    dst: torch.dtype
    shape: tuple[int, int]
    source: str = "plain"
    offset: int = 0
    gap: int = 0
    skip: int = 0
    n_copies: tuple[int, int] = (1, 1)
    n_sources: tuple[int | None, int | None] = (None, None)
    scales: tuple[float, ...] = (1.0,)
    vectors: tuple[bool, bool] = (False, False)
    scattered: bool = False
    twins: bool = False
    noise: tuple[int, int, float] | None = None  # seed, tensor id, std
    values: int = 0

    @property
    def bits(self) -> bool:
        """Whether the piece is a pure copy, which keeps every bit pattern."""
        return (
            self.src == self.dst
            and self.noise is None
            and {*self.scales} == {1.0}
            and not any(self.vectors)
        )

    def build(self) -> tuple[Tensor, Tensor, Piece]:
        """Return poisoned memory, a copy of that memory, and the piece that writes into the original."""
        g = torch.Generator().manual_seed(self.values)
        n_rows, dtype = self.shape[0], arithmetic(self.dst)
        from_rows, from_cols = (
            n if s is None else s for n, s in zip(self.shape, self.n_sources, strict=True)
        )
        src = (random_bits if self.bits else numbers)((from_rows, from_cols), self.src, g)
        height, width = ((n + self.gap) * k for n, k in zip(self.shape, self.n_copies, strict=True))
        n_wide = 16 // self.dst.itemsize
        width += self.skip
        memory = torch.full(
            (height + 2, (width + self.offset + 2 * n_wide) // n_wide * n_wide),
            POISON[self.dst.itemsize],
            dtype=BITS[self.dst.itemsize],
        )
        memory = memory.view(self.dst).to(DEVICE)
        dst = memory[1 : height + 1, self.offset : self.offset + width]
        rows, cols = (
            None if s is None else integers(s, n, g)
            for n, s in zip(self.shape, self.n_sources, strict=True)
        )
        places = torch.randperm(max(1, height), generator=g).int().to(DEVICE)
        first_ids = (7, 7, 0) if self.twins else (0, 7, 2**31 - 1 - 2**20)
        row_copies, col_copies = (
            tuple(
                Copy(
                    (n + self.gap) * k + skip,
                    scale=self.scales[k % len(self.scales)],
                    scales=factors(n, dtype, g) if has else None,
                    noise=[1.0, -0.5, 0.0][k % 3],
                    noises=factors(n, dtype, g) if has else None,
                    first_id=first_ids[k % 3],
                    ids=shared
                    if self.twins and k % 3 < 2
                    else integers(2**31 - 1, n, g)
                    if has
                    else None,
                )
                for k in range(count)
            )
            for n, count, has, skip in zip(
                self.shape, self.n_copies, self.vectors, (0, self.skip), strict=True
            )
            for shared in [integers(2**31 - 1, n, g) if has else None]
        )
        if self.scattered:
            row_copies = tuple(
                replace(c, target=0, targets=places[k * n_rows : (k + 1) * n_rows].contiguous())
                for k, c in enumerate(row_copies)
            )
        noise = None
        if self.noise is not None:
            seed, tensor_id, std = self.noise
            noise = Noise(torch.tensor(std, dtype=dtype, device=DEVICE), axis_keys(seed, tensor_id))
        source = laid_out(src.to(DEVICE), self.source)
        return memory, memory.clone(), Piece(source, dst, row_copies, col_copies, rows, cols, noise)


def integers(end: int, n: int, g: torch.Generator) -> Tensor:
    return torch.randint(0, end, (n,), generator=g, dtype=torch.int32).to(DEVICE)


def cases(rows: list[int], cols: list[int]) -> st.SearchStrategy[Case]:
    """Draw pure copies and pieces with arithmetic."""
    index = st.sampled_from([None, None, 1, 5, 40])
    parts = dict(
        shape=st.tuples(st.sampled_from(rows), st.sampled_from(cols)),
        source=st.sampled_from(SOURCES),
        offset=st.sampled_from([0, 0, 1, 3, 8]),
        gap=st.sampled_from([0, 0, 1, 8]),
        skip=st.sampled_from([0, 0, 1, 3]),
        n_copies=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        n_sources=st.tuples(index, index),
        scattered=st.booleans(),
        values=st.integers(0, 2**32),
    )
    noise = st.tuples(st.sampled_from(SEEDS), st.sampled_from([0, 1, 2**32 - 1]), st.just(1e-3))
    work = dict(
        scales=st.lists(st.sampled_from([1.0, 0.5, 1 / 3, -1.5]), min_size=1, max_size=3).map(
            tuple
        ),
        vectors=st.tuples(st.booleans(), st.booleans()),
        twins=st.booleans(),
        noise=st.none() | noise,
    )
    same = st.one_of(
        *(
            st.builds(Case, src=st.just(d), dst=st.just(d), **parts)
            for d in (F64, F32, F16, BF16, I64)
        )
    )
    pairs = [(F64, F64), (F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (F32, F16)]
    return same | st.one_of(
        *(st.builds(Case, src=st.just(a), dst=st.just(b), **parts, **work) for a, b in pairs)
    )


def moved(piece: Piece, copy: Tensor) -> Piece:
    """Return the piece with its target in the memory ``copy``."""
    dst = piece.dst
    return replace(piece, dst=copy.as_strided(dst.shape, dst.stride(), dst.storage_offset()))


def check(built: list[tuple[Tensor, Tensor, Piece]], *, n_tiles: int | None = None) -> None:
    """Assert that kernel and reference leave equal memory: bit for bit, in the target and around the target.

    Kernel and reference compute in the same order and dtype without a fused multiply-add, so the arithmetic agrees bit for bit too.
    Only the interpreter truncates bfloat16 where torch rounds: the difference is less than one ulp, at most eps |value|.
    """
    with pytest.MonkeyPatch.context() as patch:
        if n_tiles is not None:  # of a program, as in launches of many elements
            patch.setattr(expand_module, "N_BUSY", 0)
            patch.setattr(expand_module, "N_TILES", n_tiles)
        expand([Group.of(piece) for _, _, piece in built])
    reference.expand([Group.of(moved(piece, copy)) for _, copy, piece in built])

    for memory, copy, piece in built:
        rounds = piece.dst.dtype == BF16 and not (piece.pure_copy and piece.src.dtype == BF16)
        if INTERPRETED and rounds:
            actual, expected = piece.dst.to(F64), moved(piece, copy).dst.to(F64)
            eps = torch.finfo(BF16).eps
            torch.testing.assert_close(actual, expected, rtol=eps, atol=0, equal_nan=True)
            piece.dst.copy_(moved(piece, copy).dst)  # the lines below compare the memory around
        assert torch.equal(bits(memory), bits(copy))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(case=cases(ROWS, COLS), n_tiles=st.none())
@example(
    case=Case(F32, F32, (33, BLOCK_C)), n_tiles=None
)  # tiles below each other, of whole blocks
@example(case=Case(BF16, BF16, (33, 2 * BLOCK_C), offset=1, skip=3, n_copies=(2, 2)), n_tiles=None)
@example(
    case=Case(F32, F32, (17, 2 * BLOCK_C), noise=(1, 2, 1e-3), vectors=(True, True)), n_tiles=None
)
@example(
    case=Case(F32, F32, (9, BLOCK_C), noise=(1, 2, 1e-3), n_copies=(2, 3), twins=True), n_tiles=None
)
@example(
    case=Case(F32, F32, (81, BLOCK_C + 8)), n_tiles=2
)  # 81 rows: the last program has a part of a tile
@example(case=Case(F32, F32, (81, BLOCK_C + 8), source="column"), n_tiles=2)
@example(case=Case(BF16, BF16, (81, BLOCK_C), skip=3, n_copies=(2, 2), scales=(0.5,)), n_tiles=4)
@example(
    case=Case(F32, F32, (70, 9), noise=(1, 2, 1e-3), vectors=(True, True), twins=True), n_tiles=4
)
def test_kernel_writes_what_the_reference_writes(case, n_tiles):
    check([case.build()], n_tiles=n_tiles)


@pytest.mark.slow
@settings(max_examples=10, deadline=None)
@given(many=st.lists(cases([0, 1, 9], [0, 1, 40]), max_size=12))
def test_many_pieces_of_many_kinds_in_one_call(many):
    check([case.build() for case in many])


def test_copies_with_equal_counters_share_one_draw():
    ids = torch.arange(4, dtype=torch.int32)
    copies = (Copy(), Copy(4), Copy(8, first_id=4), Copy(12), Copy(16, ids=ids), Copy(20, ids=ids), Copy(24, ids=ids.clone()))  # fmt: skip
    rows = table.Table()
    piece = Piece(torch.zeros(2, 4), torch.zeros(2, 28), col_copies=copies)
    rows.add([(Group.of(piece), [0])], 16, BLOCK_C)

    number, at = divmod(rows.copies[id(copies)], 1 << 32)
    field, size = table.DRAWS.value, table.N_COPY.value

    assert number == 7
    assert [rows.numbers[at + i * size + field] for i in range(number)] == [1, 0, 1, 1, 1, 0, 1]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 33])
def test_every_program_finds_its_piece_when_some_have_no_tiles(n):
    shapes = [
        (r, 3) if k % 2 else (1, c)
        for k in range(n)
        for r, c in [((0, 1, 40)[k % 3], (0, BLOCK_C + 1, 5)[k % 3])]
    ]
    cases = [
        Case(F32, F32, shape, offset=3, values=k)
        for k, shape in enumerate([(0, 3), *shapes, (2, 0), (1, 2), (0, 2)])
    ]

    check([case.build() for case in cases])


def launches(pieces: list[Piece], monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """Expand the pieces and return the options of every launch."""
    from growkern.kernels import expand as module

    found = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                found.append(options)
                return self.kernel[grid](*args, **options)

            return launch

    for name in ("expand_kernel", "permute_kernel"):
        monkeypatch.setattr(module, name, Kernel(getattr(module, name)))
    expand([Group.of(piece) for piece in pieces])
    return found


@pytest.mark.parametrize(
    "pieces", [[], [Piece(torch.zeros(0, 4), torch.zeros(0, 4))]], ids=["none", "empty"]
)
def test_nothing_to_write_is_no_launch(pieces, monkeypatch):
    assert launches(pieces, monkeypatch) == []


def test_one_launch_per_pair_of_dtypes(monkeypatch):
    mixed = [
        Case(F32, F32, (4, 64), n_copies=(2, 2)),
        Case(F32, F32, (5, 13), offset=3, scales=(0.5,), noise=(1, 2, 1e-3)),
        Case(F32, F32, (8, 32), n_sources=(40, None), vectors=(True, False), scattered=True),
        Case(BF16, BF16, (4, 64)),
        Case(BF16, BF16, (4, 13), source="transposed"),
        Case(F32, BF16, (4, 64), source="element"),
    ]

    found = launches([case.build()[2] for case in mixed], monkeypatch)

    assert len(found) == 3


@pytest.mark.slow
@pytest.mark.parametrize("n_source", [1, 40, SMALLEST, SMALLEST + 1, LARGEST])
@pytest.mark.parametrize("n_cols", [77, 1200])  # 1200: in aligned groups of 16 bytes
@pytest.mark.parametrize(("src", "dst"), [(F32, F32), (BF16, BF16), (F32, F16), (F64, F64)])
def test_rows_of_any_length_are_permuted(src, dst, n_cols, n_source):
    case = Case(
        src, dst, (9, n_cols), n_copies=(2, 1), n_sources=(3, n_source), vectors=(True, True),
        noise=(5, 6, 1e-3) if n_source % 2 else None, scattered=True,
    )  # fmt: skip
    built = case.build()

    assert list(kinds([Group.of(built[2])])) == [
        (src, dst, 0 if src == F64 else max(SMALLEST, 2 ** (n_source - 1).bit_length()))
    ]
    check([built])


@pytest.mark.parametrize(
    ("n_cols", "skip", "wide"), [(64, 0, True), (64, 8, True), (64, 3, False), (60, 0, False)]
)
def test_permuted_rows_are_one_stretch_that_is_wide_where_all_groups_are_aligned(
    n_cols, skip, wide
):
    piece = Case(
        BF16, BF16, (3, n_cols), n_sources=(None, 40), skip=skip, vectors=(False, True)
    ).build()[2]

    assert list(table.stretches(piece, n_cols, staged=True)) == [
        (0, n_cols, table.DST_WIDE.value * wide)
    ]


def test_rows_too_long_to_stage_are_gathered():
    built = Case(F32, F32, (3, 50), n_sources=(None, LARGEST + 1)).build()

    assert list(kinds([Group.of(built[2])])) == [(F32, F32, 0)]
    check([built])


@settings(max_examples=200, deadline=None)
@given(case=cases([1, 2, 3], [1, 2, 4, 8, 12, 16, 24, 37]))
def test_only_aligned_groups_of_16_bytes_are_wide_and_the_rest_is_peeled(case):
    _, _, piece = case.build()
    n_rows, n_cols = piece.shape
    src, dst = piece.src if piece.rows is None else piece.src[piece.rows.long()], piece.dst
    n_wide = 16 // min(src.itemsize, dst.itemsize)

    found = list(table.stretches(piece, n_cols))

    assert [k for first, n, _ in found for k in range(first, first + n)] == list(range(n_cols))
    for first, n, flags in found:
        sides = [(src, 0, table.SRC_WIDE)] + [
            (dst, c.target, table.DST_WIDE) for c in piece.col_copies
        ]
        for t, start, flag in sides:
            groups = product(range(n_rows), range(start + first, start + first + n, n_wide))
            if flags & flag.value:
                assert piece.cols is None and n % n_wide == 0 and t.stride(1) == 1
                assert not any(t[i, j:].data_ptr() % 16 for i, j in groups)
    narrow = [n for _, n, flags in found if not flags & table.DST_WIDE.value]
    lined_up = (
        len({c.target % n_wide for c in piece.col_copies}) == 1
        and not (dst.data_ptr() % 16 or dst.stride(0) % n_wide)
        and piece.cols is None
        and not case.vectors[1]
    )
    assert not lined_up or sum(narrow) < 2 * n_wide


@pytest.mark.gpu
def test_targets_of_more_than_2_to_the_31_elements():
    n_rows, n_cols = (1 << 16) + 8, 1 << 15
    src = torch.randn(n_rows // 2, n_cols, dtype=BF16, device="cuda")
    dst = torch.zeros(n_rows, n_cols, dtype=BF16, device="cuda")

    expand([Group.of(Piece(src, dst, (Copy(0), Copy(n_rows // 2))))])

    for rows in (slice(0, 4), slice(n_rows // 2 - 2, n_rows // 2 + 2), slice(n_rows - 4, n_rows)):
        at = torch.arange(n_rows, device="cuda")[rows] % (n_rows // 2)
        assert torch.equal(dst[rows], src[at])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("skip", [1, 3, 5])
@pytest.mark.parametrize("n_cols", [2, 60, 64, BLOCK_C + 9])
def test_heads_and_tails_are_peeled_off_an_aligned_body(dtype, skip, n_cols):
    n_wide = 16 // dtype.itemsize
    gap = -n_cols % n_wide
    built = Case(dtype, dtype, (5, n_cols), skip=skip, gap=gap, n_copies=(2, 2)).build()

    found = list(table.stretches(built[2], n_cols))

    wide = [n for _, n, flags in found if flags & table.DST_WIDE.value]
    head = min(n_cols, -skip % n_wide)
    assert wide == [n for n in [(n_cols - head) // n_wide * n_wide] if n]
    check([built])


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096, 512), (64, 64, 512), (1 << 16, (1 << 15) + 8)])
def test_a_constant_target_is_cut_along_its_own_rows(shape):
    axes = {str(n): AxisMap(IndexMap.identity(n), *[Vector.full(1.0, n)] * 2) for n in shape}
    row = TensorRow("w", "w", tuple(map(str, shape)), constant=0.0)
    tiler = Tiler(GrowthPlan("test", {}, {}, "", "", 0, "exact", axes, (row,)))
    untouched = torch.UntypedStorage(2 * prod(shape))  # 4 GB, which torch.empty would fill here
    target = torch.empty(0, dtype=torch.bfloat16).set_(untouched, 0, shape)

    groups = grouped(tiler, [tiler.job(row, target[:1], target, VALUE)]).groups
    ((_, _, (rows,), _, _, n_programs),) = tabled(groups)[1]

    n_rows, n_cols = target.numel() // shape[-1], shape[-1]
    assert rows == block_r(2) * (N_TILES if n_rows * n_cols >= N_BUSY else 1)
    assert n_programs == -(-n_rows // rows) * -(-n_cols // BLOCK_C)


@pytest.mark.parametrize("warp_size", [32, 64])
def test_a_program_has_at_most_1024_threads_of_at_most_8_staged_elements(warp_size):
    for block in (2**i for i in range(10, 14)):
        threads = n_warps(block, warp_size) * warp_size

        assert 256 <= threads <= 1024 and block <= 8 * threads
    assert max(staged(n, 2) for n in (SMALLEST, LARGEST)) == block


WIDE = list(product([F64, F32, F16, BF16, I64], [False, True], [-1, 0, 1, 2]))


@pytest.mark.parametrize(
    ("dtype", "by_index", "n"), WIDE, ids=lambda v: str(v).removeprefix("torch.")
)
def test_wide_accesses_copy_exactly_around_the_block_size(dtype, by_index, n):
    n_wide = 16 // dtype.itemsize
    shape = (max(1, block_r(dtype.itemsize) + n), BLOCK_C * max(1, n) + n * n_wide)
    rows = shape[0] if by_index else None

    memory, copy, piece = Case(dtype, dtype, shape, offset=n_wide, n_sources=(rows, None)).build()

    wide = table.SRC_WIDE.value | table.DST_WIDE.value
    assert list(table.stretches(piece, shape[1])) == [(0, shape[1], wide)]
    check([(memory, copy, piece)])


BEYOND = {
    "rows": (
        Piece(torch.zeros(3, 4), torch.zeros(5, 4), (Copy(3),)),
        "writes beyond a target of 5 x 4",
    ),
    "columns": (Piece(torch.zeros(3, 4), torch.zeros(3, 7), (Copy(),), (Copy(), Copy(4))), "3 x 7"),
    "before": (Piece(torch.zeros(3, 4), torch.zeros(3, 4), (Copy(-1),)), "a copy of 3"),
    "scales": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), (Copy(scales=torch.ones(2)),)),
        "another length",
    ),
    "ids": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), col_copies=(Copy(ids=torch.ones(5).int()),)),
        "length",
    ),
    "int64": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), rows=torch.zeros(3).long()),
        "int32 is read",
    ),
    "float64": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), (Copy(scales=torch.ones(3).double()),)),
        "float32 is read",
    ),
    "every other": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), (Copy(scales=torch.ones(6)[::2]),)),
        "contiguous",
    ),
    "overlapping": (
        Piece(torch.zeros(3, 4), torch.zeros(1, 4).expand(3, 4)),
        "rows of a target overlap",
    ),
    "counters": (
        Piece(torch.zeros(3, 4), torch.zeros(3, 4), (Copy(first_id=2**31 - 1),)),
        "counters",
    ),
    "meta": (Piece(torch.zeros(3, 4, device="meta"), torch.zeros(3, 4)), "from meta to cpu"),
    "strides": (Piece(torch.zeros(3, 4), torch.zeros(4, 3).T), "beyond"),
}


@pytest.mark.parametrize(("piece", "match"), BEYOND.values(), ids=BEYOND)
def test_a_table_that_does_not_fit_its_tensors_is_never_launched(piece, match, monkeypatch):
    with pytest.raises(IndexError, match=match):
        expand([Group.of(Piece(torch.ones(2, 2), whole := torch.zeros(2, 2))), Group.of(piece)])

    assert (whole == 0).all()


def lowbias32(x: int) -> int:
    """Hash 32 bits as C. Wellons' hash-prospector does."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def drawn(seed: int, tensor_id: int, row: int, col: int) -> int:
    """Compute the noise of one element by its formula."""
    of_rows = lowbias32(lowbias32(lowbias32(seed % 2**32) ^ seed >> 32) ^ tensor_id)
    of_cols = lowbias32(of_rows ^ 0x9E3779B9)
    a, b = ((i * 0x9E3779B9 + key) % 2**32 for i, key in ((row, of_rows), (col, of_cols)))
    word = lowbias32((lowbias32(a) + lowbias32(b)) % 2**32)
    return sum(word.to_bytes(4, "little")) - 510


IDS = [0, 1, 2, 3, 5, 7, 1000003, 2**31 - 1]


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_is_its_formula(seed):
    ids = torch.tensor(IDS, dtype=torch.int32)

    actual = normal(axis_keys(seed, 0xF2345678), ids, ids)

    assert actual.tolist() == [[drawn(seed, 0xF2345678, i, j) for j in IDS] for i in IDS]


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_kernel_and_reference_draw_the_same_noise(seed, dtype):
    g = torch.Generator().manual_seed(0)
    rows, cols = (Copy(ids=integers(2**31 - 1, n, g)) for n in (5, BLOCK_C + 9))
    dst = torch.empty(5, BLOCK_C + 9, dtype=dtype, device=DEVICE)
    zero = torch.zeros(1, 1, dtype=dtype, device=DEVICE).expand_as(dst)
    noise = Noise(torch.ones((), dtype=dtype, device=DEVICE), axis_keys(seed, 2**32 - 1))

    expand([Group.of(Piece(zero, dst, (rows,), (cols,), noise=noise))])

    assert torch.equal(dst, normal(noise.keys, rows.ids, cols.ids).to(dtype))


def matrix(n: int, seed: int = 2**63 + 5, tensor_id: int = 3) -> Tensor:
    ids = torch.arange(n, dtype=torch.int32)
    return normal(axis_keys(seed, tensor_id), ids, ids).double() / reference.BYTES_STD


def test_normal_has_the_moments_of_a_sum_of_four_bytes():
    x = matrix(1024)
    n = x.numel()

    assert abs(x.mean()) < 5 / sqrt(n)
    assert abs(x.var() - 1) < 5 * sqrt(1.7 / n)  # the fourth moment is 3 - (6 / 5) / 4 = 2.7
    assert abs(x.pow(3).mean()) < 5 * sqrt(10 / n) and abs(x.pow(4).mean() - 2.7) < 5 * sqrt(60 / n)


def test_no_two_rows_columns_or_tensors_of_noise_are_correlated():
    n = 1024
    x, y = matrix(n), matrix(n, tensor_id=4)
    above = tuple(torch.triu_indices(n, n, 1))
    grams = {
        "rows": (x @ x.T)[above],
        "columns": (x.T @ x)[above],
        "squares": ((x**2 - 1) @ (x**2 - 1).T)[above] / 1.7,
        "tensors": (x @ y.T).flatten(),
        "seeds": (x @ matrix(n, seed=2**63 + 6).T).flatten(),
    }

    for name, gram in grams.items():
        z = gram / sqrt(n)  # correlations of independent rows have variance 1
        assert abs(z.var() - 1) < 5 * sqrt(2.2 / len(z)), name
        assert z.abs().max() < 6.5, name  # the largest of a million normal numbers is about 5


def test_singular_values_of_noise_are_those_of_independent_numbers():
    x = matrix(1024)

    largest = torch.linalg.matrix_norm(x, 2) / sqrt(1024)

    assert abs(largest - 2) < 0.05  # Bai and Yin: the limit is 2; at n it is a few n^(-2/3) lower


@settings(max_examples=60, deadline=None)
@given(case=cases([1, 2, 5], [1, 3, 6]))
def test_reference_is_the_formula_element_by_element(case):
    memory, copy, piece = case.build()
    n, dtype, untouched = piece.noise, piece.dst.dtype, torch.ones_like(memory, dtype=torch.bool)
    written = untouched.as_strided(piece.dst.shape, piece.dst.stride(), piece.dst.storage_offset())

    reference.expand([Group.of(piece)])

    def at(vector, default, i):
        return default if vector is None else vector[i].item()

    for (i, j), r, c in product(
        product(*map(range, piece.shape)), piece.row_copies, piece.col_copies
    ):
        place = int(at(r.targets, r.target + i, i)), c.target + j
        written[place] = False
        source = piece.src[int(at(piece.rows, i, i)), int(at(piece.cols, j, j))]
        if case.bits:
            assert bits(piece.dst[place]) == bits(source)
            continue
        noise, factor = 0.0, r.scale * c.scale * at(r.scales, 1.0, i) * at(c.scales, 1.0, j)
        if n is not None:
            word = drawn(
                *case.noise[:2],
                int(at(r.ids, r.first_id + i, i)),
                int(at(c.ids, c.first_id + j, j)),
            )
            noise = (
                word
                * float(n.std)
                * r.noise
                * c.noise
                * at(r.noises, 1.0, i)
                * at(c.noises, 1.0, j)
            )
        # the arithmetic rounds up to eight times, on terms that may cancel, and the store rounds once
        eps = 8 * torch.finfo(arithmetic(dtype)).eps + torch.finfo(dtype).eps
        bound = eps * (abs(float(source)) + abs(noise)) * abs(factor)
        error = abs(float(piece.dst[place]) - (float(source) + noise) * factor)
        assert error <= bound + torch.finfo(dtype).smallest_normal
    assert torch.equal(bits(memory)[untouched], bits(copy)[untouched])


def trained(dtype: torch.dtype, tied: bool) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    sizes = dict(
        hidden_size=16,
        num_hidden_layers=1,
        vocab_size=11,
        intermediate_size=24,
        num_attention_heads=4,
    )
    model = make("llama", tied=tied, **sizes).to(DEVICE, dtype)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = torch.randint(0, 11, (2, 8), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for _ in range(2):
        optim.zero_grad()
        torch.nn.functional.cross_entropy(
            model(ids).logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten()
        ).backward()
        optim.step()
    return model, optim


GROWTHS = [(F64, "2x", True), (F32, {"layers": 2, "hidden": 24}, False), (BF16, "1.5x", True)]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "to", "tied"), GROWTHS, ids=["float64", "float32", "bfloat16"])
def test_backends_grow_a_model_and_its_optimizer_to_the_same_tensors(dtype, to, tied):
    model, optim = trained(dtype, tied)
    other, other_optim = deepcopy((model, optim))
    # the interpreter truncates bfloat16: see check()
    eps = torch.finfo(BF16).eps if dtype == BF16 and INTERPRETED else 0.0

    grow(model, optim, to=to, seed=2**63 + 1, backend="triton")
    grow(other, other_optim, to=to, seed=2**63 + 1, backend="torch")

    n_compared = 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for a, b in [
            (p, q),
            (p.grad, q.grad),
            *((optim.state[p][k], other_optim.state[q][k]) for k in other_optim.state.get(q, {})),
        ]:
            if a is not None and b is not None:
                torch.testing.assert_close(a, b, rtol=eps, atol=0)
                n_compared += 1
    assert n_compared > 2 * len(list(model.parameters()))


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_tensors_that_are_cut_alike_are_written_as_each_alone(dtype):
    def built(k: int) -> list[tuple[Tensor, list[Tensor], Noise]]:
        g = torch.Generator().manual_seed(k)
        whole, fill = numbers((9, 40), dtype, g).to(DEVICE), numbers((1, 1), dtype, g).to(DEVICE)
        std = torch.tensor(1e-3 * (k + 1), dtype=F32, device=DEVICE)
        dst = torch.full((9, 48), -7.0, dtype=dtype, device=DEVICE)
        return dst, [whole, fill], Noise(std, axis_keys(k, 5 * k))

    def pieces(dst: Tensor, read: list[Tensor], noise: Noise) -> tuple[Piece, ...]:
        return (
            Piece(read[0][2:, 3:35], dst, (Copy(),), (Copy(8),), noise=noise),
            Piece(read[1].expand(9, 8), dst, col_copies=(Copy(), Copy(40, scale=0.5))),
            Piece(read[0][:2, 3:35], dst, (Copy(7),), (Copy(8, scale=3.0),), noise=noise),
        )

    tensors, alone = ([built(k) for k in range(4)] for _ in range(2))
    for one in alone:
        reference.expand([Group.of(piece) for piece in pieces(*one)])
    for backend in (expand, reference.expand):
        group = Group(pieces(*tensors[0]), (0, 1, 0), *map(list, zip(*tensors, strict=True)))
        backend([group])
        for (actual, *_), (expected, *_) in zip(tensors, alone, strict=True):
            eps = torch.finfo(BF16).eps if dtype == BF16 and INTERPRETED else 0.0
            torch.testing.assert_close(actual, expected, rtol=eps, atol=0)
            actual.fill_(0)
        assert group.n_written == sum(
            piece.n_written for k in range(4) for piece in group.pieces_of(k)
        )
