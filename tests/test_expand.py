"""Kernel against reference, reference against loops and published vectors, backend against backend.

Runs under Triton's interpreter, or on a GPU where there is one and TRITON_INTERPRET is not set.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from dataclasses import dataclass, replace
from itertools import product
from math import sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import grow, make
from torch import Tensor

from growkern import reference
from growkern.kernels.expand import BLOCK_C, _kind, block_r, expand
from growkern.reference import Noise, Piece, arithmetic, normal

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, F16, BF16, I64 = torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64
BITS = {
    8: I64,
    4: torch.int32,
    2: torch.int16,
}  # bytes -> integers of that size, to compare NaN payloads and -0.0 too
POISON = {
    8: 0x7FF8DEADDEADDEAD,
    4: 0x7FC0DEAD,
    2: 0x7FFF,
}  # NaN as float64, float32, and as both float16 and bfloat16
ROWS = [1, 7, 15, 16, 17, 31, 32, 33, 64, 67]  # BLOCK_R is 8, 16 or 32
COLS = [1, 13, 64, BLOCK_C - 1, BLOCK_C, BLOCK_C + 1, 2 * BLOCK_C, 2 * BLOCK_C + 8]
SOURCES = [
    "plain",
    "offset",
    "transposed",
    "strided",
    "row",
    "column",
    "element",
]  # the last three broadcast
TARGETS = ["plain", "aligned", "offset", "transposed", "strided"]
SEEDS = [0, 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1, 0x0123456789ABCDEF]


def bits(t: Tensor) -> Tensor:
    return t.contiguous().view(BITS[t.itemsize])


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Every bit pattern: NaN with payloads, infinities, -0.0, subnormals."""
    n = 8 * dtype.itemsize
    return torch.randint(
        -(2 ** (n - 1)), 2 ** (n - 1) - 1, shape, generator=g, dtype=BITS[dtype.itemsize]
    ).view(dtype)


