"""AdamW's torch path and kernel equal a loop over elements, with and without slices; on a CPU the kernel runs in Triton's interpreter."""

import copy
import math
import os
from dataclasses import dataclass

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

import pytest
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from growkern.kernels import adamw as kernel
from growkern.kernels import adamw_table as table
from growkern.kernels.adamw_tile import _risen
from growkern.optimizer import adamw_torch as reference
from growkern.optimizer.adamw_torch import SLICES, Hyper, Update, arithmetic, length, sizes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# dtypes of parameter and moments
KINDS = [(F64, F64), (F32, F32), (BF16, F32), (BF16, BF16), (F16, F32)]
SHAPES = [
    (),
    (1,),
    (5,),
    (129,),
    (3, 4),
    (17, 128),
    (9, 132),
    (2, 3, 5),
    (2, 1, 2, 3),
    (0, 4),
    (4, 0),
]
HYPER = Hyper(lr=1e-2, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, maximize=False)


@dataclass(frozen=True)
class Case:
    """A parameter in the middle of training: ``keys`` names its slices, ``skew`` is its offset from 16-byte alignment, in elements."""

    shape: tuple[int, ...]
    kind: tuple[torch.dtype, torch.dtype] = (F32, F32)
    keys: tuple[str, ...] = ()
    amsgrad: bool = False
    hyper: Hyper = HYPER
    step: int = 7
    skew: int = 0
    seed: int = 0

    def build(self) -> Update:
        g = torch.Generator().manual_seed(self.seed)
        n = math.prod(self.shape)

        def tensor(values: Tensor, dtype: torch.dtype) -> Tensor:
            memory = torch.zeros(n + self.skew, dtype=dtype, device=DEVICE)
            return memory[self.skew :].view(self.shape).copy_(values.view(self.shape))

        p, grad, m = (
            tensor(torch.randn(n, generator=g), d) for d in (*self.kind[:1] * 2, self.kind[1])
        )
        v, top = (tensor(torch.rand(n, generator=g), self.kind[1]) for _ in range(2))
        slices = {key: self.vector(key, g) for key in self.keys}
        step = torch.tensor(float(self.step))
        return Update(p, grad, m, v, top if self.amsgrad else None, step, self.hyper, slices)

    def vector(self, key: str, g: torch.Generator) -> Tensor:
        n, dtype = length(key, self.shape), arithmetic(self.kind[0])
        if key == "rewarm":
            return torch.tensor([3.0, 4.0], dtype=dtype, device=DEVICE)
        if key.startswith("born"):  # a birth comes before the step: an update counts at least 1
            return torch.randint(0, self.step, (n,), generator=g).to(DEVICE, dtype)
        return (torch.rand(n, generator=g) + 0.5).to(DEVICE, dtype)


