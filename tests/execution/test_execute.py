"""``execute`` equals plain loops over elements, for index maps, scales, pads, means, moments and noise."""

import itertools
from dataclasses import replace
from math import prod

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from growkern.execution import axis_runs as sides
from growkern.execution.execute import execute
from growkern.optimizer.state_rules import LAWS
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.planning.index_map import PAD, IndexMap
from growkern.planning.vector import Vector
from growkern.support.named_tensors import Tensors


def plan_of(axes, **row):
    keys = tuple(f"axis {i}" for i in range(len(axes)))
    rows = (TensorRow("w", "w", keys, **row),)
    return GrowthPlan("test", {}, {}, "", "", 7, "exact", dict(zip(keys, axes, strict=True)), rows)


@st.composite
def axes(draw, pad):
    n = draw(st.integers(1, 5))
    kind = draw(st.sampled_from(["identity", "free", "long"]))
    if kind == "identity":
        m = IndexMap.identity(n)
    else:
        length = 90 if kind == "long" else draw(st.integers(1, 9))
        m = IndexMap.of(draw(st.lists(st.integers(-1, n - 1), min_size=length, max_size=length)), n)
    values = st.sampled_from([0.25, 0.5, 1.0, 3.0])
    scales = [
        Vector.of(draw(st.lists(values, min_size=m.n_target, max_size=m.n_target)))
        for _ in range(2)
    ]
    return AxisMap(m, *scales, pad=pad)


def expected(source, axes, order, fill):
    shape = [a.index_map.n_target for a in axes]
    out = torch.empty(shape, dtype=torch.float64)
    scales = [
        (a.weight_scale if order == 0 else a.grad_scale.map(lambda x: x**order)).expanded()
        for a in axes
    ]
    for at in itertools.product(*map(range, shape)):
        where = [a.index_map.indices[i] for a, i in zip(axes, at, strict=True)]
        scale = 1.0
        for s, i in zip(scales, at, strict=True):
            scale *= s[i]
        out[at] = fill if PAD in where else source[tuple(where)] * scale
    return out


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3).flatmap(lambda n: st.tuples(*[axes("zero")] * n)),
    st.booleans(),
    st.booleans(),
)
def test_weights_and_moments_equal_a_loop_over_elements(axes, transposed, scatters):
    assume(prod(a.index_map.n_target for a in axes) < 4000)  # the oracle is a loop
    shape = [a.index_map.n_source for a in axes]
    source = torch.rand(shape, dtype=torch.float64) + 0.5
    if transposed:
        source = source.mT.contiguous().mT if source.dim() > 1 else source
    m, v = torch.rand(shape, dtype=torch.float64), torch.rand(shape, dtype=torch.float64)
    plan = plan_of(axes)
    assume(plan.changes(plan.tensors[0]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sides, "scatters", lambda device: scatters)
        staged = execute(
            plan,
            Tensors(
                {"w": source},
                {"w": m},
                {"w": {"exp_avg": m, "exp_avg_sq": v, "step": torch.tensor(3.0)}},
            ),
            LAWS["torch.optim.adamw.AdamW"].rules,
        )

    copied = expected(v, axes, 2, float("nan"))
    mean = copied[~copied.isnan()].mean() if (~copied.isnan()).any() else torch.tensor(0.0)
    torch.testing.assert_close(
        staged.values["w"], expected(source, axes, 0, 0.0), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(staged.grads["w"], expected(m, axes, 1, 0.0), rtol=1e-13, atol=0)
    torch.testing.assert_close(
        staged.states["w"]["exp_avg"], expected(m, axes, 1, 0.0), rtol=1e-13, atol=0
    )
    torch.testing.assert_close(
        staged.states["w"]["exp_avg_sq"], expected(v, axes, 2, mean.item()), rtol=1e-12, atol=0
    )
    assert "step" not in staged.states["w"]  # step keeps its tensor


def even(n, k):
    m = IndexMap.cyclic(n, k)
    return AxisMap(
        m, m.per_copy(lambda c: 1 / c, 1.0), Vector.full(1.0, k), "random_reader", noise=0.5
    )


def writer(n, k, pad="zero"):
    m = IndexMap.padded(n, k)
    return AxisMap(m, Vector.full(1.0, k), Vector.full(1.0, k), pad)


def test_twin_noise_is_as_strong_as_asked_and_cancels():
    source = torch.randn(64, 96, dtype=torch.float64)

    staged = execute(
        plan_of([writer(64, 128), even(96, 192)]), Tensors({"w": source}), None
    ).values["w"]

    noise = (staged - torch.cat([torch.cat([source, source], 0)] * 2, 1) / 2) * 2
    rms = source.square().mean().sqrt()
    assert (noise[:, :96] + noise[:, 96:]).abs().max() < 1e-12
    assert (
        noise.std() == pytest.approx(0.5 * rms.item(), rel=0.02)
        and abs(noise[:, :96].mean()) < 0.02
    )
    assert not torch.equal(
        noise[:64], noise[64:]
    )  # rows that copy the same row get noise of their own


def test_noise_on_the_reader_axis_of_a_transposed_weight_cancels_too():
    source = torch.randn(96, 64, dtype=torch.float64)

    staged = execute(
        plan_of([even(96, 192), writer(64, 128)]), Tensors({"w": source}), None
    ).values["w"]

    total = staged[:96] + staged[96:]
    assert (total - torch.cat([source, source], 1)).abs().max() < 1e-12
    assert (staged[:96] - staged[96:]).std() > 0.3


def test_odd_copies_and_single_ones_are_handled():
    source = torch.randn(8, 4, dtype=torch.float64)

    three, uneven = (
        execute(plan_of([writer(8, 8), even(4, k)]), Tensors({"w": source}), None).values["w"]
        for k in (12, 6)
    )

    assert (three.view(8, 3, 4).sum(1) - source).abs().max() < 1e-12
    assert (uneven[:, :2] + uneven[:, 4:] - source[:, :2]).abs().max() < 1e-12 and torch.equal(
        uneven[:, 2:4], source[:, 2:4]
    )


def test_pads_of_writers_are_zero_or_the_mean_and_those_of_readers_are_free():
    source = torch.randn(6, 4, dtype=torch.float64)
    free = AxisMap(IndexMap.padded(4, 7), Vector.full(1.0, 7), Vector.full(1.0, 7), "random_reader")

    zero, mean = (
        execute(plan_of([writer(6, 8, pad), writer(4, 4)]), Tensors({"w": source}), None).values[
            "w"
        ]
        for pad in ("zero", "mean")
    )
    drawn = execute(plan_of([writer(6, 6), free]), Tensors({"w": source}), None).values["w"]

    assert torch.equal(zero[:6], source) and (zero[6:] == 0).all()
    torch.testing.assert_close(mean[6:], source.mean(0).expand(2, 4))
    assert torch.equal(drawn[:, :4], source) and (drawn[:, 4:] != 0).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_axes_of_no_coordinates_give_tensors_of_no_elements(backend):
    none = AxisMap(IndexMap.identity(0), Vector.full(1.0, 0), Vector.full(1.0, 0))
    source = torch.zeros(0, 4)

    staged = execute(
        plan_of([none, even(4, 8)]),
        Tensors({"w": source}, {}, {"w": {"exp_avg_sq": source}}),
        LAWS["torch.optim.adamw.AdamW"].rules,
        backend=backend,
    )

    assert staged.values["w"].shape == staged.states["w"]["exp_avg_sq"].shape == (0, 8)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int32])
