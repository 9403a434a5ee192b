"""The kernel for sums of squares: the integers of a plain loop, and root mean squares with the bits of the torch backend."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

from fractions import Fraction

import pytest
from models import grow, make

from growkern.execution import measures
from growkern.kernels import squares
from growkern.kernels.squares import BLOCK, N_BLOCKS, sums_of_squares

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SIZES = [0, 1, 7, BLOCK - 1, BLOCK, BLOCK + 9, BLOCK * N_BLOCKS, 2 * BLOCK * N_BLOCKS + 5]


def drawn(sizes, dtype, scale=1.0):
    g = torch.Generator().manual_seed(len(sizes))
    return [
        (torch.randn(n, generator=g, dtype=torch.float64) * scale).to(DEVICE, dtype) for n in sizes
    ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_are_those_of_rounded_elements(dtype):
    tensors = [
        torch.tensor(x, dtype=dtype, device=DEVICE)
        for x in ([0.5, 1.5, -2.5, 3.25], [7.0], [], [-0.75])
    ]
    inverses = torch.tensor([1.0, 4.0, 2.0, 0.5], dtype=measures.arithmetic(dtype), device=DEVICE)

    sums = sums_of_squares(tensors, inverses)

    expected = [  # round() rounds half to even
        sum(round(Fraction(x) * Fraction(k)) ** 2 for x in t.tolist())
        for t, k in zip(tensors, inverses.tolist(), strict=True)
    ]
    assert sums.tolist() == expected == [0 + 4 + 4 + 9, 784, 0, 0]


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-30])
@pytest.mark.parametrize("dtype", DTYPES)
def test_roots_of_mean_squares_have_the_bits_of_torch(dtype, scale):
    tensors = drawn(SIZES[1:], dtype, scale if dtype != torch.float16 else max(scale, 1e-3))

    ours = measures.roots_of_mean_squares(tensors, sums_of_squares)

    assert torch.equal(ours, measures.roots_of_mean_squares(tensors))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_has_no_finite_root(bad):
    tensors = drawn([50, 50], torch.float32)
    tensors[0][3] = bad

    first, second = measures.roots_of_mean_squares(tensors, sums_of_squares)

    assert not first.isfinite() and second.isfinite()


def test_tensors_that_the_kernel_cannot_read_are_summed_by_torch(monkeypatch):
    (whole,) = drawn([33], torch.float32)
    for tensor in (whole[1:], whole[:32].view(4, 8).T):
        monkeypatch.setattr(squares, "squares_kernel", None)  # a launch would raise
        ours = measures.roots_of_mean_squares([tensor], sums_of_squares)
        assert torch.equal(ours[0], measures.roots_of_mean_squares([tensor])[0])


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_a_growth_measures_by_the_kernel_of_its_backend(backend, monkeypatch):
    used = []
    monkeypatch.setattr(
        squares, "sums_of_squares", lambda *args: used.append(1) or sums_of_squares(*args)
    )
    model = make("llama", tied=True).to(DEVICE)

    grow(model, to="1.5x", backend=backend)

    assert bool(used) == (backend == "triton")
