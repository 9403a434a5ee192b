"""How much memory and time does the fused inheritance loss take, compared with ``F.cross_entropy`` and ``F.kl_div`` on whole logits?

A call is a forward and a backward of head and loss, with gradients of hidden states and head. The teacher is a weight per column (*full*),
or 64 samples per position (*sampled*); the baseline has a weight per column in either case. Every case is first checked against the
baseline in float64; a red case is not timed.

    python -m pytest bench/bench_inherit.py --bench-scope cpu      # or quick, gpu
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from growkern.inherit import fused_loss, sampled

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OURS, BASELINE = "triton" if GPU else "torch", "cross_entropy + kl_div"
ALPHA, TAU, SAMPLES = 0.5, 2.0, 64
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SIZES = {  # positions, hidden size, vocabulary
    "tiny": (64, 32, 500),
    "32,000 columns": (2048, 256, 32_000),
    "128,000 columns": (2048, 256, 128_000),
    "Llama 2": (8192, 4096, 32_000),
    "Llama 3": (8192, 4096, 128_256),
}
SCOPES = {
    "quick": (["tiny"], torch.float32, 1),
    "cpu": (["32,000 columns", "128,000 columns"], torch.float32, 3),
    "gpu": (["Llama 2", "Llama 3"], torch.bfloat16, 20),
}


@dataclass(frozen=True)
class Ready:
    """A case: leaves, labels, and the teacher in both forms."""

    leaves: tuple[Tensor, Tensor]
    labels: Tensor
    full: Tensor
    index: Tensor
    weight: Tensor

    def ours(self, kind: str) -> Tensor:
        """Return the fused loss."""
        index, probs = (None, self.full) if kind == "full" else (self.index, self.weight)
        return fused_loss(*self.leaves, self.labels, index, probs, alpha=ALPHA, tau=TAU).loss

    def plain(self, leaves: tuple[Tensor, Tensor], full: Tensor) -> Tensor:
        """Return the loss by torch, from whole logits."""
        z = F.linear(*leaves).to(full.dtype)
        kl = F.kl_div(F.log_softmax(z / TAU, -1), full, reduction="batchmean")
        return (1 - ALPHA) * F.cross_entropy(z, self.labels) + ALPHA * TAU**2 * kl


def step(loss: Callable[[], Tensor], leaves: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a call of forward and backward, whose gradients are dropped."""

    def call() -> None:
        loss().backward()
        for leaf in leaves:
            leaf.grad = None

    return call


@lru_cache(maxsize=1)
def ready(name: str, dtype: torch.dtype) -> Ready:
    """Draw a case."""
    n, width, n_columns = SIZES[name]
    g = torch.Generator(DEVICE).manual_seed(0)
    hidden = torch.randn(n, width, generator=g, device=DEVICE).to(dtype).requires_grad_()
    weight = torch.randn(n_columns, width, generator=g, device=DEVICE).mul_(width**-0.5)
    labels = torch.randint(0, n_columns, (n,), generator=g, device=DEVICE)
    logits = torch.randn(n, n_columns, generator=g, device=DEVICE).mul_(3)
    index, probs = sampled(logits, SAMPLES, TAU, g)
    full = logits.div_(TAU).softmax(-1)
    return Ready((hidden, weight.to(dtype).requires_grad_()), labels, full, index, probs)


def wrong(case: Ready, kind: str, dtype: torch.dtype) -> str:
    """Compare a few positions with the baseline in float64; return the error as text."""
    few = slice(0, 16)
    leaves = case.leaves[0].detach()[few].requires_grad_(), case.leaves[1]
    part = Ready(leaves, case.labels[few], case.full[few], case.index[few], case.weight[few])
    exact = tuple(leaf.detach().double().requires_grad_() for leaf in leaves)
    full = part.full.double()
    if kind != "full":
        full = torch.zeros_like(full).scatter_add_(1, part.index, part.weight.double())
    mine = torch.autograd.grad(part.ours(kind), leaves)
    for grad, other in zip(mine, torch.autograd.grad(part.plain(exact, full), exact), strict=True):  # pyright: ignore
        error = float((grad.double() - other).norm() / other.norm())
        if not error <= ROUNDING[dtype]:
            return f"a gradient is off by {error:.3g}"
    return ""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by all lines of the scope ``--bench-scope``; the lines of a case are consecutive."""
    names, dtype, rounds = SCOPES[str(metafunc.config.getoption("--bench-scope"))]
    lines = [(name, dtype, rounds, kind) for name in names for kind in ("full", "sampled", BASELINE)]  # fmt: skip
    ids = [f"{name}, {dtype}, {kind}" for name, dtype, _, kind in lines]
    metafunc.parametrize(("case", "dtype", "rounds", "kind"), lines, ids=ids)


@pytest.mark.benchmark(timer=harness.device_timer())
def test_inherit(benchmark, case: str, dtype: torch.dtype, rounds: int, kind: str):
    """Time one line of one case, unless the case is red."""
    prepared = ready(case, dtype)
    if kind != BASELINE:
        assert not (problem := wrong(prepared, kind, dtype)), f"not timed: {problem}"
    losses = (lambda: prepared.plain(prepared.leaves, prepared.full)) if kind == BASELINE else (lambda: prepared.ours(kind))  # fmt: skip
    call = step(losses, prepared.leaves)
    call()
    _, peak = harness.measured(call)

    benchmark.pedantic(call, setup=harness.flush, rounds=rounds)

    backend = BASELINE if kind == BASELINE else f"{OURS}, {kind}"
    logits = len(prepared.labels) * len(prepared.leaves[1]) * dtype.itemsize
    benchmark.extra_info |= {"case": case, "backend": backend, "logits": logits, "peak": peak}
    sizes = f"peak {peak / 2**20:.0f} MiB, logits {logits / 2**20:.0f} MiB"
    print(f"\n{case}, {backend}: {benchmark.stats['median']:.3f} s, {sizes}")
