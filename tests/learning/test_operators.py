"""Operators start as the closed form, follow the papers' formulas as plain loops, and have the gradients of finite differences."""

from dataclasses import replace

import pytest
import torch
from learned import BOTH, COPIES, closed_of, double, grown_of, parts, stirred
from models import FAMILIES, batch, exact_norms, loss_of, make
from torch.func import functional_call

from growkern import depth, width
from growkern.errors import PlanError
from growkern.learning.build import build_operators
from growkern.learning.learner import _Learner
from growkern.planning.index_map import IndexMap

TIES = "use", "published", "shared"
STARTS = {  # closed forms that are more than copies: noise, random rows, means, constants, the next layer's rows, drawn blocks
    "lossless-identity": ({"hidden": "2x", "layers": "2x"}, {}),
    "isometric": ({"hidden": 36}, {"width": width.Lossless(norms="isometric", noise=1.0)}),
    "hyperclone-interpose": (BOTH, {"width": width.HyperClone(noise_db=10), "depth": depth.Interpose()}),
    "next-layer": (BOTH, {"width": width.AKI(), "depth": depth.Stack()}),
    "drawn": (BOTH, {"width": width.CopyAndPad(), "depth": depth.Fresh()}),
    "random-maps": (BOTH, {"width": width.FPI(), "depth": depth.Stack()}),
    "head-dim": ({"head_dim": 12, "layers": 3}, {}),
}  # fmt: skip


def matrices(plan, operators, name):
    """Return, per axis of a target tensor, its full matrix (target, source) now and at the start, from the plan's index maps."""
    row = next(row for row in plan.tensors if row.name == name)
    both = []
    for dim, key in enumerate(row.axes):
        axis = plan.axes[key]
        scales = torch.tensor(axis.weight_scale.expanded(), dtype=torch.float64)
        start = torch.zeros(axis.index_map.n_target, axis.index_map.n_source, dtype=torch.float64)
        for i, j in enumerate(axis.index_map.indices):
            if j >= 0:
                start[i, j] = scales[i]
            elif scales[i] == 0:
                scales[i] = 1.0  # or a new coordinate would never learn
        now = start.clone()
        segments = {piece.axes[dim]: None for piece in operators.pieces[name]}
        for segment in segments:
            if segment.matrix is None:
                continue
            change = operators.parameters[segment.matrix].detach().double()
            (t, n_target), (s, n_source) = segment.target, segment.source
            assert n_target % len(change) == n_source % change.shape[1] == 0
            identity = torch.eye(n_target // len(change), dtype=torch.float64)
            scaled = scales[t : t + n_target, None] * torch.kron(change, identity)
            now[t : t + n_target, s : s + n_source] += scaled
        both.append((now, start))
    return row, both


def applied(maps, tensor):
    for dim, m in enumerate(maps):
        tensor = torch.tensordot(m, tensor, ([1], [dim])).movedim(0, dim)
    return tensor


def mixed(operators, row, sources):
    """Return the sum over source blocks, with the learned coefficients."""
    start = sources[row.source].double()
    layers = operators.layers.get(row.name)
    if layers is None:
        return start
    change = operators.parameters[layers.name].detach().double()
    return start + sum(change[k] * sources[name].double() for k, name in layers.sources.items())


@pytest.mark.parametrize(("to", "methods"), STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("tie", ["use", "published"])
def test_operators_start_at_any_closed_form_bit_for_bit(to, methods, tie):
    _, _, sources, target, operators = parts(make("llama", tied=True), to, tie, **methods)

    closed, grown = closed_of(target), grown_of(target, sources, operators)

    assert [n for n in grown if not torch.equal(grown[n], closed[n])] == []
    assert operators.n_numbers


CASES = [(family, "use") for family in FAMILIES]
CASES += [(family, tie) for family in ("llama", "gpt2", "t5", "plain") for tie in TIES[1:]]


@pytest.mark.parametrize(("family", "tie"), CASES)
def test_operators_are_the_papers_formula_in_every_family(family, tie):
    """``W' = A (sum_k w_k W_k) B^T``, which at the start is the closed form of copies: nothing is left to a fixed addend."""
    model = double(family)
    plan, _, sources, target, operators = parts(model, tie=tie, **COPIES)
    if tie == "shared":  # test_ties has the mixed tensors
        operators.mixes.clear()
    for name in operators.pieces:
        row, maps = matrices(plan, operators, name)
        start = row.factor * applied([m for _, m in maps], sources[row.source])
        if not row.offset:
            torch.testing.assert_close(closed_of(target)[name], start, rtol=0, atol=1e-12)
    closed, started = closed_of(target), grown_of(target, sources, operators)
    assert [name for name, value in started.items() if not torch.equal(value, closed[name])] == []
    stirred(operators)

    for name, value in grown_of(target, sources, operators).items():
        row, maps = matrices(plan, operators, name)
        now = applied([m for m, _ in maps], mixed(operators, row, sources))
        start = applied([m for _, m in maps], sources[row.source])
        wanted = closed[name] + row.factor * (now - start)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)
        assert not torch.equal(value, closed[name])
    learned = {row.name for row in plan.tensors if plan.changes(row)}
    assert learned <= operators.pieces.keys() | dict(model.named_buffers()).keys()


@pytest.mark.parametrize("start", STARTS)
def test_operators_follow_the_formula_from_closed_forms_that_are_more_than_copies(start):
    to, methods = STARTS[start]
    plan, _, sources, target, operators = parts(double("llama"), to, **methods)
    stirred(operators)

    closed, grown = closed_of(target), grown_of(target, sources, operators)

    for name, value in grown.items():
        row, maps = matrices(plan, operators, name)
        now = applied([m for m, _ in maps], mixed(operators, row, sources))
        start = applied([m for _, m in maps], sources[row.source])
        wanted = closed[name] + row.factor * (now - start)
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-10)