def cases(shapes: list[tuple[int, ...]]) -> st.SearchStrategy[Case]:
    hypers = st.builds(
        Hyper,
        lr=st.sampled_from([0.0, 1e-2, 3.0]),
        beta1=st.sampled_from([0.0, 0.3, 0.9]),
        beta2=st.sampled_from([0.0, 0.95, 0.999]),
        eps=st.sampled_from([1e-8, 1e-2]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        maximize=st.booleans(),
    )
    keys = st.lists(st.sampled_from(SLICES), unique=True).map(tuple)
    return st.builds(
        Case, st.sampled_from(shapes), st.sampled_from(KINDS), st.just(()) | keys | st.just(SLICES), st.booleans(), hypers,
        st.sampled_from([1, 2, 7, 1000, 10**6]), st.sampled_from([0, 0, 1]), st.integers(0, 2**32),
    )  # fmt: skip


def clone(u: Update) -> Update:
    return copy.deepcopy(u)


def oracle(u: Update) -> dict[str, list[float]]:
    """Compute AdamW's formula element by element in Python's floats."""
    h, found = u.hyper, {name: [] for name in ("p", "exp_avg", "exp_avg_sq", "top", "size")}
    n_cols = sizes(u.p.shape)[1]
    values = {k: v.tolist() for k, v in u.slices.items()}
    flat = [t.double().flatten().tolist() for t in (u.p, u.grad, u.exp_avg, u.exp_avg_sq)]
    tops = (
        [0.0] * u.p.numel()
        if u.max_exp_avg_sq is None
        else u.max_exp_avg_sq.double().flatten().tolist()
    )
    for k, (p, g, m, v, top) in enumerate(zip(*flat, tops, strict=True)):
        i, j = divmod(k, n_cols)

        def at(name: str, i=i, j=j) -> tuple[float, float]:
            neutral = 0.0 if name == "born" else 1.0
            rows, cols = values.get(f"{name}_rows"), values.get(f"{name}_cols")
            return neutral if rows is None else rows[i], neutral if cols is None else cols[j]

        born = max(at("born"))
        t = u.step.item() - born
        lr = h.lr * math.prod(at("lr"))
        if born > 0 and "rewarm" in values:
            rho, tau = values["rewarm"]
            lr *= 1 + (rho - 1) * min(t / tau, 1)
        g = -g if h.maximize else g
        m = h.beta1 * m + (1 - h.beta1) * g
        v = h.beta2 * v + (1 - h.beta2) * g * g
        top = v if u.max_exp_avg_sq is None else max(top, v)
        denominator = math.sqrt(top) / math.sqrt(1 - h.beta2**t) + h.eps * math.prod(at("eps"))
        change = lr / (1 - h.beta1**t) * m / denominator if denominator else math.nan
        new = p * (1 - h.lr * h.weight_decay * math.prod(at("decay"))) - change
        size = (abs(lr) / (1 - h.beta1**t)) * (1 + abs(g)) / (denominator or 1)
        row = (new, m, v, top, abs(p) + abs(change) + size)
        for name, x in zip(found, row, strict=True):
            found[name].append(x)
    return found


def check(actual: Update, expected: dict[str, list[float]]) -> None:
    """Assert equality up to the rounding of a few operations and of the store."""
    exact = {F64: 2e-13, F32: 2e-6}[
        arithmetic(actual.p.dtype)
    ]  # float32's 1 - b**t keeps its digits, float64's loses three
    for name in ("p", "exp_avg", "exp_avg_sq", "top"):
        t = actual.max_exp_avg_sq if name == "top" else getattr(actual, name)
        if t is None:
            continue
        want = torch.tensor(expected[name], dtype=F64)
        scale = torch.tensor(expected["size"], dtype=F64) if name == "p" else want.abs() + 3.0
        stored = torch.finfo(t.dtype).eps if t.itemsize < 4 else 0.0
        limit = exact * scale + stored * want.abs() + (2e-7 if t.dtype == F16 else 0)
        worst = ((t.double().cpu().flatten() - want).abs() / limit.clamp(min=1e-30)).nan_to_num(9e9)
        assert worst.numel() == 0 or worst.max() <= 1, f"{name}: {worst.max():.3g} times the limit"


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(case=cases([s for s in SHAPES if s != (17, 128)]))
def test_the_torch_path_computes_the_formula(case):
    u = case.build()
    expected = oracle(u)

    reference.adamw([u])

    check(u, expected)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(case=cases([s for s in SHAPES if s != (17, 128)]))
def test_the_kernel_computes_the_formula(case):
    u = case.build()
    expected = oracle(u)

    kernel.adamw([u], table.Table())

    check(u, expected)
    assert torch.equal(u.grad, case.build().grad)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(many=st.lists(cases(SHAPES), max_size=8))
def test_the_kernel_updates_many_tensors_of_many_kinds(many):
    built = [case.build() for case in many]
    expected = [oracle(u) for u in built]

    kernel.adamw(built, table.Table())

    for u, want in zip(built, expected, strict=True):
        check(u, want)


def test_blocks_of_rows_make_no_difference(monkeypatch):
    case = Case((37, 5), keys=SLICES)
    whole, parts = case.build(), case.build()

    reference.adamw([whole])
    monkeypatch.setattr(reference, "BLOCK", 20)
    reference.adamw([parts])

    assert torch.equal(whole.p, parts.p) and torch.equal(whole.exp_avg_sq, parts.exp_avg_sq)


@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 5)])
def test_tensors_of_any_layout_are_updated_by_the_torch_path(shape):
    plain = Case(shape, keys=SLICES).build()
    turned = clone(plain)._replace(
        p=plain.p.clone().mT.contiguous().mT, grad=plain.grad.clone().mT.contiguous().mT
    )
    turned = turned._replace(exp_avg=plain.exp_avg.repeat_interleave(2, -1)[..., ::2])

    for u in (plain, turned):
        reference.adamw([u])

    for a, b in zip(plain[:4], turned[:4], strict=True):
        assert torch.equal(a, b)


def test_an_expanded_gradient_is_only_read():
    plain = Case((3, 4), keys=SLICES).build()
    plain.grad.fill_(0.5)
    expanded = clone(plain)._replace(grad=torch.full((), 0.5, device=DEVICE).expand(3, 4))

    for u in (plain, expanded):
        reference.adamw([u])

    assert torch.equal(plain.p, expanded.p)
    assert expanded.grad.stride() == (0, 0) and (expanded.grad == 0.5).all()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize(("found", "scale"), [(0.0, 8.0), (1.0, 8.0), (None, 8.0), (0.0, None)])
@pytest.mark.parametrize("run", ["torch", "kernel"])
def test_gradients_are_unscaled_and_infinite_ones_skipped(run, found, scale, amsgrad):
    scaled = Case((9, 5), keys=SLICES[:4], amsgrad=amsgrad).build()
    before, plain = clone(scaled), clone(scaled)
    scaled.grad.mul_(scale or 1)
    scaler = [None if x is None else torch.tensor(x, device=DEVICE) for x in (scale, found)]

    if run == "torch":
        reference.adamw([scaled], *scaler)
    else:
        kernel.adamw([scaled], table.Table(), *scaler)

    reference.adamw([plain])
    for a, b in zip(scaled[:4], (before if found else plain)[:4], strict=True):
        if not (found and a is scaled.grad):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class OnDevice(Tensor):
    """A step tensor that claims to be on a GPU, where fused param groups keep the step."""

    is_cuda = True


