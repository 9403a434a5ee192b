"""Under exact dynamics, a grown run continues as the source's run, in the optimizers of torch (but LBFGS) and of three other libraries."""

import copy
import inspect
import os
import pickle
import random
import signal
import threading
import time
import warnings

import pytest
import torch
from models import batch, exact_norms, grow, loss_of, make, train
from torch import nn
from torch.optim import _muon
from torch.optim.lr_scheduler import LRScheduler

import growkern
from growkern import width
from growkern.errors import PlanError
from growkern.optimizer.factors import Scale
from growkern.optimizer.state_rules import muon_adjustment
from growkern.optimizer.update_scale import scale_of
from growkern.support.live_registry import _Step

QUIET = width.Lossless(noise=0)
WARM, ON = 12, 7  # ASGD averages from step 10 on
optims = torch.optim
OPTIMIZERS = {
    "ASGD": (optims.ASGD, dict(lr=0.1, lambd=1e-2, t0=10, weight_decay=0.01)),
    "Adadelta": (optims.Adadelta, dict(lr=0.5, weight_decay=0.01)),
    "Adafactor": (optims.Adafactor, dict(lr=0.02, weight_decay=0.1)),
    "Adagrad": (optims.Adagrad, dict(lr=0.02, weight_decay=0.01)),
    "Adam": (optims.Adam, dict(lr=3e-3, eps=1e-4, weight_decay=0.01)),
    "Adam decoupled": (optims.Adam, dict(lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True)),
    "AdamW": (optims.AdamW, dict(lr=3e-3, eps=1e-4, weight_decay=0.1)),
    "AdamW amsgrad": (optims.AdamW, dict(lr=3e-3, amsgrad=True, maximize=False)),
    "AdamW fused": (optims.AdamW, dict(lr=3e-3, fused=True)),
    "AdamW plain": (optims.AdamW, dict(lr=3e-3, foreach=False)),
    "Adamax": (optims.Adamax, dict(lr=3e-3, weight_decay=0.01)),
    "Muon": (optims.Muon, dict(lr=0.02)),
    "Muon rms": (optims.Muon, dict(lr=0.005, adjust_lr_fn="match_rms_adamw", weight_decay=0.3)),
    "NAdam": (optims.NAdam, dict(lr=3e-3, weight_decay=0.1, decoupled_weight_decay=True)),
    "RAdam": (optims.RAdam, dict(lr=3e-3, weight_decay=0.01)),
    "RMSprop": (optims.RMSprop, dict(lr=1e-3, momentum=0.9, centered=True, weight_decay=0.01)),
    "Rprop": (optims.Rprop, dict(lr=1e-3)),
    "SGD": (optims.SGD, dict(lr=0.05)),
    "SGD momentum": (optims.SGD, dict(lr=0.05, momentum=0.9, dampening=0.1, weight_decay=0.01)),
    "SGD nesterov": (optims.SGD, dict(lr=0.05, momentum=0.9, nesterov=True)),
    "SparseAdam": (optims.SparseAdam, dict(lr=3e-3)),
    "growkern AdamW": (growkern.optim.AdamW, dict(lr=3e-3, eps=1e-4, weight_decay=0.1)),
    "growkern amsgrad": (growkern.optim.AdamW, dict(lr=3e-3, amsgrad=True)),
}
THIRD = {  # growkern knows these optimizers by the name of their class
    "Lion": ("lion_pytorch", "Lion", dict(lr=1e-3, weight_decay=0.1)),
    "schedule-free": ("schedulefree", "AdamWScheduleFree", dict(lr=3e-3, weight_decay=0.1)),
    "schedule-free plain": ("schedulefree", "AdamWScheduleFree", dict(lr=3e-3, foreach=False)),
    "schedule-free SGD": ("schedulefree", "SGDScheduleFree", dict(lr=0.5, weight_decay=0.1)),
    "schedule-free RAdam": ("schedulefree", "RAdamScheduleFree", dict(lr=3e-3, weight_decay=0.1)),
    "HF Adafactor": ("transformers.optimization", "Adafactor", dict(beta1=0.9)),
    "HF Adafactor lr": (
        "transformers.optimization",
        "Adafactor",
        dict(lr=1e-2, scale_parameter=False, relative_step=False, weight_decay=0.1),
    ),
}


