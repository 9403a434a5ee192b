"""``growkern.optim.AdamW`` is torch's AdamW where a parameter has no slices; slices scale updates per row and column, and are saved."""

import copy
import io
import os
import pickle
import weakref
from unittest.mock import patch

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of triton

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Linear, Parameter

from growkern.optim import AdamW
from growkern.optimizer import adamw as module
from growkern.optimizer.adamw_torch import SLICES, length

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SHAPES = [(), (3,), (4, 6), (2, 3, 4)]
OPTIONS = {
    "default": {},
    "amsgrad": dict(amsgrad=True),
    "maximize": dict(maximize=True),
    "no decay": dict(weight_decay=0.0),
    "single": dict(foreach=False),
    "foreach": dict(foreach=True),
    "fused": dict(fused=True),
    "tensor lr": dict(lr=torch.tensor(0.01, dtype=F64), foreach=False),
}


def parameters(dtype: torch.dtype = F32, shapes=SHAPES, seed: int = 0) -> list[Parameter]:
    g = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=g, dtype=F64).to(DEVICE, dtype)) for s in shapes]


def train(optims: list[torch.optim.Optimizer], n: int = 3, seed: int = 1, missing: int = 0) -> None:
    """Step all optimizers on equal gradients; where ``missing`` is not 0, some gradients are None."""
    g = torch.Generator().manual_seed(seed)
    for k in range(n):
        groups = zip(*(o.param_groups for o in optims), strict=True)
        for i, same in enumerate(
            ps for gs in groups for ps in zip(*(x["params"] for x in gs), strict=True)
        ):
            grad = torch.randn(same[0].shape, generator=g, dtype=F64)
            for p in same:
                p.grad = None if missing and (i + k) % missing == 0 else grad.to(p)
        for o in optims:
            o.step()


def assert_same(
    a: torch.optim.Optimizer, b: torch.optim.Optimizer, rtol: float = 0, slices: bool = False
) -> None:
    """Assert that param groups, parameters and state are equal, bit for bit where ``rtol`` is 0."""
    for ga, gb in zip(a.param_groups, b.param_groups, strict=True):
        assert {k: v for k, v in ga.items() if k != "params"} == {
            k: v for k, v in gb.items() if k != "params"
        }
        for p, q in zip(ga["params"], gb["params"], strict=True):
            torch.testing.assert_close(p, q, rtol=rtol, atol=rtol)
            sa, sb = (
                {k: v for k, v in o.state.get(x, {}).items() if slices or k not in SLICES}
                for o, x in ((a, p), (b, q))
            )
            assert sa.keys() == sb.keys()
            for key in sa:
                torch.testing.assert_close(sa[key], sb[key], rtol=rtol, atol=rtol)


def groups(ps: list[Parameter]) -> list[dict]:
    return [
        dict(params=ps[:1]),
        dict(params=ps[1:3], lr=0.5, weight_decay=0.3),
        dict(params=ps[3:], betas=(0.5, 0.6)),
    ]


def vectors(p: Tensor, keys=SLICES, value: float | None = None) -> dict[str, Tensor]:
    """Return slices of random factors, or neutral slices where ``value`` is given."""
    g = torch.Generator().manual_seed(3)
    found = {key: torch.rand(length(key, p.shape), generator=g) + 0.5 for key in keys}
    return {
        k: torch.zeros_like(v)
        if k.startswith("born")
        else v
        if value is None
        else torch.ones_like(v)
        for k, v in found.items()
    }


@pytest.fixture
def launched(monkeypatch) -> list[int]:
    """Send every parameter through the kernel, as on a GPU; return the number of parameters of each launch."""
    found: list[int] = []
    from growkern.kernels import adamw as kernel

    original = kernel.adamw
    if INTERPRETED:
        monkeypatch.setattr(
            module, "_fits", lambda p, state, sliced: p.dtype in module.KERNEL_DTYPES
        )
    monkeypatch.setattr(kernel, "adamw", lambda us, *a: (found.append(len(us)), original(us, *a)))
    return found


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the kernel steps, which rounds otherwise")
@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([F64, F32, BF16]),
    option=st.sampled_from(sorted(OPTIONS)),
    missing=st.sampled_from([0, 2, 3]),
    split=st.booleans(),
    shapes=st.lists(st.sampled_from([*SHAPES, (0, 3)]), min_size=1, max_size=5),
    n=st.integers(1, 4),
    block=st.sampled_from([5, module.BLOCK]),
)
def test_without_slices_it_is_torchs_bit_for_bit(dtype, option, missing, split, shapes, n, block):
    a, b = parameters(dtype, shapes), parameters(dtype, shapes)
    ours, theirs = (
        kind(groups(ps) if split else ps, **copy.deepcopy(OPTIONS[option]))
        for kind, ps in ((AdamW, a), (torch.optim.AdamW, b))
    )

    with patch.object(module, "BLOCK", block):
        train([ours, theirs], n, missing=missing)

    assert_same(ours, theirs)


