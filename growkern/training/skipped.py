"""Which calls of ``optim.step`` are no steps of training."""

import torch
from torch import Tensor
from torch.optim import Optimizer

from growkern.distributed.shards import local


def is_skipped(optim: Optimizer) -> bool:
    """Return True in a post-hook of a step that trains nothing.

    A CUDA graph records a step and does not run it. ``GradScaler`` calls a fused optimizer on overflow too, and the optimizer skips the
    update itself. Checkpoints of torch (``torch.distributed.checkpoint.state_dict``) create the state of a new optimizer by a step whose
    rates and gradients are 0.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return True
    # The optimizer's step count would show an overflow, but reading the count would synchronize the device at every step. Only
    # GradScaler sets found_inf.
    overflow = getattr(optim, "found_inf", None)
    if isinstance(overflow, Tensor) and overflow.item():
        return True
    for lr in (group.get("lr") for group in optim.param_groups):
        on_device = isinstance(lr, Tensor) and lr.device.type != "cpu"
        if lr is None or on_device or lr:
            return False
    grads = (p.grad for group in optim.param_groups for p in group["params"])
    return not any(bool(local(grad).any()) for grad in grads if grad is not None)