def numbers(shape: tuple[int, ...], dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Numbers of many sizes and both signs, with zeros; no subnormals, which the interpreter's bfloat16 cannot do."""
    values = torch.randn(shape, generator=g, dtype=F64) * 10.0 ** torch.randint(
        -2, 3, shape, generator=g
    )
    return torch.where(torch.rand(shape, generator=g) < 0.1, 0.0 * values, values).to(dtype)


def factors(n: int, dtype: torch.dtype, g: torch.Generator) -> Tensor:
    """Numbers in (-2, 2), some of them 0: no product leaves the range of float16."""
    values = 4 * torch.rand(n, generator=g, dtype=F64) - 2
    return torch.where(torch.rand(n, generator=g) < 0.1, 0.0 * values, values).to(DEVICE, dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values under other strides; broadcast layouts repeat the first row, column or element."""
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


def target(shape: tuple[int, int], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """Poisoned memory, and a rectangle in it."""
    r, c = shape
    n_wide = 16 // dtype.itemsize
    memory = torch.full(
        (2 * r + 2, 3 * (c + n_wide) // n_wide * n_wide),
        POISON[dtype.itemsize],
        dtype=BITS[dtype.itemsize],
    )
    memory = memory.view(dtype).to(DEVICE)
    if layout == "plain":
        return memory, memory.view(-1)[: r * c].view(r, c)
    if layout == "transposed":
        memory = torch.cat([memory.view(-1)] * (1 + (2 * c + 2) * (r + 4) // memory.numel()))
        return memory, memory.view(-1)[: (c + 1) * (r + 3)].view(c + 1, r + 3)[1:, 2 : r + 2].T
    if layout == "strided":
        return memory, memory[1 : 2 * r + 1 : 2, 1 : 3 * c + 1 : 3]
    first = n_wide if layout == "aligned" else 3
    return memory, memory[1 : r + 1, first : first + c]


@dataclass(frozen=True)
class Case:
    """All that a piece is made from; ``n_sources``: rows and columns of the source where they are indexed."""

    src: torch.dtype
    dst: torch.dtype
    shape: tuple[int, int]
    source: str
    target: str
    n_sources: tuple[int | None, int | None] = (None, None)
    scale: float = 1.0
    scales: tuple[bool, bool] = (False, False)
    noise: tuple[int, int, int, float] | None = None  # seed, tensor id, end of the counters, std
    values: int = 0

    @property
    def bits(self) -> bool:
        """True for a pure copy, which copies every bit pattern."""
        return (
            self.src == self.dst
            and self.scale == 1.0
            and not any(self.scales)
            and self.noise is None
        )

    def build(self) -> tuple[Tensor, Tensor, Piece]:
        """Poisoned memory, a copy of it, and the piece that writes a rectangle of the first."""
        g = torch.Generator().manual_seed(self.values)
        n_rows, n_cols = (
            n if s is None else s for n, s in zip(self.shape, self.n_sources, strict=True)
        )
        src = (random_bits if self.bits else numbers)((n_rows, n_cols), self.src, g)
        memory, dst = target(self.shape, self.dst, self.target)
        rows, cols = (
            None
            if s is None
            else torch.randint(0, s, (n,), generator=g, dtype=torch.int32).to(DEVICE)
            for n, s in zip(self.shape, self.n_sources, strict=True)
        )
        dtype, noise = arithmetic(self.dst), None
        by_row, by_col = (
            factors(n, dtype, g) if has else None
            for n, has in zip(self.shape, self.scales, strict=True)
        )
        if self.noise is not None:
            seed, tensor_id, end, std = self.noise
            ids = [
                torch.randint(0, end, (n,), generator=g, dtype=torch.int32).to(DEVICE)
                for n in self.shape
            ]
            strength = torch.tensor(std, dtype=dtype, device=DEVICE)
            noise = Noise(
                strength, (seed, tensor_id), *(factors(n, F32, g) for n in self.shape), *ids
            )
        return (
            memory,
            memory.clone(),
            Piece(
                laid_out(src.to(DEVICE), self.source),
                dst,
                rows,
                cols,
                self.scale,
                by_row,
                by_col,
                noise,
            ),
        )


def cases(rows: list[int], cols: list[int]) -> st.SearchStrategy[Case]:
    """Pure copies, and pieces with arithmetic."""
    any_noise = st.tuples(
        st.sampled_from(SEEDS),
        st.sampled_from([0, 1, 2**31 - 1]),
        st.sampled_from([8, 2**31 - 1]),
        st.just(0.02),
    )
    index = st.sampled_from([None, None, 1, 5, 40])
    parts = dict(
        shape=st.tuples(st.sampled_from(rows), st.sampled_from(cols)),
        source=st.sampled_from(SOURCES),
        target=st.sampled_from(TARGETS),
        n_sources=st.tuples(index, index),
        values=st.integers(0, 2**32),
    )
    work = dict(
        scale=st.sampled_from([1.0, 0.5, 1 / 3, -1.5]),
        scales=st.tuples(st.booleans(), st.booleans()),
        noise=st.none() | any_noise,
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


def moved(piece: Piece, memory: Tensor, copy: Tensor) -> Piece:
    """The same piece, its rectangle in the other memory."""
    dst = piece.dst
    return replace(piece, dst=copy.as_strided(dst.shape, dst.stride(), dst.storage_offset()))


def check(built: list[tuple[Tensor, Tensor, Piece]]) -> None:
    """Kernel and reference leave the same memory: bit for bit, on the rectangles and around them.

    Both compute in the same order in the same dtype without a fused multiply-add, so the arithmetic agrees bit for bit too.
    Only the interpreter truncates bfloat16 where torch rounds: one rounding, less than one ulp, at most eps |value|.
    """
    expand([piece for _, _, piece in built])
    reference.expand([moved(piece, memory, copy) for memory, copy, piece in built])

    for memory, copy, piece in built:
        if (
            INTERPRETED
            and piece.dst.dtype == BF16
            and not (piece.pure_copy and piece.src.dtype == BF16)
        ):
            actual, expected = piece.dst.to(F64), moved(piece, memory, copy).dst.to(F64)
            torch.testing.assert_close(actual, expected, rtol=torch.finfo(BF16).eps, atol=0)
            piece.dst.copy_(moved(piece, memory, copy).dst)  # what lies around is compared below
        assert torch.equal(bits(memory), bits(copy))


@settings(max_examples=120, deadline=None)
@given(case=cases(ROWS, COLS))
def test_kernel_writes_what_the_reference_writes(case):
    check([case.build()])


@settings(max_examples=25, deadline=None)
@given(many=st.lists(cases([0, 1, 9], [0, 1, 40]), max_size=12))
def test_many_pieces_of_many_kinds_in_one_call(many):
    check([case.build() for case in many])


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 8, 9, 33])
def test_every_program_finds_its_piece_when_some_have_no_tiles(n):
    shapes = [
        (r, 3) if k % 2 else (1, c)
        for k in range(n)
        for r, c in [((0, 1, 40)[k % 3], (0, BLOCK_C + 1, 5)[k % 3])]
    ]
    cases = [
        Case(F32, F32, shape, "plain", "offset", values=k)
        for k, shape in enumerate([(0, 3), *shapes, (2, 0), (1, 2), (0, 2)])
    ]

    check([case.build() for case in cases])


@pytest.mark.parametrize(
    "pieces", [[], [Piece(torch.zeros(0, 4), torch.zeros(0, 4))]], ids=["none", "empty"]
)
def test_nothing_to_write_is_no_launch(pieces):
    expand(pieces)


@settings(max_examples=200, deadline=None)
@given(case=cases([1, 2, 3], [1, 2, 4, 8, 12, 16, 24]))
def test_only_columns_in_aligned_groups_of_16_bytes_are_wide(case):
    _, _, piece = case.build()
    src = piece.src if piece.rows is None else piece.src[piece.rows.long()]

    _, _, src_wide, dst_wide, *_ = _kind(piece)

    n_wide = 16 // min(piece.src.itemsize, piece.dst.itemsize)
    for t, wide in [(src, src_wide), (piece.dst, dst_wide)]:
        starts = [
            t[i, j:].data_ptr() for i, j in product(range(t.shape[0]), range(0, t.shape[1], n_wide))
        ]
        grouped = (
            t.stride(1) == 1
            and t.shape[1] % n_wide == 0
            and not any(start % 16 for start in starts)
        )
        assert grouped or not wide
    assert dst_wide or case.target != "aligned" or case.shape[1] % n_wide
    assert (
        src_wide
        or case.source != "plain"
        or case.shape[1] % n_wide
        or case.n_sources[1] is not None
    )


WIDE = list(product([F64, F32, F16, BF16, I64], [False, True], [-1, 0, 1, 2]))


@pytest.mark.parametrize(
    ("dtype", "by_index", "n"), WIDE, ids=lambda v: str(v).removeprefix("torch.")
)
def test_wide_accesses_copy_exactly_around_the_block_size(dtype, by_index, n):
    n_wide = 16 // dtype.itemsize
    shape = (
        max(1, block_r(dtype.itemsize, src_wide=True, dst_wide=True, noise=False) + n),
        BLOCK_C * max(1, n) + n * n_wide,
    )
    memory, dst = target(shape, dtype, "aligned")
    src = random_bits(
        (shape[0], shape[1] + 2 * n_wide), dtype, torch.Generator().manual_seed(0)
    ).to(DEVICE)[:, n_wide:-n_wide]
    rows = torch.arange(shape[0], dtype=torch.int32).flip(0).to(DEVICE) if by_index else None

    check([(memory, memory.clone(), Piece(src, dst, rows=rows))])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [F64, F32])
def test_kernel_and_reference_draw_the_same_noise(seed, dtype):
    g = torch.Generator().manual_seed(0)
    rows, cols = (
        torch.randint(0, 2**31 - 1, (n,), generator=g, dtype=torch.int32).to(DEVICE)
        for n in (19, BLOCK_C + 9)
    )
    ones, dst = (
        [torch.ones(n, device=DEVICE) for n in (19, BLOCK_C + 9)],
        torch.empty(19, BLOCK_C + 9, dtype=dtype, device=DEVICE),
    )
    zero, key = torch.zeros(1, 1, dtype=dtype, device=DEVICE).expand_as(dst), (seed, 2**31 - 1)

    expand(
        [
            Piece(
                zero,
                dst,
                noise=Noise(torch.ones((), dtype=dtype, device=DEVICE), key, *ones, rows, cols),
            )
        ]
    )

    assert torch.equal(bits(dst), bits(normal(key, rows, cols).to(dtype)))


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x32-10 as printed in Salmon et al., SC 2011."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b % 2**32, (a >> 32) ^ c3 ^ k1, a % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


VECTORS = [  # kat_vectors of Random123: counter, key, words
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_published_words(counter, key, words):
    actual = reference._philox([torch.tensor([c]) for c in counter], key[0] | key[1] << 32)

    assert philox(counter, key) == words
    assert tuple(int(word) for word in actual) == words


@pytest.mark.parametrize("seed", SEEDS)
def test_normal_sums_the_bytes_of_philox_words(seed):
    rows, cols, tensor_id = (
        [0, 1, 2, 3, 4, 5, 7, 1000003, 2**31 - 1],
        [0, 1, 77, 2**31 - 1],
        0x12345678,
    )

    actual = normal(
        (seed, tensor_id), *(torch.tensor(ids, dtype=torch.int32) for ids in (rows, cols))
    )

    for (i, row), (j, col) in product(enumerate(rows), enumerate(cols)):
        word = philox((col, row // 4, tensor_id, 0), (seed % 2**32, seed >> 32))[row % 4]
        expected = np.float32(sum(word.to_bytes(4, "little")) - 510) * np.float32(
            1 / sqrt(4 * (256**2 - 1) / 12)
        )
        assert actual[i, j].item() == expected


def test_normal_has_mean_0_variance_1_and_no_correlation_of_neighbours():
    x = normal((2**63 + 5, 3), *(torch.arange(256, dtype=torch.int32),) * 2).double()
    n = x.numel()

    assert abs(x.mean()) < 5 / sqrt(n)
    assert abs(x.var() - 1) < 5 * sqrt(1.7 / n)  # fourth moment 2.7: 3 less 6/5 over four summands
    assert abs((x[1:] * x[:-1]).mean()) < 5 / sqrt(n)
    assert abs((x[:, 1:] * x[:, :-1]).mean()) < 5 / sqrt(n)


@settings(max_examples=60, deadline=None)
@given(case=cases([1, 2, 5], [1, 3, 6]))
def test_reference_is_the_formula_element_by_element(case):
    _, _, piece = case.build()
    n, dtype = piece.noise, piece.dst.dtype

    reference.expand([piece])

    for i, j in product(*map(range, piece.dst.shape)):
        at = (
            i if piece.rows is None else int(piece.rows[i]),
            j if piece.cols is None else int(piece.cols[j]),
        )
        if case.bits:
            assert bits(piece.dst[i, j]) == bits(piece.src[at])
            continue
        noise, factor = 0.0, piece.scale
        if n is not None:
            row, col = int(n.row_ids[i]), int(n.col_ids[j])
            word = philox((col, row // 4, n.key[1], 0), (n.key[0] % 2**32, n.key[0] >> 32))[row % 4]
            noise = (
                (sum(word.to_bytes(4, "little")) - 510)
                / sqrt(21845)
                * float(n.std)
                * float(n.rows[i])
                * float(n.cols[j])
            )
        for scale, k in ((piece.row_scale, i), (piece.col_scale, j)):
            factor *= 1.0 if scale is None else float(scale[k])
        source = float(piece.src[at])
        # one rounding to the target, and eight in the arithmetic (five of the noise, one each of the sum and the two scales;
        # float32 noise in float64 too) of what may cancel
        eps = (
            8 * (2.0**-24 if n is not None else torch.finfo(arithmetic(dtype)).eps)
            + torch.finfo(dtype).eps
        )
        expected = (source + noise) * factor
        assert (
            abs(float(piece.dst[i, j]) - expected)
            <= eps * (abs(source) + abs(noise)) * abs(factor) + torch.finfo(dtype).smallest_normal
        )


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


@pytest.mark.parametrize(("dtype", "to", "tied"), GROWTHS, ids=["float64", "float32", "bfloat16"])
def test_backends_grow_a_model_and_its_optimizer_to_the_same_tensors(dtype, to, tied):
    (model, optim), (other, other_optim) = trained(dtype, tied), trained(dtype, tied)
    eps = torch.finfo(BF16).eps if dtype == BF16 and INTERPRETED else 0.0  # as in check

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
