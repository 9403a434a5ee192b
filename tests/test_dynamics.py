"""Exact dynamics, in every optimizer of torch: after a growth the run goes on as the source's would have."""

import copy

import pytest
import torch
from models import batch, exact_norms, grow, loss_of, make, train
from torch import nn
from torch.optim import _muon

import growkern
from growkern import width

QUIET = width.Lossless(noise=0)
WARM, ON = 50, 20
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


def newton_schulz(grad, ns_coefficients, ns_steps, eps):
    """Muon's iteration in the gradient's own dtype."""
    a, b, c = ns_coefficients
    x = grad.mT if grad.size(0) > grad.size(1) else grad
    x = x / x.norm().clamp(min=eps)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if grad.size(0) > grad.size(1) else x


def held_by(name: str, model: nn.Module) -> list[nn.Parameter]:
    """What an optimizer of this kind can train."""
    if name == "SparseAdam":
        model.model.embed_tokens.sparse = True
        return [model.model.embed_tokens.weight]
    params = list(model.parameters())
    return [p for p in params if p.dim() == 2] if name.startswith("Muon") else params


def warmed(name: str, family: str = "llama", n: int = WARM) -> tuple[nn.Module, optims.Optimizer]:
    kind, options = OPTIMIZERS[name]
    model = make(family, tied=name != "SparseAdam").double()
    optim = kind(held_by(name, model), **options)
    train(model, optim, n)
    return model, optim


def gap(name: str, monkeypatch, **options) -> float:
    """The largest difference of losses between the source's run and the grown one."""
    exact_norms(monkeypatch)
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", newton_schulz)
    model, optim = warmed(name)
    if name == "SparseAdam":
        optim.zero_grad()  # sparse gradients in flight are refused
    source, source_optim = copy.deepcopy((model, optim))
    grow(model, optim, to="2x", width=QUIET, **options)
    grown = train(model, optim, ON, first=WARM)
    expected = train(source, source_optim, ON, first=WARM)
    assert abs(expected[0] - expected[-1]) > 1e-4, "nothing was learned"
    return max(abs(a - b) for a, b in zip(grown, expected, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_grown_run_is_the_source_run(name, monkeypatch):
    assert gap(name, monkeypatch, dynamics="exact") < 1e-9


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "Muon", "growkern AdamW"])
def test_without_dynamics_it_is_not(name, monkeypatch):
    assert gap(name, monkeypatch, dynamics=None) > 1e-4


def test_muon_as_torch_has_it_is_as_close_as_its_bfloat16(monkeypatch):
    exact_norms(monkeypatch)
    model, optim = warmed("Muon")
    source, source_optim = copy.deepcopy((model, optim))
    grow(model, optim, to="2x", width=QUIET, dynamics="exact")
    train(model, optim, ON, first=WARM)
    train(source, source_optim, ON, first=WARM)
    with torch.no_grad():
        ids = batch(seed=99)
        assert (model(ids).logits - source(ids).logits).abs().max() < 1e-2
