"""The formulas of knowledge inheritance as plain torch, position by position, for the tests of ``growkern.inherit``."""

import torch
import torch.nn.functional as F
from torch import Tensor


def logits_of(hidden, weight, bias=None, scale=1.0, cap=None):
    z = F.linear(hidden, weight, bias) * scale
    return z if cap is None else cap * torch.tanh(z / cap)


def formula(z: Tensor, labels: Tensor, teacher: Tensor, alpha: float, tau: float) -> Tensor:
    """Return the mean over the predicted positions of ``(1 - alpha) CE + alpha tau^2 KL``; ``teacher`` has a weight per column (n, V)."""
    total, n = z.new_zeros(()), 0
    for row, label, q in zip(z, labels.tolist(), teacher, strict=True):
        if label == -100:
            continue
        logp, logp_tau = F.log_softmax(row, 0), F.log_softmax(row / tau, 0)
        kl = sum(q[k] * (q[k].log() - logp_tau[k]) for k in q.nonzero().flatten().tolist())
        total, n = total - (1 - alpha) * logp[label] + alpha * tau**2 * kl, n + 1
    return total / max(n, 1)


def spread(index: Tensor, weight: Tensor, width: int) -> Tensor:
    """Return columns and weights (n, K) as a weight per column (n, V); column -1 is padding."""
    dense = torch.zeros(len(index), width, dtype=weight.dtype)
    for row, at, w in zip(dense, index.tolist(), weight, strict=True):
        for k, column in enumerate(at):
            if column >= 0:
                row[column] += w[k]
    return dense


def distillation(z: Tensor, teacher_logits: Tensor, tau: float) -> Tensor:
    """Return the usual distillation loss of torch."""
    targets = F.softmax(teacher_logits / tau, -1)
    return F.kl_div(F.log_softmax(z / tau, -1), targets, reduction="batchmean") * tau**2