def newton_schulz(grad, ns_coefficients, ns_steps, eps):
    """Run Muon's Newton-Schulz iteration in the gradient's own dtype."""
    a, b, c = ns_coefficients
    x = grad.mT if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if grad.size(0) > grad.size(1) else x


def held_by(name: str, model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that an optimizer of this kind can train."""
    if name == "SparseAdam":
        model.model.embed_tokens.sparse = True
        return [model.model.embed_tokens.weight]
    params = list(model.parameters())
    return [p for p in params if p.dim() == 2] if name.startswith("Muon") else params


def warmed(name: str, family: str = "llama", n: int = WARM) -> tuple[nn.Module, optims.Optimizer]:
    if name in THIRD:
        module, cls, options = THIRD[name]
        kind = getattr(pytest.importorskip(module), cls)
    else:
        kind, options = OPTIMIZERS[name]
    model = make(family, tied=name != "SparseAdam").double()
    optim = kind(held_by(name, model), **options)
    if hasattr(optim, "train"):
        optim.train()
    train(model, optim, n)
    return model, optim


def gap(name: str, monkeypatch, **options) -> float:
    """Return the largest difference of losses between the source's run and the grown run."""
    exact_norms(monkeypatch)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", newton_schulz)
    model, optim = warmed(name)
    if name == "SparseAdam":
        optim.zero_grad()  # sparse gradients in flight are refused
    if name == "schedule-free plain":
        optim.eval()  # the growth comes between training and evaluation
    source, source_optim = copy.deepcopy((model, optim))
    for key, value in vars(optim).items():  # deepcopy loses what Lion keeps beside its state
        vars(source_optim).setdefault(key, value)
    grow(model, optim, to="2x", width=QUIET, **options)
    if name == "schedule-free plain":
        optim.train(), source_optim.train()
    grown = train(model, optim, ON, first=WARM)
    expected = train(source, source_optim, ON, first=WARM)
    assert abs(expected[0] - expected[-1]) > 1e-4, "nothing was learned"
    return max(abs(a - b) for a, b in zip(grown, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTIMIZERS, *THIRD])
def test_the_grown_run_is_the_source_run(name, monkeypatch):
    assert gap(name, monkeypatch, dynamics="exact") < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Muon", "growkern AdamW"])
def test_without_dynamics_it_is_not(name, monkeypatch):
    assert gap(name, monkeypatch, dynamics=None) > 1e-4


@pytest.mark.slow
def test_muon_as_torch_has_it_is_as_close_as_its_bfloat16(monkeypatch):
    exact_norms(monkeypatch)
    model, optim = warmed("Muon")
    source, source_optim = copy.deepcopy((model, optim))
    grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    grown = train(model, optim, ON, first=WARM)
    expected = train(source, source_optim, ON, first=WARM)
    assert grown == pytest.approx(expected, abs=1e-3)  # what the guides say of it
    with torch.no_grad():
        ids = batch(seed=99)
        assert (model(ids).logits - source(ids).logits).abs().max() < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "SGD momentum", "growkern AdamW", "Rprop"])
