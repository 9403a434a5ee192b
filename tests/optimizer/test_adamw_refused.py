"""``growkern.optim.AdamW`` refuses slices that it cannot apply before anything changes."""

import copy

import pytest
import torch
from states import same
from test_adamw_class import parameters, train
from torch import Tensor
from torch.nn import Parameter

from growkern.optim import AdamW

BAD = {
    "unknown key": (dict(lr=[1.0]), "'lr' is no slice"),
    "length": (dict(lr_rows=[1.0] * 3), r"lr_rows has shape \(3,\); a parameter of shape \(4, 6\) needs \(4,\)"),
    "columns": (dict(eps_cols=[1.0] * 4), r"eps_cols has shape \(4,\); a parameter of shape \(4, 6\) needs \(6,\)"),
    "two axes": (dict(lr_rows=torch.ones(4, 1)), r"lr_rows has shape \(4, 1\)"),
    "nan": (dict(lr_cols=[1.0, float("nan")] * 3), "lr_cols .* not finite"),
    "infinite": (dict(eps_rows=[float("inf")] * 4), "eps_rows .* not finite"),
    "zero": (dict(lr_rows=[0.0] * 4), "lr_rows .* above 0"),
    "negative": (dict(decay_rows=[1.0, -1.0] * 2), "decay_rows .* above 0"),
    "complex": (dict(lr_rows=torch.ones(4, dtype=torch.complex64)), "real numbers"),
    "not yet born": (dict(born_rows=[0.0, 3.0] * 2), "born_rows .* between 0 and the step of the parameter, 2"),
    "born before": (dict(born_cols=[-1.0] * 6), "born_cols .* between 0"),
    "rewarm": (dict(rewarm=[1.0]), r"rewarm has shape \(1,\); a parameter of shape \(4, 6\) needs \(2,\)"),
    "tau": (dict(rewarm=[1.0, 0.0]), "rewarm .* above 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("stepped", [False, True])
def test_bad_slices_are_refused_before_anything_changes(name, stepped):
    bad, message = BAD[name]
    p = parameters(shapes=[(4, 6)])[0]
    optim = AdamW([p])
    if stepped:
        train([optim], 2)
        optim.set_slices(p, lr_rows=[2.0] * 4)
    before = copy.deepcopy(optim.state_dict())

    if not stepped and name == "not yet born":
        message = "the step of the parameter, 0"
    with pytest.raises(ValueError, match=message):
        optim.set_slices(p, **{"lr_cols": [3.0] * 6, **bad})

    assert same(optim.state_dict(), before)


class Own(Tensor):
    """A subclass of Tensor, which may compute in its own way."""


def test_slices_are_for_dense_real_parameters_of_this_optimizer():
    mine, other = parameters(shapes=[(2,)])[0], Parameter(torch.ones(2))
    imaginary = Parameter(torch.ones(2, dtype=torch.complex64))
    own = Parameter(torch.ones(2).as_subclass(Own))
    optim = AdamW([mine, imaginary, own])

    for p, message in (
        (other, "not in this optimizer"),
        (imaginary, "dense real parameters"),
        (own, "of class Own"),
    ):
        with pytest.raises(ValueError, match=message):
            optim.set_slices(p, lr_cols=[1.0, 1.0])
    assert not optim.state


def sparse(p: Tensor, optim: AdamW) -> None:
    p.grad = torch.ones_like(p).to_sparse()


BROKEN = {
    "sparse": (sparse, "sparse gradients: a parameter of shape"),
    "capturable": (lambda p, o: o.param_groups[1].update(capturable=True), "capturable group"),
    "differentiable": (lambda p, o: o.param_groups[1].update(differentiable=True), "differentiable group"),
    "length": (lambda p, o: o.state[p].update(lr_rows=torch.ones(3)), r"lr_rows .* set_slices makes the contiguous \(4,\)"),
    "dtype": (lambda p, o: o.state[p].update(lr_rows=torch.ones(4).double()), "lr_rows .* torch.float64"),
    "strides": (lambda p, o: o.state[p].update(lr_rows=torch.ones(8)[::2]), "lr_rows .* contiguous"),
    "moment": (lambda p, o: o.state[p].update(exp_avg=torch.ones(3, 6)), r"exp_avg .* \(3, 6\); grow it"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_step_refuses_slices_it_cannot_apply_before_anything_changes(name):
    breaks, message = BROKEN[name]
    ps = parameters(shapes=[(3,), (4, 6)])
    optim = AdamW([dict(params=ps[:1]), dict(params=ps[1:])])
    train([optim], 2)
    optim.set_slices(ps[1], lr_rows=[2.0] * 4)
    breaks(ps[1], optim)
    before = copy.deepcopy((ps, optim.state_dict()))

    with pytest.raises(RuntimeError, match=message):
        optim.step()

    assert same((ps, optim.state_dict()), before)


@pytest.mark.parametrize("dtype", [torch.complex64, "own"])
def test_step_refuses_slices_of_parameters_they_are_not_for(dtype):
    values = torch.ones(2)
    p = Parameter(values.as_subclass(Own) if dtype == "own" else values.to(dtype))
    optim = AdamW([p])
    p.grad = torch.ones_like(p)
    optim.state[p]["lr_cols"] = torch.ones(2)

    with pytest.raises(RuntimeError, match="slices are for"):
        optim.step()

    assert p.tolist() == [1, 1] and list(optim.state[p]) == ["lr_cols"]


def test_a_compiled_step_refuses_slices_and_leaves_the_rest_to_torch(monkeypatch):
    plain, sliced = (parameters(shapes=[(4, 6)])[0] for _ in range(2))
    optims = AdamW([plain]), AdamW([sliced])
    optims[1].set_slices(sliced, lr_rows=[2.0] * 4)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    group = optims[0].param_groups[0]

    plain.grad, sliced.grad = torch.ones_like(plain), torch.ones_like(sliced)

    assert optims[0]._split(group) == ([], [plain])
    with pytest.raises(RuntimeError, match="cannot be compiled"):
        optims[1]._split(optims[1].param_groups[0])
