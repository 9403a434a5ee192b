"""The meaning of the kernel ``growkern.kernels.inherit`` in torch, and the backend of a CPU."""

from typing import cast

import torch
from torch import Tensor

from growkern.support.dtypes import arithmetic


def row_gradients(
    z: Tensor, labels: Tensor, index: Tensor | None, weight: Tensor | None, *, alpha: float, tau: float, scale: float, cap: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Replace logits by their gradient; return cross entropy and divergence of each row. See the kernel's function of this name.

    The arithmetic is float64 for float64 logits and float32 for all others.
    """
    x = z.to(arithmetic(z.dtype))
    x = x if scale == 1 else x * scale
    x = x if cap is None else cap * torch.tanh(x / cap)
    label = labels[:, None]
    lse = x.logsumexp(1, keepdim=True)
    ce = (lse - x.gather(1, label)).squeeze(1)
    # not -inf: 0 of the teacher times it is 0
    hot = None if weight is None else (x / tau).clamp_min_(torch.finfo(x.dtype).min)
    g = torch.sub(x, lse, out=x) if cap is None else x - lse
    g.exp_().mul_(1 - alpha).scatter_add_(1, label, torch.full_like(lse, alpha - 1))
    kl = torch.zeros_like(ce)
    if weight is not None and hot is not None:
        q, soft = weight.to(x.dtype), alpha * tau
        mass, lse_tau = q.sum(1, keepdim=True), hot.logsumexp(1, keepdim=True)
        at_teacher = hot if index is None else hot.gather(1, index)
        negative_entropy = torch.xlogy(q, q).sum(1)
        crossed = cast(Tensor, torch.linalg.vecdot(q, at_teacher))
        kl = negative_entropy - crossed + (mass * lse_tau).squeeze(1)
        g.addcmul_(hot.sub_(lse_tau).exp_(), mass, value=soft)
        if index is None:
            g.sub_(q, alpha=soft)
        else:
            g.scatter_add_(1, index, -soft * q)
    if cap is not None:
        g.mul_(1 - (x / cap) ** 2)
    if scale != 1:
        g.mul_(scale)
    if g is not z:
        z.copy_(g)
    return ce, kl
