"""How close is a step of ``growkern.optim.AdamW`` to a ``copy_`` of the same bytes, and what do slices cost compared with torch's AdamW?

A case has all parameters of a GPT-2, or one tensor alone, without slices or with every kind of slice. The baselines are the foreach and
fused forms of ``torch.optim.AdamW``, which have no slices, and the roof. Cases with slices also time the hooks of ``UpdateScale``. Every
case is first checked against torch's single-tensor step; a red case is not timed.

    python -m pytest bench/bench_adamw.py --bench-scope cpu      # or quick, gpu

*host*, on a CPU, is a step of small tensors that takes the way of a GPU, but launches nothing: the time that Python takes.

Every line is *warm*: a step writes to memory that an earlier step has written. On a CPU, without slices, growkern's step is torch's
single-tensor step, in blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from bench import harness
from growkern import UpdateScale
from growkern.optim import AdamW
from growkern.optimizer import adamw
from growkern.optimizer.adamw_torch import SLICES, length
from growkern.optimizer.update_scale import Scale

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OURS = "triton" if GPU else "torch"
HOOKS = "UpdateScale"  # hooks around torch's foreach step
HOST = "host"
N_SMALL = (150, 300, 600)  # tensors of the models for the time of the host
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtype of parameter, gradient and moments
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
SECONDS = {"quick": 0.01, "cpu": 2.0, "gpu": 0.2}  # time limit of one line of a case
ROUNDS = (3, 50)  # minimum and maximum
MOMENTS = ("exp_avg", "exp_avg_sq")
N_STEPS = 9  # step count before the timed step
OPTIONS = dict(lr=1e-3, eps=1e-6, weight_decay=0.1)
FACTORS = {"lr": 0.5, "eps": 3.0, "decay": 2.0, "born": 0.0, "rewarm": 1.0}  # equal for all rows
WITH_FACTORS = dict(
    lr=1e-3 / 4, eps=1e-6 * 9, weight_decay=0.1 * 4 * 4
)  # OPTIONS times FACTORS, for a param group


def gpt2(width: int, n_layers: int, n_vocab: int, n_positions: int) -> list[tuple[int, ...]]:
    """Shapes of the parameters of a GPT-2."""
    vector, block = (width,), (width, width)
    layer = [
        *(vector, vector), (width, 3 * width), (3 * width,), block, vector,
        *(vector, vector), (width, 4 * width), (4 * width,), (4 * width, width), vector,
    ]  # fmt: skip
    return [(n_vocab, width), (n_positions, width), *layer * n_layers, vector, vector]


SHAPES = {
    "tiny GPT-2": gpt2(64, 2, 256, 64),
    "GPT-2 124M": gpt2(768, 12, 50257, 1024),
    "one tensor": [(4096, 4096)],
    "one large tensor": [(32768, 16384)],
    **{f"{n} small tensors": [(8, 8)] * n for n in N_SMALL},
}
SMALL = [f"{n} small tensors" for n in N_SMALL]
SCOPES = {
    "quick": {"tiny GPT-2": ["fp32", "bf16"], SMALL[0]: ["fp32"]},
    "cpu": {"GPT-2 124M": ["fp32"], "one tensor": ["fp32", "bf16"]}
    | {name: ["fp32"] for name in SMALL},
    "gpu": {name: list(DTYPES) for name in SHAPES if name != "tiny GPT-2"},
}


@dataclass(frozen=True)
class Ready:
    """A checked case with its tensors."""

    params: list[Parameter]
    state: list[dict[str, Tensor]]
    sliced: bool

    @property
    def moved(self) -> int:
        """Bytes of a step: gradient, parameter and both moments are read; all but the gradient are written."""
        return 7 * harness.n_bytes(self.params)

    def optimizer(self, kind: type[torch.optim.AdamW], **options: object) -> torch.optim.AdamW:
        """Return an optimizer on the case's tensors, which all optimizers share."""
        optim = kind(self.params, **OPTIONS, **options)  # pyright: ignore[reportArgumentType]
        for p, state in zip(self.params, self.state, strict=True):
            step = torch.tensor(float(N_STEPS), device=DEVICE if options.get("fused") else "cpu")
            optim.state[p] = {"step": step, **state}
            if isinstance(optim, AdamW) and self.sliced:
                optim.set_slices(p, **slices(p))
        return optim