@pytest.mark.parametrize("to", [{"ffn": 60}, {"ffn": 50, "hidden": 48}], ids=str)
def test_uneven_copies_keep_the_trajectory_element_by_element(name, to, monkeypatch):
    exact_norms(monkeypatch)
    model, optim = warmed(name, n=10)
    source, source_optim = copy.deepcopy((model, optim))
    grow(model, optim, to=to, width=QUIET, dynamics="exact")

    grown = train(model, optim, ON, first=10)

    assert grown == pytest.approx(train(source, source_optim, ON, first=10), abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("how", [None, "original", "match_rms_adamw"])
def test_the_adjustment_of_muon_is_torchs_for_every_shape(how):
    sizes = (1, 2, 3, 7, 24, 80)
    for shape in [(rows, cols) for rows in sizes for cols in sizes]:
        expected = _muon._adjust_lr(1.0, how, torch.Size(shape))
        assert muon_adjustment(shape, how) == pytest.approx(expected, rel=1e-15), shape


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AdamW", "Muon", "Muon rms", "ASGD", "growkern AdamW"])
def test_two_growths_keep_the_trajectory(name, monkeypatch):
    exact_norms(monkeypatch)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", newton_schulz)
    model, optim = warmed(name, n=5)
    source, source_optim = copy.deepcopy((model, optim))

    # Muon wants whole multiples; this one changes the shapes that its learning rate depends on
    first = {"ffn": 80} if name.startswith("Muon") else {"hidden": 48, "ffn": 50}
    grow(model, optim, to=first, width=QUIET, dynamics="exact")
    grown = train(model, optim, 5, first=5)
    grow(model, optim, to="2x", width=QUIET, dynamics="exact", seed=1)
    grown += train(model, optim, 5, first=10)

    assert grown == pytest.approx(train(source, source_optim, 10, first=5), abs=1e-9)


@pytest.mark.slow
def test_growth_is_exact_in_the_middle_of_an_accumulation_and_with_closures(monkeypatch):
    exact_norms(monkeypatch)

    def run(grown: bool, closures: bool) -> list[float]:
        model, optim = warmed("AdamW", n=3)
        losses = []
        for t in range(6):
            for micro in range(4):
                (loss_of(model, batch(seed=10 * t + micro)) / 4).backward()
                if grown and t == 1 and micro == 1:
                    grow(model, optim, to="2x", width=QUIET, dynamics="exact")

            def closure():
                loss = loss_of(model, batch(seed=t))  # noqa: B023
                if closures:
                    optim.zero_grad()
                    loss.backward()
                return loss

            losses.append(float((optim.step(closure) if closures else closure()).detach()))
            if not closures:
                optim.step()
            optim.zero_grad()
        return losses

    for closures in (False, True):
        expected = run(False, closures)
        assert run(True, closures) == pytest.approx(expected, abs=1e-9)


def test_exact_dynamics_under_a_grad_scaler_and_bfloat16():
    """Under a GradScaler that skips one step, on a CPU, the losses agree up to the rounding of float32 and bfloat16."""

    def run(grown: bool) -> list[float]:
        model = make("llama", tied=True)
        optim = torch.optim.AdamW(model.parameters(), lr=3e-3)
        train(model, optim, 3)
        scaler, losses = torch.amp.GradScaler("cpu", init_scale=2.0**10), []
        for t in range(8):
            if grown and t == 2:
                grow(model, optim, to="2x", width=QUIET, dynamics="exact")
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, batch(seed=t))
            scaler.scale(loss).backward()
            if t == 4:
                next(model.parameters()).grad[0, 0] = float("inf")
            scaler.step(optim)
            scaler.update()
            optim.zero_grad()
            losses.append(loss.item())
        return losses

    assert run(True) == pytest.approx(run(False), abs=2e-2)


ELEMENTWISE = [
    (optims.SGD, dict(momentum=0.9)),
    (optims.ASGD, dict(lambd=0)),
    *((getattr(optims, name), {}) for name in ("Adadelta", "Adagrad", "Adam", "Adamax", "NAdam")),
    *((getattr(optims, name), {}) for name in ("RAdam", "RMSprop", "Rprop")),
    (optims.AdamW, dict(weight_decay=0)),
]


