"""How much memory and time does the fused inheritance loss take, compared with losses on whole logits and with Liger's?

A call is a forward and a backward of head and loss, with gradients of hidden states and head. The teacher is a weight per column
(*full*), 64 samples per position (*sampled*), or the input of a head of its own (*live*), whose logits the call makes. The baselines are
``F.cross_entropy`` and ``F.kl_div``, and Liger's distillation loss, with and without ``torch.compile``, which has live teachers only; with
``beta=0`` and these weights it is the same loss. Every line is first checked against ``F.cross_entropy`` and ``F.kl_div`` in float64; a
red line is not timed.

    python -m pytest bench/bench_inherit.py --bench-scope cpu      # or quick, gpu; `python -m bench` keeps the results

Every line is *warm*. Its bytes are those of the fused loss: two reads and a write of every logit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness
from growkern.inherit import fused_loss, sampled
from growkern.inherit.linear_loss import Terms, linear_loss

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OURS = "triton" if GPU else "torch"
PLAIN, LIGER, COMPILED = "cross_entropy + kl_div", "Liger", "Liger compiled"
KINDS = "full", "sampled", "live"
LINES = [*((OURS, kind) for kind in KINDS), (PLAIN, "full"), (PLAIN, "live")]
# a machine of `make gpu-check` has no network
LINES += [(name, "live") for name in (LIGER, COMPILED)] if find_spec("liger_kernel") else []
ALPHA, TAU, SAMPLES = 0.5, 2.0, 64
CHUNK = 256  # positions of a chunk of Liger's: the fastest of 64 to 1024 on a CPU
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
SIZES = {  # positions, hidden size, vocabulary
    "tiny": (64, 32, 500),
    "32,000 columns": (2048, 256, 32_000),
    "128,000 columns": (2048, 256, 128_000),
    "Llama 2": (8192, 4096, 32_000),
    "Llama 3": (8192, 4096, 128_256),
}
SCOPES = {
    "quick": (["tiny"], "fp32", 1),
    "cpu": (["32,000 columns", "128,000 columns"], "fp32", 3),
    "gpu": (["Llama 2", "Llama 3"], "bf16", 20),
}
Leaves = tuple[Tensor, Tensor]  # hidden states (n, D) and weight of the head (V, D)


@dataclass(frozen=True)
class Ready:
    """A case: leaves, labels, and the teacher in every form."""

    leaves: Leaves
    labels: Tensor
    teacher: Leaves
    index: Tensor
    weight: Tensor
    full: Tensor

    @property
    def logits(self) -> int:
        """Bytes of the logits of all positions."""
        return len(self.labels) * len(self.leaves[1]) * self.leaves[0].element_size()

    def loss(self, backend: str, kind: str) -> Tensor:
        """Return the loss of a line."""
        if backend in (LIGER, COMPILED):
            from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

            made = LigerFusedLinearJSDLoss(
                1 - ALPHA, ALPHA * TAU**2, 0.0, temperature=TAU, chunk_size=CHUNK, compiled=backend == COMPILED,
            )  # fmt: skip
            return made(*self.leaves, *self.teacher, self.labels)
        if backend == PLAIN:
            return plain(
                self.leaves, self.labels, self.probs(slice(None)) if kind == "live" else self.full
            )
        if kind == "live":
            terms = Terms(ALPHA, TAU)
            return linear_loss(
                *self.leaves,
                None,
                self.labels,
                terms,
                None,
                lambda _: lambda rows: (None, self.probs(rows)),
            ).loss
        index, probs = (None, self.full) if kind == "full" else (self.index, self.weight)
        return fused_loss(*self.leaves, self.labels, index, probs, alpha=ALPHA, tau=TAU).loss

    def probs(self, rows: slice) -> Tensor:
        """Return the teacher's probabilities of some positions."""
        hidden, weight = self.teacher
        return F.linear(hidden[rows], weight).float().div_(TAU).softmax(-1)


def plain(leaves: Leaves, labels: Tensor, full: Tensor) -> Tensor:
    """Return the loss by torch, from whole logits."""
    z = F.linear(*leaves).to(full.dtype)
    kl = F.kl_div(F.log_softmax(z / TAU, -1), full, reduction="batchmean")
    return (1 - ALPHA) * F.cross_entropy(z, labels) + ALPHA * TAU**2 * kl


def step(loss: Callable[[], Tensor], leaves: Leaves) -> Callable[[], None]:
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

    def drawn() -> Leaves:
        hidden = torch.randn(n, width, generator=g, device=DEVICE)
        weight = torch.randn(n_columns, width, generator=g, device=DEVICE).mul_(width**-0.5)
        return hidden.to(dtype), weight.to(dtype)

    leaves, (hidden, weight) = drawn(), drawn()
    labels = torch.randint(0, n_columns, (n,), generator=g, device=DEVICE)
    teacher = 3 * hidden, weight
    logits = F.linear(*teacher).float()
    index, probs = sampled(logits, SAMPLES, TAU, g)
    full = logits.div_(TAU).softmax(-1)
    return Ready(
        (leaves[0].requires_grad_(), leaves[1].requires_grad_()),
        labels,
        teacher,
        index,
        probs,
        full,
    )


def wrong(case: Ready, backend: str, kind: str) -> str:
    """Compare a few positions with the plain loss in float64; return the error as text."""
    few = slice(0, 16)
    leaves = case.leaves[0].detach()[few].requires_grad_(), case.leaves[1]
    teacher = case.teacher[0][few], case.teacher[1]
    part = Ready(
        leaves, case.labels[few], teacher, case.index[few], case.weight[few], case.full[few]
    )
    exact = (
        leaves[0].detach().double().requires_grad_(),
        leaves[1].detach().double().requires_grad_(),
    )
    full = part.full.double()
    if kind == "sampled":
        full = torch.zeros_like(full).scatter_add_(1, part.index, part.weight.double())
    ours = torch.autograd.grad(part.loss(backend, kind), leaves)
    for grad, other in zip(
        ours, torch.autograd.grad(plain(exact, part.labels, full), exact), strict=True
    ):
        error = float((grad.double() - other).norm() / other.norm())
        if not error <= ROUNDING[grad.dtype]:
            return f"a gradient is off by {error:.3g}"
    return ""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by all lines of the scope ``--bench-scope``; the lines of a case are consecutive."""
    scope = str(metafunc.config.getoption("--bench-scope"))
    names, dtype, rounds = SCOPES[scope]
    timed = [line for line in LINES if scope != "quick" or line[0] != COMPILED]
    lines = [(name, dtype, rounds, *line) for name in names for line in timed]
    ids = [f"{name}, {dtype}, {backend}, {kind}" for name, dtype, _, backend, kind in lines]
    metafunc.parametrize(("case", "dtype", "rounds", "backend", "kind"), lines, ids=ids)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's imports
@pytest.mark.benchmark(timer=harness.device_timer())
def test_inherit(benchmark, case: str, dtype: str, rounds: int, backend: str, kind: str):
    """Time one line of one case, unless the line is red."""
    prepared = ready(case, DTYPES[dtype])
    assert not (problem := wrong(prepared, backend, kind)), f"not timed: {problem}"
    call = step(lambda: prepared.loss(backend, kind), prepared.leaves)
    call()
    _, peak = harness.measured(call)

    benchmark.pedantic(call, setup=harness.flush, rounds=rounds)

    benchmark.extra_info |= {
        "op": "inherit",
        "case": case,
        "dtype": dtype,
        "backend": f"{backend}, {kind}",
        "phase": "warm",
        "tensor_bytes": prepared.logits,
        "moved": 3 * prepared.logits,
        "peak": peak,
    }