def slices(p: Tensor) -> dict[str, Tensor]:
    """Return slices of every kind for a parameter."""
    return {key: torch.full((length(key, p.shape),), FACTORS[key.partition("_")[0]]) for key in SLICES}  # fmt: skip


def drawn(index: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Draw parameter, gradient and moments with the seed ``index``."""
    g = torch.Generator(DEVICE).manual_seed(index)
    p, grad, avg = (torch.randn(shape, generator=g, device=DEVICE).to(dtype) for _ in range(3))
    return p, grad, avg, avg.square().add_(0.1)


@lru_cache(maxsize=1)
def ready(name: str, dtype: str, sliced: bool) -> Ready | str:
    """Build and check a case; return the case, or the errors as text."""
    params: list[Parameter] = []
    state: list[dict[str, Tensor]] = []
    for index, shape in enumerate(SHAPES[name]):
        p, grad, *moments = drawn(index, shape, DTYPES[dtype])
        params.append(Parameter(p))
        params[-1].grad = grad
        state.append(dict(zip(MOMENTS, moments, strict=True)))
    prepared = Ready(params, state, sliced)
    prepared.optimizer(AdamW).step()
    hooks = wrong_hooks(prepared) if sliced else ()
    return "; ".join([*wrong(prepared, DTYPES[dtype]), *hooks]) or prepared


def wrong(case: Ready, dtype: torch.dtype) -> Iterator[str]:
    """Compare one growkern step with torch's single-tensor step, parameter by parameter; yield the errors."""
    for index, (actual, state) in enumerate(zip(case.params, case.state, strict=True)):
        p, grad, *moments = drawn(index, tuple(actual.shape), dtype)
        expected = Parameter(p)
        expected.grad = grad
        options = WITH_FACTORS if case.sliced else OPTIONS
        optim = torch.optim.AdamW([expected], foreach=False, **options)
        optim.state[expected] = {
            "step": torch.tensor(float(N_STEPS)),
            **dict(zip(MOMENTS, moments, strict=True)),
        }
        optim.step()
        pairs = {"parameter": (actual.detach(), expected.detach())}
        pairs |= {key: (state[key], optim.state[expected][key]) for key in MOMENTS}
        for name, (a, b) in pairs.items():
            worst = float((a.float() - b.float()).abs().max())  # NaN is not below any limit
            if not worst <= ROUNDING[dtype] * float(b.abs().max()):
                yield f"{name} {index} is off by {worst:.3g}"


def hooked(case: Ready) -> torch.optim.AdamW:
    """Return torch's AdamW with hooks: the step sees parameters doubled, column by column, and gradients halved, row by row."""
    optim = case.optimizer(torch.optim.AdamW, foreach=True)
    scales: dict[Tensor, Scale] = {}
    for p in case.params:
        half, two = (torch.full((n,), x, device=DEVICE) for n, x in ((p.shape[-1], 0.5), (p.shape[0], 2.0)))  # fmt: skip
        ones = (1.0,) * (p.dim() - 1)
        scales[p] = Scale(update=(*ones, half), grad=(two, *ones))
    UpdateScale(optim, scales)
    return optim


def wrong_hooks(case: Ready) -> Iterator[str]:
    """Compare one step with hooks with torch's step on parameters and gradients scaled by hand, for a few parameters; yield the errors."""
    few = case.params[1:4] or case.params
    before = [
        [t.detach().double() for t in (p, p.grad, *state.values()) if t is not None]
        for p, state in zip(case.params, case.state, strict=True)
        if any(p is q for q in few)
    ]
    hooked(case).step()
    for index, (actual, (p, grad, *moments)) in enumerate(zip(few, before, strict=True)):
        seen = Parameter(p * 2)
        seen.grad = grad / 2
        optim = torch.optim.AdamW([seen], foreach=False, **OPTIONS)
        step = torch.tensor(float(N_STEPS))
        optim.state[seen] = {"step": step, **dict(zip(MOMENTS, moments, strict=True))}
        optim.step()
        worst = float((actual.detach().double() - seen.detach() / 2).abs().max())
        if not worst <= ROUNDING[actual.dtype] * float(p.abs().max()):
            yield f"parameter {index} is off by {worst:.3g} with hooks"


def _roof(case: Ready) -> Callable[[], object]:
    if GPU:
        return harness.gpu_roof(case.moved)
    a, b = (torch.ones(case.moved // 2, dtype=torch.uint8) for _ in range(2))
    return lambda: b.copy_(a)


class _Unlaunched:
    """A kernel that takes a launch and does nothing."""

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *arguments, **options: None


def host(case: Ready) -> Callable[[], object]:
    """Return a step that prepares its launches as on a GPU, and launches none."""
    from growkern.kernels import adamw as kernel

    optim = case.optimizer(AdamW)
    fits, launched = adamw._fits, kernel.adamw_kernel  # pyright: ignore[reportPrivateUsage]

    def step() -> None:
        adamw._fits, kernel.adamw_kernel = lambda *_: True, _Unlaunched()  # pyright: ignore
        try:
            optim.step()
        finally:
            adamw._fits, kernel.adamw_kernel = fits, launched  # pyright: ignore

    return step


LINES: dict[str, Callable[[Ready], Callable[[], object]]] = {
    OURS: lambda case: case.optimizer(AdamW).step,
    "foreach": lambda case: case.optimizer(torch.optim.AdamW, foreach=True).step,
    "fused": lambda case: case.optimizer(torch.optim.AdamW, fused=True).step,
    HOOKS: lambda case: hooked(case).step,
    HOST: host,
    harness.ROOF: _roof,
}


def chosen(scope: str) -> Sequence[tuple[str, bool, str, str]]:
    """Return case, slices or not, dtype and backend of every line in a scope."""
    return [
        (name, sliced, dtype, backend)
        for name, dtypes in SCOPES[scope].items()
        for dtype in dtypes
        for sliced in (False, True)[: 1 if name in SMALL else 2]
        for backend in LINES
        if (sliced or backend != HOOKS) and (backend != HOST or (name in SMALL and not GPU))
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by all lines of the scope ``--bench-scope``; the lines of a case are consecutive."""
    all_lines = chosen(str(metafunc.config.getoption("--bench-scope")))
    ids = [f"{name}{' slices' * sliced}, {dtype}, {backend}" for name, sliced, dtype, backend in all_lines]  # fmt: skip
    metafunc.parametrize(("case", "sliced", "dtype", "backend"), all_lines, ids=ids)


@pytest.mark.benchmark(timer=harness.device_timer())
def test_adamw(benchmark, request, case: str, sliced: bool, dtype: str, backend: str):
    """Time one line of one case, unless the case is red."""
    prepared = ready(case, dtype, sliced)
    assert isinstance(prepared, Ready), f"not timed: {prepared}"
    call = LINES[backend](prepared)
    call()
    seconds, peak = harness.measured(call, room=harness.n_bytes(prepared.params))
    allowed = SECONDS[str(request.config.getoption("--bench-scope"))]
    rounds = min(max(ROUNDS[0], int(allowed / seconds)), ROUNDS[1])

    benchmark.pedantic(call, setup=harness.flush, rounds=rounds)

    benchmark.extra_info |= {
        "op": "adamw",
        "case": f"{case} slices" if sliced else case,
        "dtype": dtype,
        "backend": backend,
        "phase": "warm",
        "tensor_bytes": harness.n_bytes(prepared.params),
        "moved": prepared.moved,
        "peak": peak,
    }