@pytest.mark.parametrize(
    ("kind", "options"), ELEMENTWISE, ids=[kind.__name__ for kind, _ in ELEMENTWISE]
)
def test_update_scale_multiplies_the_updates_of_any_optimizer(kind, options):
    def moved(factor) -> torch.Tensor:
        torch.manual_seed(0)
        layer = nn.Linear(3, 4).double()
        optim = kind(layer.parameters(), lr=0.1, **options)
        scale = growkern.UpdateScale(optim, {layer.weight: factor}) if factor else None
        before = layer.weight.detach().clone()
        for _ in range(3):
            optim.zero_grad()
            layer(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
            optim.step()
        assert scale is None or scale_of(optim) is scale
        return layer.weight.detach() - before

    rows, cols = torch.tensor([1.0, 2.0, 3.0, 4.0]).double(), torch.tensor([0.5, 1.0, 2.0]).double()

    assert torch.allclose(moved(0.25), 0.25 * moved(None), rtol=1e-12)
    assert torch.allclose(
        moved(Scale((rows, cols))), rows[:, None] * cols * moved(None), rtol=1e-12
    )


def test_the_rows_of_a_sparse_gradient_take_their_own_factors():
    """The update of SGD by a plain loop over the ids of a batch, one of which occurs twice."""
    layer = nn.Embedding(5, 3, sparse=True).double()
    optim = optims.SGD(layer.parameters(), lr=0.1)
    rows, cols = (
        torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double(),
        torch.tensor([0.5, 1.0, 2.0]).double(),
    )
    growkern.UpdateScale(optim, {layer.weight: Scale((1.0, cols), grad=(rows, 1.0))})
    ids, factors = torch.tensor([4, 1, 4]), torch.tensor([1.0, -2.0, 3.0]).double()
    expected = layer.weight.detach().clone()
    for i, factor in zip(ids, factors, strict=True):
        expected[i] -= 0.1 * cols * factor / rows[i]
    (layer(ids) * factors[:, None]).sum().backward()
    grad = layer.weight.grad.to_dense()

    optim.step()

    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(layer.weight.grad.to_dense(), grad, rtol=1e-12, atol=0)


def test_elements_of_a_second_growth_take_the_mean_factor_of_the_first():
    """The readers of 40 units that become 60 have the learning rate of SGD times 1 or 1/2; the readers of new units have the mean."""
    model = make("llama", tied=True).double()
    optim = optims.SGD(model.parameters(), lr=0.1)
    train(model, optim, 1)
    grow(model, optim, to={"ffn": 60}, width=QUIET)
    grow(model, optim, to={"ffn": 70})
    down = model.model.layers[0].mlp.down_proj.weight
    before = down.detach().clone()

    train(model, optim, 1, first=1)

    factors = [0.5] * 20 + [1.0] * 20 + [0.5] * 20 + [2 / 3] * 10
    factors = torch.tensor(factors, dtype=torch.float64)
    torch.testing.assert_close(down - before, -0.1 * factors * down.grad, rtol=1e-9, atol=1e-15)


def fails(*_):
    raise RuntimeError("boom")


def interrupted(*_):
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [fails, interrupted])
@pytest.mark.parametrize("scheduled", [None, "before", "after"])
def test_weights_and_gradients_are_the_models_as_soon_as_a_step_has_raised(error, scheduled):
    """``except KeyboardInterrupt: save(model)`` saves the model, and what the loop does next trains it."""

    def schedule(when):
        if scheduled == when:  # torch's schedulers replace optim.step
            torch.optim.lr_scheduler.StepLR(optim, 100)

    model, optim = warmed("AdamW", n=2)
    schedule("before")
    grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    schedule("after")
    loss_of(model, batch()).backward()
    params = [*model.parameters()]
    before = [(p.detach().clone(), p.grad.clone()) for p in params]
    seen = []
    optim.register_step_pre_hook(lambda *_: seen.extend(p.detach().clone() for p in params))
    hook = optim.register_step_pre_hook(error)  # behind UpdateScale's

    with pytest.raises((RuntimeError, KeyboardInterrupt)):
        optim.step()

    assert any(not torch.equal(p, q) for (p, _), q in zip(before, seen, strict=True))
    for p, (value, grad) in zip(params, before, strict=True):
        assert torch.equal(p, value)
        torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=0)
    hook.remove()
    other, other_optim = copy.deepcopy((model, optim))
    other_optim.load_state_dict(copy.deepcopy(optim.state_dict()))  # torch shares tensors
    for one in (optim, other_optim):
        one.zero_grad(set_to_none=one is other_optim)
    for p, q in zip(params, other.parameters(), strict=True):
        p.grad.add_(0.01)  # the next batch's, into the tensor of the old one
        q.grad = torch.full_like(q, 0.01)
    optim.step(), other_optim.step()
    for p, q in zip(params, other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_step_of_an_optimizer_is_its_own_again_without_an_update_scale():
    layer = nn.Linear(3, 4)
    optim = torch.optim.SGD(layer.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optim, 1, gamma=0.5)
    own = optim.step
    signature = inspect.signature(torch.optim.SGD(layer.parameters()).step)
    scale = growkern.UpdateScale(optim, {layer.weight: 0.5})

    layer(torch.ones(2, 3)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.step()
        scheduler.step()
    assert inspect.signature(optim.step) == signature
    assert "step" not in vars(pickle.loads(pickle.dumps(optim)))
    scale.remove()

    assert optim.step is own
    assert scale_of(optim) is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("infinite", [float("inf"), float("-inf")])
def test_an_infinite_weight_stays_infinite(dtype, infinite):
    """As in torch: a pruned unit of a ReLU has a bias of -inf, a masked distance of T5 too."""
    p = nn.Parameter(torch.tensor([infinite, 1.0, 40000.0], dtype=dtype))
    optim = torch.optim.SGD([p], lr=0.1)
    growkern.UpdateScale(optim, {p: 0.5})
    for grad in ([0.0, 1.0, 0.0], [3.0, 1.0, 0.0]):
        p.grad = torch.tensor(grad, dtype=dtype)
        optim.step()

    torch.testing.assert_close(
        p.detach(), torch.tensor([infinite, 0.9, 40000.0], dtype=dtype), rtol=1e-3, atol=0
    )
    p.grad = torch.tensor([0.0, float("nan"), 0.0], dtype=dtype)
    optim.step()
    assert p[1].isnan() and p[2] == 40000.0


def test_a_growth_of_pruned_units_trains_on_as_the_source():
    def pruned():
        model = make("opt", tied=True, activation_function="relu").double()
        optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with torch.no_grad():
            model.model.decoder.layers[0].fc1.bias[3] = float("-inf")
        return model, optim

    (model, optim), (source, source_optim) = pruned(), pruned()
    grow(model, optim, to={"hidden": 48, "heads": 8}, width=QUIET, dynamics="exact")

    assert train(model, optim, 3) == pytest.approx(train(source, source_optim, 3), abs=1e-6)
    assert model.model.decoder.layers[0].fc1.bias[3] == float("-inf")


def test_factors_that_were_loaded_are_saved_and_removed_before_the_first_step():
    def made(factor):
        torch.manual_seed(0)
        layer = nn.Linear(3, 4)
        optim = torch.optim.SGD(layer.parameters(), lr=0.1)
        scale = growkern.UpdateScale(optim, {layer.weight: Scale((factor, 1.0), (2.0, 1.0))})
        return layer, optim, scale

    saved = made(0.25)[1].state_dict()
    _, optim, scale = made(0.5)
    optim.load_state_dict(saved)

    assert optim.state_dict()["param_groups"][0]["update_scale"] == saved["param_groups"][0]["update_scale"]  # fmt: skip
    scale.remove()
    assert [held.update for held in scale.scales.values()] == [(0.25, 1.0)]


def test_a_first_step_after_a_load_that_raises_leaves_no_other_weights_in_a_checkpoint():
    """``torch.save({"model": model.state_dict(), "optim": optim.state_dict()})`` when the first step was interrupted."""
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    optim = torch.optim.SGD(layer.parameters(), lr=0.1)
    growkern.UpdateScale(optim, {layer.weight: 0.25})
    new = torch.optim.SGD(other.parameters(), lr=0.1)
    new.load_state_dict(optim.state_dict())
    before = other.weight.detach().clone()
    other(torch.ones(2, 3)).sum().backward()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="boom"):
        patch.setattr(torch.optim.SGD, "_init_group", fails)
        new.step()
    assert not torch.equal(other.weight, before)

    saved = {"model": other.state_dict(), "optim": new.state_dict()}

    assert torch.equal(saved["model"]["weight"], before)
    new.step()
    torch.testing.assert_close(other.weight, before - 0.025 * other.weight.grad)


def test_a_state_dict_inside_a_step_converts_nothing():
    layer = nn.Linear(3, 4).double()
    optim = torch.optim.SGD(layer.parameters(), lr=0.1)
    growkern.UpdateScale(optim, {layer.weight: 0.25})
    optim.register_step_pre_hook(lambda optim, *_: [optim.state_dict()].clear())
    before = layer.weight.detach().clone()
    layer(torch.ones(2, 3).double()).sum().backward()

    optim.step()

    torch.testing.assert_close(layer.weight.detach(), before - 0.025 * layer.weight.grad)


def test_a_reset_of_the_state_is_no_trajectory_of_the_source():
    """LBFGS loses its history, so the report promises the gradient and no more."""
    model = make("llama", tied=True).double()
    optim = torch.optim.LBFGS(model.parameters(), lr=1e-2)
    report = grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    assert report.preserves == "gradient"


def test_a_step_taken_before_the_growth_leaves_parameters_to_be_restored():
    """nanoGPT's loop calls ``optim.step``; a loop that keeps the method cannot be watched."""
    model, optim = warmed("AdamW", n=2)
    step = optim.step
    grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    loss_of(model, batch()).backward()
    before = [p.clone() for p in model.parameters()]
    optim.register_step_pre_hook(fails)
    with pytest.raises(RuntimeError, match="boom"):
        step()
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))

    scale_of(optim).restore()

    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    scale_of(optim).remove()
    assert scale_of(optim) is None
    # the live registry's hook stays
    assert [*map(type, optim._optimizer_step_post_hooks.values())] == [_Step]


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "Rprop", "ASGD", "Adadelta", "RMSprop"])
def test_state_is_by_the_law_when_the_hooks_are_taken_off(name):
    def grown(dynamics):
        model, optim = warmed(name, n=3)
        grow(model, optim, to={"hidden": 48, "ffn": 50}, width=QUIET, dynamics=dynamics)
        if dynamics:
            scale_of(optim).remove()
        return model, optim

    (model, optim), (other, plain) = grown("exact"), grown(None)

    assert scale_of(optim) is None
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in plain.state[q].items():
            torch.testing.assert_close(optim.state[p][key], value, rtol=1e-12, atol=0, msg=key)