def test_large_tensors_train_in_blocks_bit_for_bit():
    shapes = [(700, 801), (3, 5)]
    a, b = parameters(F32, shapes), parameters(F32, shapes)
    optims = [AdamW(a), torch.optim.AdamW(b)]

    train(optims, 3)

    assert_same(*optims)


@pytest.mark.slow
@pytest.mark.parametrize("option", [o for o in OPTIONS if o != "tensor lr"])
@pytest.mark.parametrize("dtype", [F64, F32])
def test_the_kernel_trains_as_torch_does(launched, option, dtype):
    a, b = parameters(dtype), parameters(dtype)
    ours, theirs = (
        AdamW(groups(a), **OPTIONS[option]),
        torch.optim.AdamW(groups(b), **OPTIONS[option]),
    )

    train([ours, theirs], 4, missing=3)

    assert launched and max(launched) <= 4
    assert_same(ours, theirs, rtol={F64: 1e-12, F32: 2e-5}[dtype])


def misaligned(p):
    p.grad = torch.empty(p.numel() + 1, device=DEVICE)[1:].view(p.shape).copy_(p.grad)


def other_layout(p):
    p.grad = p.grad.T.contiguous().T


def replaced_moment(optim, ps):
    optim.state[ps[0]]["exp_avg"] = optim.state[ps[0]]["exp_avg"].clone() * 2


def moved_moment(optim, ps):
    optim.state[ps[0]]["exp_avg_sq"].data = optim.state[ps[0]]["exp_avg_sq"].clone() * 2


def counted_on(optim, ps):
    optim.state[ps[1]]["step"] += 3


def counted_unseen(optim, ps):
    optim.state[ps[1]]["step"].data.fill_(1000.0)


def counted_in_numpy(optim, ps):
    optim.state[ps[1]]["step"].numpy()[...] = 1000.0


def counted_together(optim, ps):
    for p in ps:
        optim.state[p]["step"] = optim.state[ps[0]]["step"]


def transposed_weight(optim, ps):
    ps[0].data = ps[0].data.t()


def transposed_moment(optim, ps):
    optim.state[ps[0]]["exp_avg"].t_()


def counted_anew(optim, ps):
    optim.state[ps[1]]["step"] = torch.tensor(7.0)


def replaced_parameter(optim, ps):
    ps[0] = optim.param_groups[0]["params"][0] = with_gradient(
        Parameter(ps[0].detach().clone()), ps[0]
    )


def another_group(optim, ps):
    ps.append(with_gradient(Parameter(ps[0].detach().clone()), ps[0]))
    optim.add_param_group({"params": [ps[-1]], "lr": 0.5})


def with_gradient(p, like):
    p.grad = like.grad.clone()
    return p


def loaded(optim, ps):
    optim.load_state_dict(copy.deepcopy(optim.state_dict()))


def without_state(optim, ps):
    del optim.state[ps[0]]


def another_order(optim, ps):
    optim.param_groups[0]["params"].reverse()


def with_slices(optim, ps):
    optim.set_slices(ps[0], lr_rows=[0.5] * len(ps[0]))


def counted_in(dtype):
    def change(optim, ps):
        for p in ps:
            step = optim.state[p]["step"]
            step.data = step.data.to(dtype)

    return change


