"""Helpers that turn a plan's index maps and scales into tensors."""

import torch

from growkern.planning.index_map import PAD


def full(plan, row, of):
    """Return the product of one vector per axis, in the target's shape."""
    shape = plan.shapes(row)[1]
    out = torch.ones(shape, dtype=torch.float64)
    for axis, this in enumerate(plan.axis_maps(row)):
        view = [1] * len(shape)
        view[axis] = -1
        out = out * of(this).double().view(view)
    return out


def gathered(plan, row, t):
    """Gather a source tensor into the target's shape, without scales; pads are zero."""
    for axis, this in enumerate(plan.axis_maps(row)):
        index = torch.tensor([max(i, 0) for i in this.index_map.indices])
        t = t.index_select(axis, index)
    return t * full(
        plan, row, lambda a: torch.tensor([float(i != PAD) for i in a.index_map.indices])
    )


def grad_scale(plan, row):
    return full(plan, row, lambda a: torch.tensor(a.grad_scale.expanded(), dtype=torch.float64))