def test_update_scale_goes_with_a_checkpoint(monkeypatch, tmp_path):
    exact_norms(monkeypatch)
    model, optim = warmed("AdamW", n=3)
    grow(model, optim, to={"ffn": 60}, width=QUIET, dynamics="exact")
    torch.save(
        (model.state_dict(), optim.state_dict(), scale_of(optim).state_dict()), tmp_path / "x"
    )
    expected = train(model, optim, 4, first=3)

    again = make("llama", tied=True, intermediate_size=60).double()
    other = torch.optim.AdamW(again.parameters())
    weights, state, scales = torch.load(tmp_path / "x")
    again.load_state_dict(weights)
    other.load_state_dict(state)
    growkern.UpdateScale(other, {}).load_state_dict(scales)

    assert train(again, other, 4, first=3) == expected


def test_what_update_scale_refuses():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    optim = torch.optim.SGD(layer.parameters(), lr=0.1)

    for scales, match in (
        ({other.weight: 0.5}, "has no such parameter of shape"),
        ({layer.weight: 0.0}, "takes a positive number"),
        ({layer.weight: Scale((2.0,))}, "one factor per axis"),
        ({layer.weight: "a"}, "takes a positive number"),
        ({layer.weight: Scale((torch.ones(3), 1.0))}, "axis 0 .* or 4 of them"),
    ):
        with pytest.raises(PlanError, match=match):
            growkern.UpdateScale(optim, scales)
    assert not optim._optimizer_step_pre_hooks
    growkern.UpdateScale(optim, {layer.weight: 0.5})
    with pytest.raises(PlanError, match="already has an UpdateScale"):
        growkern.UpdateScale(optim, {layer.weight: 0.5})


