"""Helpers that collect everything that a growth may change in a model and an optimizer, compare two collections, and inject failures."""

import copy

import torch


def state_of(model, optim, scheduler=None):
    """Collect everything that a growth may change, with bits and identities."""
    return {
        "params": [
            (n, id(p), p.shape, p.detach().clone(), p.data_ptr(), p.stride())
            for n, p in model.named_parameters()
        ],
        "grads": [
            None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()
        ],
        "buffers": [(n, id(b), b.clone()) for n, b in model.named_buffers()],
        "modules": [(n, id(m), _plain(vars(m))) for n, m in model.named_modules()],
        "config": copy.deepcopy(model.config.to_dict()),
        "groups": [(id(g), [id(p) for p in g["params"]], _plain(g)) for g in optim.param_groups],
        "state": [
            (id(p), {k: v.clone() for k, v in optim.state[p].items()}) for p in list(optim.state)
        ],
        "scheduler": copy.deepcopy({k: v for k, v in vars(scheduler).items() if k != "optimizer"})
        if scheduler
        else None,
    }


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def fail_at(monkeypatch, owner, name, error, call=1) -> list[str]:
    """Let a function raise after its work from the call numbered ``call`` on; return a list that has one item per failure."""
    original, calls, failures = getattr(owner, name), [], []

    def fails(*args, **kwargs):
        calls.append(name)
        result = original(*args, **kwargs)  # the work must be undone
        if len(calls) >= call:
            failures.append(name)
            raise error
        return result

    monkeypatch.setattr(owner, name, fails)
    return failures


def _plain(values):
    return {k: v for k, v in values.items() if isinstance(v, (int, float, tuple, str, bool))}
