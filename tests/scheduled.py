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