def test_the_gradients_after_a_kept_step_that_raised_are_taken_as_they_are():
    def grown():
        model = make("gpt2", tied=True)
        optim = torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9)
        train(model, optim, 3)
        optim.kept = optim.step
        grow(model, optim, to={"hidden": 48, "heads": 8}, width=QUIET, dynamics="exact")
        return model, optim

    (model, optim), (other, other_optim) = grown(), grown()
    loss_of(model, batch(seed=8)).backward()
    hook = optim.register_step_pre_hook(fails)  # behind UpdateScale's
    with pytest.raises(RuntimeError, match="boom"):
        optim.kept()
    hook.remove()
    optim.zero_grad()
    for p in (*model.parameters(), *other.parameters()):
        p.grad = torch.full_like(p, 0.01)  # the next batch's
    optim.step()
    other_optim.step()

    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
        assert p.grad.allclose(torch.full_like(p, 0.01))


@pytest.mark.slow
def test_ctrl_c_at_any_moment_of_a_step_loses_no_weight():
    """SIGINT arrives at random moments of 60 steps; at learning rate 0 no weight may change."""
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    train(model, optim, 2)
    grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    train(model, optim, 1)
    before, draw = [p.detach().clone() for p in model.parameters()], random.Random(0)

    interrupted = 0
    for _ in range(60):
        optim.zero_grad()
        loss_of(model, batch()).backward()
        timer = threading.Timer(draw.uniform(0, 2e-3), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            optim.step()
            timer.join()
            time.sleep(1e-3)
        except KeyboardInterrupt:
            interrupted += 1
        timer.join()
        for p, q in zip(model.parameters(), before, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=0)
    assert interrupted


def test_two_models_of_one_optimizer_keep_their_scales(monkeypatch):
    exact_norms(monkeypatch)
    models = [make("llama", tied=True, seed=seed).double() for seed in (0, 1)]
    optim = torch.optim.AdamW([p for m in models for p in m.parameters()], lr=1e-3)
    train(models[0], optim, 2), train(models[1], optim, 2)
    sources, source_optim = copy.deepcopy((models, optim))

    for model in models:
        grow(model, optim, to="2x", width=QUIET, dynamics="exact")

    held = scale_of(optim).scales
    assert all(any(p in held for p in model.parameters()) for model in models)
    for model, source in zip(models, sources, strict=True):
        expected = train(source, source_optim, 4, first=2)
        assert train(model, optim, 4, first=2) == pytest.approx(expected, abs=1e-9)


def test_hooks_of_the_user_go_on_beside_a_growth_in_a_hook_and_see_the_models_units():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = growkern.GrowthSchedule([growkern.At(step=2, to="2x", dynamics="exact")])
    schedule.attach(model, optim)
    calls = []

    def norms() -> list[float]:
        return [p.norm().item() for p in model.parameters()]

    optim.register_step_post_hook(lambda *_: calls.append(norms()))

    after = []
    for step in range(4):
        train(model, optim, 1, first=step)
        after.append(norms())

    assert calls == after and schedule.fired == [2]


def test_a_growth_inside_a_step_is_refused():
    model = make("llama", tied=True)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-3)
    train(model, optim, 1)

    def closure():
        grow(model, optim, to="2x")

    with pytest.raises(PlanError, match="would change half a step"):
        optim.step(closure)
    handle = optim.register_step_pre_hook(lambda *_: grow(model, optim, to="2x"))
    with pytest.raises(PlanError, match="would change half a step"):
        optim.step()
    handle.remove()
    assert model.config.hidden_size == 24


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["Adam", "RMSprop", "NAdam", "Adagrad", "RAdam", "AdamW", "SGD momentum"]
)
def test_groups_and_hooks_carry_the_same_learning_rates(name):
    warm = warmed(name, n=5)

    def run(handed: bool) -> list[float]:
        model, optim = copy.deepcopy(warm)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optim, lambda t: 1.0)
        grow(model, optim, to="2x", scheduler=scheduler if handed else None)
        assert (scale_of(optim) is None) == handed
        return train(model, optim, 5, first=5)

    assert run(True) == pytest.approx(run(False), abs=1e-9)