CHANGES = {
    "nothing": lambda optim, ps: None,
    "lr": lambda optim, ps: optim.param_groups[0].update(lr=0.03),
    "betas": lambda optim, ps: optim.param_groups[0].update(betas=(0.5, 0.6)),
    "decay": lambda optim, ps: optim.param_groups[0].update(weight_decay=0.3, eps=1e-3),
    "maximize": lambda optim, ps: optim.param_groups[0].update(maximize=True),
    "capturable": lambda optim, ps: optim.param_groups[0].update(differentiable=False, foreach=True),
    "no gradient": lambda optim, ps: setattr(ps[1], "grad", None),
    "misaligned gradient": lambda optim, ps: misaligned(ps[0]),
    "gradient of another layout": lambda optim, ps: other_layout(ps[0]),
    "weights moved": lambda optim, ps: setattr(ps[0], "data", ps[0].data.clone() * 2),
    "weights written": lambda optim, ps: ps[0].data.mul_(2),
    "moment replaced": replaced_moment,
    "moment moved": moved_moment,
    "counted on": counted_on,
    "counted anew": counted_anew,
    "counted unseen": counted_unseen,
    "counted in numpy": counted_in_numpy,
    "counted together": counted_together,
    "counted in float64": counted_in(torch.float64),
    "counted in bfloat16": counted_in(torch.bfloat16),
    "weights transposed": transposed_weight,
    "moment transposed": transposed_moment,
    "parameter replaced": replaced_parameter,
    "another group": another_group,
    "another order": another_order,
    "loaded": loaded,
    "without state": without_state,
    "slices": with_slices,
}  # fmt: skip
NEVER_AGAIN = with_slices, transposed_weight, transposed_moment, CHANGES["counted in bfloat16"]


QUICK = "nothing", "lr", "weights written", "slices"


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, change in CHANGES.items()
    ],
)
def test_a_step_that_repeats_the_one_before_writes_the_bits_of_a_full_step(
    launched, change, monkeypatch
):
    """Steps repeat until something changes, and repeat again after it."""
    from growkern.kernels import adamw as kernel

    def fits(p, state, sliced):
        return all(t.is_contiguous() for t in (p, p.grad, *state.values()))

    if INTERPRETED:
        monkeypatch.setattr(module, "_fits", fits)
    repeated, again = [], kernel.adamw_again
    monkeypatch.setattr(kernel, "adamw_again", lambda *a: (repeated.append(1), again(*a)))
    shapes = [(6, 6), (5,), (8, 16)]
    (a, ours), (b, full) = ((ps, AdamW(ps, lr=0.1)) for ps in (parameters(F32, shapes), parameters(F32, shapes)))  # fmt: skip

    for k in range(7):
        for ps, optim in ((a, ours), (b, full)):
            g = torch.Generator().manual_seed(k)
            for p in ps:
                p.grad = torch.randn(p.shape, generator=g).to(DEVICE)
            if k == 4:
                change(optim, ps)
        n = len(repeated)
        ours.step()
        if k in (1, 2, 3) or (k == 6 and change not in NEVER_AGAIN):
            assert len(repeated) == n + 1, k
        full.__dict__.pop("_steady", None)
        full.step()
        for p, q in zip(a, b, strict=True):
            assert torch.equal(p, q), k
            for key, value in full.state[q].items():
                assert torch.equal(ours.state[p][key], value), (k, key)


def test_no_step_repeats_one_that_raised(launched, monkeypatch):
    """The table is then of other tensors than those of the last whole step."""
    from growkern.kernels import adamw as kernel

    a, b = (parameters(F32, [(4, 6), (5,)]) for _ in range(2))
    ours, full = AdamW(a, lr=0.1), AdamW(b, lr=0.1)

    def step(k):
        for ps, optim in ((a, ours), (b, full)):
            for i, p in enumerate(ps):
                p.grad = torch.full_like(p, k + i + 1.0)
            if optim is full:
                optim.__dict__.pop("_steady", None)
            optim.step()

    step(0), step(1)
    swapped = a[0].data
    a[0].data = swapped.clone()
    a[0].grad, launch = torch.ones_like(a[0]), kernel._launch
    monkeypatch.setattr(kernel, "_launch", lambda *_: 1 / 0)
    before = [ours.state[p]["step"].clone() for p in a]
    with pytest.raises(ZeroDivisionError):
        ours.step()
    monkeypatch.setattr(kernel, "_launch", launch)
    a[0].data = swapped
    for p, count in zip(a, before, strict=True):
        ours.state[p]["step"].copy_(count)

    step(2), step(3)

    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def test_a_repeated_step_keeps_no_tensor_alive(launched):
    ps = parameters(F32, [(4, 6)])
    optim = AdamW(ps)
    for _ in range(2):
        ps[0].grad = torch.ones_like(ps[0])
        optim.step()
    alive = [weakref.ref(t) for t in (ps[0].grad, *optim.state[ps[0]].values())]

    ps[0].grad = None
    optim.state.clear()

    assert [one() for one in alive] == [None] * 4