@pytest.mark.parametrize("kind", [(F32, F32), (F64, F64)])
@pytest.mark.parametrize("keys", [(), SLICES])
def test_the_kernel_reads_a_step_on_the_device(kind, keys):
    u = Case((5, 8), kind, keys).build()
    expected = oracle(u)
    step = u.step.to(DEVICE).as_subclass(OnDevice) if INTERPRETED else u.step.to(DEVICE)

    kernel.adamw([u._replace(step=step)], table.Table())

    check(u, expected)


def test_the_table_stays_until_a_tensor_moves_or_changes(monkeypatch):
    built: list[int] = []
    original = table.Table._build
    monkeypatch.setattr(
        table.Table, "_build", lambda self, *a: (built.append(1), original(self, *a))
    )
    u, kept = Case((4, 8), keys=("lr_rows", "born_cols")).build(), table.Table()
    held: list[Update] = []  # keeps tensors alive, so that no address is used again
    n_built = 1
    changes = [
        (False, {}),
        (False, dict(grad=u.grad.clone(), step=u.step + 1, hyper=u.hyper._replace(lr=0.5))),
        *((True, {key: getattr(u, key).clone()}) for key in ("p", "exp_avg", "exp_avg_sq")),
        (True, dict(slices={key: v.clone() for key, v in u.slices.items()})),
        (True, dict(slices={"lr_rows": u.slices["lr_rows"]})),
        (True, dict(slices={})),
        (True, dict(max_exp_avg_sq=torch.ones_like(u.p))),
        (True, dict(max_exp_avg_sq=torch.ones_like(u.p))),
    ]
    kernel.adamw([u], kept)

    for is_new, change in changes:
        held.append(u)
        u, n_built = u._replace(**change), n_built + is_new
        expected = oracle(u)
        kernel.adamw([u], kept)
        check(u, expected)
        assert len(built) == n_built


def test_a_table_whose_making_failed_is_made_again(monkeypatch):
    u, kept = Case((4, 8)).build(), table.Table()
    kernel.adamw([u], kept)
    with monkeypatch.context() as patch:
        patch.setattr(table, "math", lambda dtype: 1 / 0)  # the table fails half-way
        with pytest.raises(ZeroDivisionError):
            kernel.adamw([u._replace(p=u.p.clone())], kept)
    expected = oracle(u)

    kernel.adamw([u], kept)

    check(u, expected)


@settings(max_examples=100, deadline=None)
@given(case=cases(SHAPES))
def test_stretches_cover_a_tensor_once_and_are_wide_where_aligned(case):
    u = case.build()
    n_wide = 16 // min(u.p.itemsize, u.exp_avg.itemsize)

    found = list(table.stretches(u, kernel.block_c(u.p.itemsize)))

    covered = [k for rows, cols, start, _ in found for k in range(start, start + rows * cols)]
    assert covered == list(range(u.p.numel()))
    for _, cols, start, wide in found:
        if wide:
            assert cols % n_wide == 0
            assert not any((t.data_ptr() + start * t.itemsize) % 16 for t in u[:4])
    if not case.keys and not case.skew:
        assert sum(rows * cols for rows, cols, _, wide in found if not wide) < n_wide


@triton.jit
def risen_kernel(y_ptr, out_ptr, N: tl.constexpr, MATH: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out_ptr + at, _risen(tl.load(y_ptr + at), MATH))


def test_the_bias_correction_keeps_its_digits():
    y = torch.logspace(-6, 4, 512, dtype=F64).to(DEVICE, F32)
    found = torch.empty_like(y)

    risen_kernel[(1,)](y, found, N=512, MATH=tl.float32)

    torch.testing.assert_close(found.double(), -torch.expm1(-y.double()), rtol=3e-7, atol=0)


@pytest.mark.parametrize("run", ["torch", "kernel"])
def test_nan_reaches_parameter_and_state_as_in_torch(run):
    u = Case((2, 8), keys=("lr_rows",), amsgrad=True).build()
    u.grad[1, 3] = float("nan")
    p = torch.nn.Parameter(u.p.clone())
    p.grad = u.grad.clone()
    theirs = torch.optim.AdamW([p], amsgrad=True)
    theirs.step()
    state = theirs.state[p]

    if run == "torch":
        reference.adamw([u])
    else:
        kernel.adamw([u], table.Table())

    assert p.isnan().any()
    for t, their in (
        (u.p, p),
        *((getattr(u, key), state[key]) for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")),
    ):
        assert torch.equal(t.isnan(), their.isnan())


def test_one_launch_per_dtypes(monkeypatch):
    found: list[dict] = []
    original = kernel.launch_options
    monkeypatch.setattr(kernel, "launch_options", lambda *a: found.append(a) or original(*a))
    built = [
        Case((3, 4), kind, keys, hyper=HYPER._replace(lr=lr)).build()
        for lr, kind in enumerate(KINDS[:3])
        for keys in ((), SLICES, ("lr_rows",))
    ]

    kernel.adamw(built, table.Table())

    assert len(found) == 3 and all(sliced for _, sliced, _ in found)