class OneRate(LRScheduler):
    """One absolute rate for all groups, as Noam's."""

    def get_lr(self):
        return [1e-2 / (2 + self.last_epoch) for _ in self.optimizer.param_groups]


class OwnPeaks(LRScheduler):
    """A list of rates, one per group, under a name of its own."""

    def __init__(self, optimizer):
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        super().__init__(optimizer)

    def get_lr(self):
        return [peak / (1 + self.last_epoch) for peak in self.peaks]


class WarmUp(LRScheduler):
    """A warm-up from one absolute rate to the base rates."""

    def get_lr(self):
        return [1e-4 + (base - 1e-4) * self.last_epoch / 20 for base in self.base_lrs]


@pytest.mark.parametrize("kind", [OneRate, OwnPeaks, WarmUp])
@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_groups_are_not_split_under_a_scheduler_of_a_users_own_class(kind, name):
    def run(grows):
        model = make("llama", tied=True)
        decayed = [p for p in model.parameters() if p.dim() == 2]
        rest = [{"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
        optim = OPTIMIZERS[name][0]([{"params": decayed}, *rest], lr=1e-2)
        scheduler, rates = kind(optim), []
        for i in range(6):
            train(model, optim, 1, first=i)
            scheduler.step()
            if i == 2 and grows:
                grow(model, optim, width=width.Lossless(noise=1), scheduler=scheduler)
            rates.append([group["lr"] / group.get("lr_factor", 1) for group in optim.param_groups])
        return rates, scale_of(optim)

    (rates, scale), (expected, _) = run(True), run(False)

    assert rates == expected and scale is not None and scale.scales
