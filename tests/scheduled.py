"""Helpers that train a model under a growth schedule."""

import torch
from models import batch, loss_of

from growkern.training.schedule import GrowthSchedule
from growkern.training.triggers import At

WIDER, DEEPER = {"hidden": 48}, {"layers": 3}


def optimizer(model, kind="adamw", **options):
    kinds = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
    return kinds[kind](model.parameters(), lr=1e-2, **options)


def run(model, optim, steps, *, first=0, each=lambda i, loss: None, scheduler=None):
    for i in range(first, first + steps):
        loss = loss_of(model, batch(seed=i))
        optim.zero_grad()
        loss.backward()
        optim.step()
        if scheduler is not None:
            scheduler.step()
        each(i, loss)


def same_weights(one, other):
    assert dict(one.named_parameters()).keys() == dict(other.named_parameters()).keys()
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


def schedule_at(*steps, **options):
    return GrowthSchedule([At(step=step, **options) for step in steps])


def halves(model: torch.nn.Module) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
    """Return the matrices of the blocks, and all other parameters."""
    halves = [], []
    for name, p in model.named_parameters():
        halves[not (p.dim() == 2 and (".0." in name or ".1." in name))].append(p)
    return halves


def pair(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon of the matrices and AdamW of the rest."""
    matrices, rest = halves(model)
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    return [muon, torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.1)]