@pytest.mark.parametrize("option", OPTIONS)
def test_neutral_slices_change_nothing(option):
    a, b = parameters(F64), parameters(F64)
    ours, theirs = (
        AdamW(a, **copy.deepcopy(OPTIONS[option])),
        torch.optim.AdamW(b, **copy.deepcopy(OPTIONS[option])),
    )
    for p in a:
        ours.set_slices(p, **vectors(p, value=1.0))

    train([ours, theirs], 4, missing=3)

    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_a_factor_for_all_is_another_param_group(backend, request):
    if backend == "kernel":
        request.getfixturevalue("launched")
    a, b = parameters(F64), parameters(F64)
    ours = AdamW(a, lr=0.1, eps=1e-2, weight_decay=0.2)
    theirs = torch.optim.AdamW(b, lr=0.1 / 4, eps=1e-2 * 3, weight_decay=0.2 * 4 * 5)
    for p in a:
        for key, factor in dict(lr_cols=0.25, eps_rows=3.0, decay_cols=5.0).items():
            ours.set_slices(p, **{key: [factor] * length(key, p.shape)})

    train([ours, theirs], 4)

    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_rows_and_columns_born_later_train_like_a_parameter_born_then(backend, request):
    if backend == "kernel":
        request.getfixturevalue("launched")
    old, late = parameters(F64, [(3, 4)])[0], parameters(F64, [(3, 4)], seed=9)[0]
    ours, theirs = AdamW([old], lr=0.1), torch.optim.AdamW([late], lr=0.1)
    train([ours], 5)
    with torch.no_grad():
        old[2], old[:, 3] = late[2], late[:, 3]
        for key in ("exp_avg", "exp_avg_sq"):
            ours.state[old][key][2], ours.state[old][key][:, 3] = 0, 0
    born = [0.0, 0.0, 5.0], [0.0, 0.0, 0.0, 5.0]
    ours.set_slices(old, born_rows=born[0], born_cols=born[1])

    train([ours, theirs], 3)

    torch.testing.assert_close(old[2], late[2], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(old[:, 3], late[:, 3], rtol=1e-12, atol=1e-12)


def test_what_was_born_later_warms_up_from_the_present_rate_to_rho_times_it():
    p = Parameter(torch.zeros(2, 1, dtype=F64, device=DEVICE))
    optim = AdamW([p], lr=1.0, betas=(0.0, 0.0), eps=1e-30, weight_decay=0.0)
    train([optim], 2)
    optim.set_slices(p, born_rows=[0.0, 2.0], rewarm=[3.0, 4.0])
    moved = []

    for _ in range(6):
        before = p.detach().clone()
        train([optim], 1)
        moved.append((p.detach() - before).abs().flatten().tolist())

    expected = [[1.0, 1 + 2 * min(t / 4, 1)] for t in range(1, 7)]
    torch.testing.assert_close(torch.tensor(moved), torch.tensor(expected))


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("saved", [lambda s: s, through_file], ids=["dict", "file"])
@pytest.mark.parametrize(
    "kinds",
    [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)],
    ids=["to torch", "from torch"],
)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_checkpoints_are_exchanged_with_torch(kinds, dtype, saved):
    a = parameters(dtype)
    first = kinds[0](groups(a), amsgrad=True)
    train([first], 3)
    b = [Parameter(p.detach().clone()) for p in a]
    second = kinds[1](groups(b), lr=7.0)

    second.load_state_dict(saved(copy.deepcopy(first.state_dict())))
    assert_same(first, second)
    train([first, second], 3, seed=5)

    assert_same(first, second)