def test_buffers_of_any_dtype_are_copied(backend, dtype):
    source = torch.randint(0, 2, (4, 6)).to(dtype)

    staged = execute(
        plan_of([writer(4, 8), writer(6, 6)]), Tensors({"w": source}), None, backend=backend
    )

    assert torch.equal(staged.values["w"], torch.cat([source, source]))


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 2)])
def test_constants_fill_tensors_of_any_shape(shape):
    axes = [AxisMap(IndexMap.identity(n), Vector.full(1.0, n), Vector.full(1.0, n)) for n in shape]

    staged = execute(plan_of(axes, constant=0.5), Tensors({"w": torch.ones(shape)}), None)

    assert torch.equal(staged.values["w"], torch.full(shape, 0.5))


def test_centring_takes_the_mean_of_the_weight_and_not_of_its_state():
    source = torch.randn(6, 4, dtype=torch.float64)
    axis = AxisMap(
        IndexMap.padded(6, 8), Vector.full(1.0, 8), Vector.full(1.0, 8), "zero", centered=True
    )

    staged = execute(plan_of([axis, writer(4, 4)]), Tensors({"w": source}, {"w": source}), None)

    torch.testing.assert_close(staged.values["w"][:6], source - source.mean(0))
    assert torch.equal(staged.grads["w"][:6], source)


@pytest.mark.slow
def test_noise_depends_on_seed_name_and_element_alone(monkeypatch):
    source = torch.randn(20, 24)
    plan = plan_of([writer(20, 40), even(24, 48)])
    one = execute(plan, Tensors({"w": source}), None).values["w"]

    (row,) = plan.tensors
    renamed = replace(plan, tensors=(replace(row, name="v"),))
    for name, changed in (("w", replace(plan, seed=8)), ("v", renamed)):
        other = execute(changed, Tensors({"w": source}), None).values[name]
        assert (other != one).double().mean() > 0.99  # few values are equal by chance

    monkeypatch.setattr(sides, "N_RUNS", 0)
    monkeypatch.setattr(sides, "N_LONG_RUNS", 0)  # the torch backend gathers by index
    for scatters, backend in itertools.product((False, True), ("torch", "triton")):
        monkeypatch.setattr(sides, "scatters", lambda device, scatters=scatters: scatters)
        other = execute(plan, Tensors({"w": source}), None, backend=backend)
        assert torch.equal(other.values["w"], one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_half_precision_keep_float32_state(dtype):
    source, m = torch.randn(8, 8, dtype=dtype), torch.randn(8, 8)

    staged = execute(
        plan_of([writer(8, 16), even(8, 16)]),
        Tensors({"w": source}, {}, {"w": {"exp_avg": m}}),
        LAWS["torch.optim.adamw.AdamW"].rules,
    )

    assert (
        staged.values["w"].dtype == dtype and staged.states["w"]["exp_avg"].dtype == torch.float32
    )


def test_a_pure_copy_is_bit_exact_even_for_nan_payloads():
    bits = torch.randint(-(2**31), 2**31 - 1, (16, 16), dtype=torch.int32)
    source = bits.view(torch.float32)

    staged = execute(
        plan_of([writer(16, 32), writer(16, 16)]), Tensors({"w": source}), None
    ).values["w"]

    assert torch.equal(staged.view(torch.int32), torch.cat([bits, bits]))
