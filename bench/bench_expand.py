"""How close is ``expand`` to a ``copy_`` of the same bytes, and how much faster is ``expand`` than ``index_select``?

A case grows one weight, alone or with both moments of Adam, on both axes at once. The baselines are two ``index_select`` and a multiply,
out of place; this baseline under ``torch.compile`` (GPU only); and the roof. Every case is first checked against plain indexing; a red
case is not timed.

    python -m pytest bench/bench_expand.py --bench-scope cpu      # or quick, gpu; `python -m bench` keeps the results

*cold* times ``execute``, which allocates the targets; *warm* times repeated calls of ``expand`` on the same pieces.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import sqrt

import pytest
import torch
from torch import Tensor

from bench import harness
from growkern import ModelSpec, linear
from growkern.depth import IdentityBlocks
from growkern.execution import torch_backend as reference
from growkern.execution.execute import execute
from growkern.execution.grouping import grouped
from growkern.execution.tiles import Tiler
from growkern.model.size_values import space_size
from growkern.optimizer.state_rules import GRADIENT, LAWS, SQUARE, VALUE
from growkern.planning.build import build
from growkern.planning.decisions import StreamScale, WidthDecision, WidthMethod
from growkern.planning.growth_plan import GrowthPlan
from growkern.planning.index_map import IndexMap
from growkern.planning.vector import Vector
from growkern.support.named_tensors import Tensors
from growkern.width import Lossless

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
OURS = "triton" if GPU else "torch"
ALLOCATES = "warm" if GPU else "cold"  # a GPU's caching allocator reuses memory
NAME = "layer.weight"
LAW = LAWS["torch.optim.adamw.AdamW"]
RULES = (VALUE, GRADIENT, SQUARE)  # by order in the gradient
STATE = {"weights": (), "adam": ("exp_avg", "exp_avg_sq")}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # dtype of the weight; moments are float32
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
SECONDS = {"quick": 0.01, "cpu": 0.15, "gpu": 0.1}  # time limit of one line of a case
ROUNDS = (3, 100)  # minimum and maximum
MIN_COMPILED = 64 << 20  # least bytes of a target for torch.compile


@dataclass(frozen=True, slots=True)
class Growth:
    """A growth: factor on both axes, optimizer state, twin noise, and whether the index map is random or in runs."""

    factor: float
    state: str
    noise: float
    random: bool = False


@dataclass(frozen=True)
class Random:
    """A width method for this bench only: every target coordinate copies a random source coordinate."""

    noise: float
    seed: int = 0

    def widen(self, spec: ModelSpec, sizes: Mapping[str, int]) -> WidthDecision:
        """Draw an index map for every space, with an even split over the copies."""
        draw = random.Random(self.seed)
        maps: dict[str, IndexMap] = {}
        stream_scales: dict[str, StreamScale] = {}
        for space, streams in spec.spaces.items():
            n_source, n_target = space_size(space, spec.sizes), space_size(space, sizes)
            indices = [*range(n_source), *draw.choices(range(n_source), k=n_target - n_source)]
            draw.shuffle(indices)
            maps[space] = IndexMap.of(indices, n_source)
            split = maps[space].per_copy(lambda n: 1 / n, pad=1.0)
            stream_scales |= dict.fromkeys(streams, StreamScale(Vector.full(1.0, n_target), split))
        return WidthDecision(maps, stream_scales, self.noise)


MAPS = {"x1.5": (1.5, False), "x2": (2.0, False), "x3": (3.0, False), "random x2": (2.0, True)}
CASES = {
    f"{how} {state} noise={noise:g}": Growth(factor, state, noise, is_random)
    for how, (factor, is_random) in MAPS.items()
    for state in STATE
    for noise in (0.0, 1.0)
}
KIB, MIB = 1 << 10, 1 << 20
SIZES = {  # bytes of the target's weight in float32
    "quick": [64 * KIB, 256 * KIB],
    "cpu": [64 * KIB, MIB, 16 * MIB, 128 * MIB],
    "gpu": [64 * KIB, MIB, 16 * MIB, 64 * MIB, 128 * MIB, 1024 * MIB],
}
ALL_SIZES = {  # cases that run at every size; other cases run at ONE_SIZE
    "quick": ["x2 adam noise=0"],
    "cpu": ["x2 adam noise=0", "x2 adam noise=1", "random x2 adam noise=0"],
    "gpu": [case for case in CASES if "adam" in case],
}
ONE_SIZE = {"quick": 64 * KIB, "cpu": 16 * MIB, "gpu": 128 * MIB}
QUICK = ["x2 adam noise=0", "x1.5 weights noise=1", "random x2 adam noise=0"]


@dataclass(frozen=True, slots=True)
class Ready:
    """A checked case with its tensors; ``jobs`` are (source, target, order in the gradient)."""

    plan: GrowthPlan
    tensors: Tensors
    jobs: list[tuple[Tensor, Tensor, int]]
    rows: Tensor
    cols: Tensor
    scales: list[tuple[Tensor | None, Tensor | None]]

    @property
    def sources(self) -> list[Tensor]:
        return [source for source, _, _ in self.jobs]

    @property
    def targets(self) -> list[Tensor]:
        return [target for _, target, _ in self.jobs]


def chosen(scope: str) -> Iterator[tuple[str, int, str]]:
    """Yield case, bytes of its target and dtype for a scope."""
    for case in QUICK if scope == "quick" else CASES:
        every = case in ALL_SIZES[scope]
        for dtype in DTYPES:
            sizes = SIZES[scope] if every and dtype == "fp32" else [ONE_SIZE[scope]]
            for n_bytes in sizes if scope != "quick" or dtype == "fp32" else []:
                yield case, n_bytes, dtype


def lines(n_bytes: int) -> list[tuple[str, str]]:
    """Return backend and phase of every line that is timed for a case."""
    compiled = [("torch.compile", ALLOCATES)] if GPU and n_bytes >= MIN_COMPILED else []
    return [line for line in LINES if line[0] != "torch.compile"] + compiled


@lru_cache(maxsize=1)
def ready(case: str, n_bytes: int, dtype: str) -> Ready | str:
    """Build and check a case; return the case, or the errors as text."""
    growth = CASES[case]
    n_target = sqrt(n_bytes / 4)
    n_source = max(16, round(n_target / growth.factor / 16) * 16)
    sizes = {"hidden": int(n_source * growth.factor), "ffn": int(n_source * growth.factor)}
    spec = ModelSpec(
        "one tensor",
        {"hidden": n_source, "ffn": n_source},
        linear(NAME.removesuffix(".weight"), reads="residual", writes="ffn", bias=False),
        non_affine_norms={},
    )
    width: WidthMethod = Random(growth.noise) if growth.random else Lossless(noise=growth.noise)
    plan = build(spec, sizes, width=width, depth=IdentityBlocks())
    torch.manual_seed(0)
    shape = (n_source, n_source)
    weight = torch.randn(shape, device=DEVICE).to(DTYPES[dtype])
    state: dict[str, object] = {
        key: torch.rand(shape, device=DEVICE) for key in STATE[growth.state]
    }
    tensors = Tensors({NAME: weight}, {}, {NAME: state} if state else {})
    staged = execute(plan, tensors, LAW.rules)
    grown = [staged.values[NAME], *(staged.states[NAME][key] for key in state)]
    jobs = [
        (source, target, order)
        for order, (source, target) in enumerate(zip([weight, *state.values()], grown, strict=True))
        if isinstance(source, Tensor) and isinstance(target, Tensor)
    ]
    maps = [axis.index_map.indices for axis in plan.axis_maps(plan.tensors[0])]
    rows, cols = (torch.tensor(m, device=DEVICE) for m in maps)
    shares = [1 / torch.bincount(m, minlength=n_source)[m].float() for m in (rows, cols)]
    scales = [
        (None, shares[1]) if order == 0 else (shares[0] ** order, None) for _, _, order in jobs
    ]
    prepared = Ready(plan, tensors, jobs, rows, cols, scales)
    return "; ".join(wrong(prepared, growth.noise)) or prepared


def wrong(case: Ready, noise: float) -> Iterator[str]:
    """Compare grown tensors with plain indexing; noise must keep the sums over the copies of a column. Yield the errors."""
    for (source, target, order), scales in zip(case.jobs, case.scales, strict=True):
        name, rounding = ("weight", *STATE["adam"])[order], ROUNDING[target.dtype]
        actual = target.float()
        if noise and order == 0:
            actual = torch.zeros(len(case.rows), source.shape[1], device=DEVICE).index_add_(
                1, case.cols, actual
            )
            expected, tolerance = source.float()[case.rows], 4 * rounding
        else:
            expected, tolerance = source.float()[case.rows][:, case.cols], rounding
            expected = _scaled(expected, *scales)
        worst = float((actual - expected).abs().max())  # NaN is not below any limit
        if not worst <= tolerance * float(expected.abs().max()):
            yield f"{name} is off by {worst:.3g}"


def _scaled(values: Tensor, by_row: Tensor | None, by_col: Tensor | None) -> Tensor:
    values = values if by_row is None else values * by_row[:, None].to(values.dtype)
    return values if by_col is None else values * by_col.to(values.dtype)


def gathered(
    sources: Sequence[Tensor],
    rows: Tensor,
    cols: Tensor,
    scales: Sequence[tuple[Tensor | None, Tensor | None]],
) -> list[Tensor]:
    """Grow by plain PyTorch: two ``index_select`` and a multiply."""
    return [
        _scaled(source.index_select(0, rows).index_select(1, cols), *both)
        for source, both in zip(sources, scales, strict=True)
    ]


def _warm(case: Ready) -> Callable[[], object]:
    if GPU:
        from growkern.kernels.expand import expand
    else:
        expand = reference.expand
    row = case.plan.tensors[0]
    tiler = Tiler(case.plan)
    jobs = [tiler.job(row, *job[:2], RULES[job[2]]) for job in case.jobs]
    return partial(expand, grouped(tiler, jobs).groups)


def _cold(case: Ready) -> Callable[[], object]:
    return lambda: execute(case.plan, case.tensors, LAW.rules)


def _index_select(case: Ready) -> Callable[[], object]:
    return partial(gathered, case.sources, case.rows, case.cols, case.scales)


def _compiled(case: Ready) -> Callable[[], object]:
    torch.compiler.reset()  # compiles a kernel for every case, not one for all shapes
    compiled = torch.compile(gathered, dynamic=False)
    return partial(compiled, case.sources, case.rows, case.cols, case.scales)


def _cold_roof(case: Ready) -> Callable[[], object]:
    if GPU:
        return harness.roof(case.sources, case.targets)

    def copy() -> object:
        targets = [torch.empty_like(target) for target in case.targets]
        return harness.roof(case.sources, targets)()

    return copy


LINES: dict[tuple[str, str], Callable[[Ready], Callable[[], object]]] = {
    (OURS, "warm"): _warm,
    (harness.ROOF, "warm"): lambda case: harness.roof(case.sources, case.targets),
    (OURS, "cold"): _cold,
    (harness.ROOF, "cold"): _cold_roof,
    ("index_select", ALLOCATES): _index_select,
    ("torch.compile", ALLOCATES): _compiled,
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize by all lines of the scope ``--bench-scope``; the lines of a case are consecutive."""
    scope = str(metafunc.config.getoption("--bench-scope"))
    all_lines = [(*case, *line) for case in chosen(scope) for line in lines(case[1])]
    ids = [
        f"{case}, {harness.size_text(n)}, {dtype}, {backend}, {phase}"
        for case, n, dtype, backend, phase in all_lines
    ]
    metafunc.parametrize(("case", "size", "dtype", "backend", "phase"), all_lines, ids=ids)


@pytest.mark.benchmark(timer=harness.device_timer())
def test_expand(benchmark, request, case: str, size: int, dtype: str, backend: str, phase: str):
    """Time one line of one case, unless the case is red."""
    prepared = ready(case, size, dtype)
    assert isinstance(prepared, Ready), f"not timed: {prepared}"
    call = LINES[backend, phase](prepared)
    call()
    seconds, peak = harness.measured(call, room=2 * harness.n_bytes(prepared.targets))
    allowed = SECONDS[str(request.config.getoption("--bench-scope"))]
    rounds = min(max(ROUNDS[0], int(allowed / seconds)), ROUNDS[1])

    benchmark.pedantic(call, setup=harness.flush, rounds=rounds)

    benchmark.extra_info |= {
        "op": "expand",
        "case": case,
        "dtype": dtype,
        "backend": backend,
        "phase": phase,
        "tensor_bytes": harness.n_bytes(prepared.targets[:1]),
        "moved": harness.n_bytes([*prepared.sources, *prepared.targets]),
        "peak": peak,
    }