@pytest.mark.parametrize("saved", [lambda s: s, through_file], ids=["dict", "file"])
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
def test_slices_survive_a_checkpoint_unrounded_and_torch_goes_on_without(dtype, saved):
    a, b, c = parameters(dtype), parameters(dtype), parameters(dtype)
    first, second, third = AdamW(groups(a)), AdamW(groups(b)), torch.optim.AdamW(groups(c))
    for p in a:
        first.set_slices(p, **vectors(p))
    loaded = []
    second.register_load_state_dict_post_hook(
        lambda o: loaded.append([o.state[q]["lr_cols"].clone() for q in b])
    )

    second.load_state_dict(saved(first.state_dict()))
    third.load_state_dict(through_file(first.state_dict()))

    assert_same(first, second, slices=True)
    for p, q in zip(a, b, strict=True):
        for key in SLICES:
            given_, found = first.state[p][key], second.state[q][key]
            assert found.dtype == (F64 if dtype == F64 else F32) and torch.equal(given_, found)
            assert given_.data_ptr() != found.data_ptr()
    (seen,) = loaded
    assert all(torch.equal(v, first.state[p]["lr_cols"]) for v, p in zip(seen, a, strict=True))
    # load_state_dict shares the moments of the dict
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    train([first, second], 3)
    assert_same(first, second, slices=True)
    train([third], 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("backend", ["torch", "kernel"])
def test_copies_go_on_alike(copied, backend, request):
    if backend == "kernel":
        request.getfixturevalue("launched")
    optim = AdamW(parameters())
    for p in optim.param_groups[0]["params"][:2]:
        optim.set_slices(p, **vectors(p))
    train([optim], 2)

    other = copied(optim)
    train([optim, other], 2)

    assert_same(optim, other, slices=True)


def test_closures_hooks_and_schedulers_work_as_torchs():
    a, b = parameters(), parameters()
    ours, theirs = AdamW(a, lr=0.1), torch.optim.AdamW(b, lr=0.1)
    ours.set_slices(a[2], **vectors(a[2], value=1.0))
    seen: dict[str, list[str]] = {"ours": [], "theirs": []}
    for name, optim in (("ours", ours), ("theirs", theirs)):
        schedule = torch.optim.lr_scheduler.OneCycleLR(optim, 0.5, total_steps=9)
        optim.register_step_pre_hook(lambda *_, log=seen[name]: log.append("pre"))
        optim.register_step_post_hook(lambda *_, log=seen[name]: log.append("post"))

        def closure(optim=optim, log=seen[name]) -> Tensor:
            log.append("closure")
            optim.zero_grad()
            loss = sum(p.square().sum() for g in optim.param_groups for p in g["params"])
            loss.backward()
            return loss

        for _ in range(3):
            assert optim.step(closure).requires_grad
            schedule.step()

    assert seen["ours"] == seen["theirs"] == ["pre", "closure", "post"] * 3
    assert_same(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_works_as_with_torch(fused, sliced):
    found = []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = Linear(5, 4).to(DEVICE)
        optim = kind(model.parameters(), lr=0.1, fused=fused)
        if sliced and kind is AdamW:
            optim.set_slices(model.weight, **vectors(model.weight, value=1.0))
        scaler = torch.amp.GradScaler(DEVICE, init_scale=64.0)
        for k in range(4):
            optim.zero_grad()
            scaler.scale(
                model(torch.full((2, 5), float("inf") if k == 1 else k + 1.0, device=DEVICE))
                .square()
                .sum()
            ).backward()
            scaler.step(optim)
            scaler.update()
        found.append(optim)

    ours, theirs = found
    assert getattr(ours, "_step_supports_amp_scaling", None) == getattr(
        theirs, "_step_supports_amp_scaling", None
    )
    assert ours.state[ours.param_groups[0]["params"][0]]["step"] == 3
    assert_same(ours, theirs, rtol=1e-5)


def test_what_other_modules_put_in_the_state_is_used_and_state_begins_with_the_first_step():
    a, b = parameters(shapes=[(4, 6)]), parameters(shapes=[(4, 6)])
    direct, through = AdamW(a, amsgrad=True), AdamW(b, amsgrad=True)
    through.set_slices(b[0], lr_rows=[0.5] * 4)
    direct.state[a[0]]["lr_rows"] = torch.full((4,), 0.5, device=DEVICE)

    train([direct, through], 2)

    assert_same(direct, through, slices=True)


def test_none_removes_a_slice_and_the_vector_given_is_copied():
    p = parameters(shapes=[(4, 6)])[0]
    optim, given_ = AdamW([p]), torch.ones(4, device=DEVICE)

    optim.set_slices(p, lr_rows=given_, eps_rows=given_)
    optim.set_slices(p, lr_rows=None, lr_cols=None)
    given_.zero_()

    assert {k for k in optim.state[p] if k in SLICES} == {"eps_rows"}
    assert optim.state[p]["eps_rows"].tolist() == [1.0] * 4


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("option", ["default", "amsgrad", "fused"])
def test_state_begins_as_torchs(option, wide):
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64 if wide else F32)
    try:
        a, b = parameters(), parameters()
        ours, theirs = AdamW(a, lr=0.0, **OPTIONS[option]), torch.optim.AdamW(b, **OPTIONS[option])
        for p, q in zip(a, b, strict=True):
            ours.set_slices(p, lr_cols=[1.0] * length("lr_cols", p.shape))
            q.grad = torch.zeros_like(q)
        theirs.step()
    finally:
        torch.set_default_dtype(before)

    for p, q in zip(a, b, strict=True):
        for key, value in theirs.state[q].items():
            found = ours.state[p][key]
            assert (found.dtype, found.device, found.shape) == (
                value.dtype,
                value.device,
                value.shape,
            )
            assert not found.any()