GRADIENTS = [
    ("llama", "use"),
    ("bert", "published"),
    ("gpt2", "shared"),
    ("t5", "use"),
    ("plain", "shared"),
]


@pytest.mark.parametrize(("family", "tie"), GRADIENTS)
def test_gradients_of_operators_are_those_of_functional_call_and_finite_differences(
    family, tie, monkeypatch
):
    exact_norms(monkeypatch)
    _, _, sources, target, operators = parts(double(family), tie=tie, noise=0.03, **COPIES)
    learner = _Learner(target, operators, sources, loss_of)
    closed, ids = closed_of(target), batch()
    learner.write()

    learner.gradients(ids)

    mine = {name: p.grad.clone() for name, p in operators.parameters.items() if p.grad is not None}
    assert mine.keys() == operators.parameters.keys()
    wrapped = Wrapped(target)
    grown = {f"model.{n}": closed[n] + operators.change(n, sources) for n in operators.pieces}
    value = functional_call(wrapped, grown, (ids,))
    autograd = torch.autograd.grad(value, [*operators.parameters.values()])
    for (name, grad), wanted in zip(mine.items(), autograd, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-8, atol=1e-12, msg=name)
    for name in [*operators.parameters][:: max(1, len(mine) // 6)]:
        p, at, h = operators.parameters[name], mine[name].abs().argmax(), 1e-5
        ends = []
        for step in (h, -h):
            with torch.no_grad():
                p.view(-1)[at] += step
                learner.write()
                ends.append(float(loss_of(target, ids)))
                p.view(-1)[at] -= step
        slope = (ends[0] - ends[1]) / (2 * h)
        assert slope == pytest.approx(float(mine[name].view(-1)[at]), rel=1e-5, abs=1e-9), name


class Wrapped(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return loss_of(self.model, ids)


def test_coefficients_over_a_source_that_is_0_are_left_out():
    model = make("gpt2", tied=True)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("attn.c_attn.bias") or name == "transformer.h.0.mlp.c_fc.bias":
                p.zero_()
    _, _, sources, target, operators = parts(model, **COPIES)
    learner = _Learner(target, operators, sources, loss_of)

    learner.gradients(batch())

    grads = {name: p.grad for name, p in operators.parameters.items()}
    assert [n for n, grad in grads.items() if grad is None or not grad.all()] == []
    assert not any("c_attn.bias" in name for name in operators.pieces)
    assert operators.parameters["layers transformer.h.3.mlp.c_fc.bias"].shape == (1,)


def test_noise_moves_the_start_and_keeps_the_sum_of_the_coefficients():
    *_, operators = parts(double("llama"), noise=0.03, **COPIES)
    *_, again = parts(double("llama"), noise=0.03, **COPIES)

    for name, change in operators.parameters.items():
        p = change.detach()
        assert torch.equal(p, again.parameters[name])
        if name.startswith("layers"):
            assert abs(float(p.sum())) < 1e-12 < float(p.abs().max())
        else:
            assert 0 <= float(p.min()) < float(p.max()) < 0.03


def test_growths_without_learned_sizes_are_refused():
    with pytest.raises(PlanError, match="no size that grows has operators"):
        parts(make("plain", tied=True), {"positions": 128})


def test_a_shared_matrix_needs_one_index_map():
    plan, spec, sources, *_ = parts(make("llama", tied=True), {"ffn": "2x"}, "shared", **COPIES)
    (key,) = [key for key in plan.axes if key.startswith("reader ffn.1")]
    axis = plan.axes[key]
    other = replace(axis, index_map=IndexMap.drawn(40, 80, "other"))

    with pytest.raises(PlanError, match=r"one matrix .*'reader ffn'.*FPI\(maps='cyclic'\)"):
        build_operators(spec, replace(plan, axes=plan.axes | {key: other}), sources, tie="shared")
