"""The meaning of the kernel ``growkern.kernels.inherit`` in torch, and the backend of a CPU."""

import torch
from torch import Tensor

from growkern.support.dtypes import arithmetic


def row_gradients(
    z: Tensor, labels: Tensor, index: Tensor | None, weight: Tensor | None, *, alpha: float, tau: float, scale: float, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace logits by their gradient; return cross entropy and divergence of each row. See the kernel's function of this name.

    The arithmetic is float64 for float64 logits and float32 for all others.
    """
    x = z.to(arithmetic(z.dtype)) * scale
    if cap is not None:
        x = cap * torch.tanh(x / cap)
    label = labels[:, None]
    lse = x.logsumexp(1, keepdim=True)
    ce = (lse - x.gather(1, label)).squeeze(1)
    kl = torch.zeros_like(ce)
    g = (x - lse).exp_().mul_(1 - alpha)
    g.scatter_add_(1, label, torch.full_like(lse, alpha - 1))
    if weight is not None:
        q, soft = weight.to(x.dtype), alpha * tau
        hot = x / tau
        lse_tau = hot.logsumexp(1, keepdim=True)
        at_teacher = hot if index is None else hot.gather(1, index)
        kl = (torch.xlogy(q, q) - q * (at_teacher - lse_tau)).sum(1)
        g.add_((hot - lse_tau).exp_().mul_(soft * q.sum(1, keepdim=True)))
        if index is None:
            g.sub_(soft * q)
        else:
            g.scatter_add_(1, index, -soft * q)
    g.mul_(scale if cap is None else scale * (1 - (x / cap) ** 2))
    z.copy_(g)
    return ce, kl
