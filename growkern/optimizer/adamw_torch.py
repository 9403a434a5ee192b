"""AdamW with slices in torch: the reference of ``kernels/adamw.py``, and the backend of sliced parameters on a CPU.

A parameter is seen as a matrix: its last axis is the columns C, all other axes, flattened, are the rows R. A 1-d parameter is one
row, a 0-d parameter is 1 x 1.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from growkern.distributed.shards import box_of, local
from growkern.optimizer.state_rules import SLICES
from growkern.support.dtypes import arithmetic

BLOCK = 1 << 18  # elements per block: temporaries stay in cache, and every thread has work


class Hyper(NamedTuple):
    """Hyperparameters that all tensors of a param group share at one step."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    maximize: bool


class Update(NamedTuple):
    """One parameter at one step.

    Attributes:
        p, grad, exp_avg, exp_avg_sq: Tensors of one shape; so is ``max_exp_avg_sq``, which is None without amsgrad.
        step: Step count, 0-d, this step included.
        hyper: Hyperparameters of the param group; one object for all tensors of the group.
        slices: Slice key -> vector; empty without slices. Other keys are ignored, so the parameter's state can be passed.
    """

    p: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    max_exp_avg_sq: Tensor | None
    step: Tensor
    hyper: Hyper
    slices: Mapping[str, Tensor]


def sizes(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a parameter: ``(2, 3, 5)`` -> ``(6, 5)``."""
    return math.prod(shape[:-1]), shape[-1] if shape else 1


def length(key: str, shape: Sequence[int]) -> int:
    """Length of a slice vector of a parameter."""
    return 2 if key == "rewarm" else sizes(shape)[key.endswith("_cols")]


def own_part(u: Update) -> Update:
    """Return the update of the part of a sharded parameter that this process holds."""
    places: Any = u.p
    grad: Any = u.grad
    if grad.placements != places.placements:  # of a tensor parallel layer, not yet reduced
        grad = grad.redistribute(placements=places.placements)
    leading = u.p.shape[:-1]
    *rows, cols = box_of(u.p, u.p.shape).slices or (slice(None),)

    def cut(key: str, v: Tensor) -> Tensor:
        if key == "rewarm":
            return v
        return v[cols] if key.endswith("_cols") else v.view(leading)[tuple(rows)].flatten()

    slices = {key: cut(key, u.slices[key]).contiguous() for key in SLICES if key in u.slices}
    top = u.max_exp_avg_sq if u.max_exp_avg_sq is None else local(u.max_exp_avg_sq)
    moments = local(u.exp_avg), local(u.exp_avg_sq)
    return Update(local(u.p), local(grad), *moments, top, u.step, u.hyper, slices)


def adamw(
    updates: Sequence[Update], grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    """Update parameters and moments in place, computed in float32 (float64 for float64) and rounded once, when stored.

    Args:
        updates: Parameters to update; their step counts include this step.
        grad_scale: Divisor of the gradients. Divided gradients are written back, as in torch's fused AdamW.
        found_inf: If not 0, nothing is updated.
    """
    if found_inf is not None and found_inf.item():
        return
    scratch: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
    for u in updates:
        tensors = [u.p, u.grad, u.exp_avg, u.exp_avg_sq]
        tensors += [] if u.max_exp_avg_sq is None else [u.max_exp_avg_sq]
        if not u.p.numel():
            continue
        n_rows, n_cols = sizes(u.p.shape)
        slices = {key: u.slices[key] for key in SLICES if key in u.slices}
        dense = [t.contiguous() for t in tensors]  # other layouts have no matrix view
        matrices = [t.view(n_rows, n_cols) for t in dense]
        n = max(1, BLOCK // n_cols)
        for start in range(0, n_rows, n):
            part = slice(start, start + n)
            cut = {key: v[part] if key.endswith("_rows") else v for key, v in slices.items()}
            _matrix([t[part] for t in matrices], u, cut, grad_scale, scratch)
        for t, new in zip(tensors, dense, strict=True):
            if new is not t and (t is not u.grad or grad_scale is not None):
                t.copy_(new)


def _matrix(
    tensors: Sequence[Tensor],
    u: Update,
    slices: Mapping[str, Tensor],
    scale: Tensor | None,
    scratch: dict[tuple[str, torch.dtype, torch.device], Tensor],
) -> None:
    """Update a block of rows. Temporaries are reused from ``scratch``, because the pages of new allocations are cold."""
    p, grad, exp_avg, exp_avg_sq, *tops = tensors
    dtype, h, step = arithmetic(p.dtype), u.hyper, u.step.item()
    rows = {k.removesuffix("_rows"): v[:, None] for k, v in slices.items() if k.endswith("_rows")}
    cols = {k.removesuffix("_cols"): v[None, :] for k, v in slices.items() if k.endswith("_cols")}

    def room(name: str) -> Tensor:
        return _room(p, dtype, scratch, name)

    def held(name: str, t: Tensor) -> Tensor:
        return t if t.dtype == dtype else room(name).copy_(t)

    def least(sides: Sequence[Tensor]) -> Tensor:
        """Minimum over rows and columns: the values grow with the own step count, so an element has the value of its younger side."""
        return sides[0] if len(sides) == 1 else torch.minimum(*sides, out=room("least"))

    g = held("g", grad)
    if scale is not None:
        g = torch.div(g, scale.to(g.device, dtype), out=room("g"))
        grad.copy_(g)
    g = torch.neg(g, out=room("g")) if h.maximize else g
    m, v = held("m", exp_avg), held("v", exp_avg_sq)
    m.lerp_(g, 1 - h.beta1)
    v.mul_(h.beta2).addcmul_(g, g, value=1 - h.beta2)
    top = v
    for t in tops:
        top = torch.maximum(held("top", t), v, out=room("top"))
        t.copy_(top)

    unit = p.new_ones((1, 1), dtype=dtype)
    born = [side["born"] for side in (rows, cols) if "born" in side]
    ages = [(step - b).clamp_(min=1) for b in born] or [unit * step]
    risen1, risen2 = ([-torch.expm1(t * log(beta)) for t in ages] for beta in (h.beta1, h.beta2))
    update = torch.sqrt(top, out=room("update"))
    update.div_(least([r.sqrt_() for r in risen2]))
    update.addcmul_(rows.get("eps", unit) * h.eps, cols.get("eps", unit))
    torch.div(m, update, out=update)
    update.mul_(rows.get("lr", unit) * h.lr).div_(least(risen1))
    if "lr" in cols:
        update.mul_(cols["lr"])
    if born and "rewarm" in slices:
        part = least(_warmed(born, ages, slices["rewarm"][1]))
        update.mul_(part.masked_fill_(part > 1, 0).mul_(slices["rewarm"][0] - 1).add_(1))

    new = held("p", p)
    if h.weight_decay:
        decay = rows.get("decay", unit) * (h.lr * h.weight_decay)
        if "decay" in rows and "decay" in cols:
            keep = torch.mul(decay, cols["decay"], out=room("least")).neg_().add_(1)
        else:
            keep = 1 - decay * cols.get("decay", unit)
        new.mul_(keep)
    new.sub_(update)
    _written(((p, new), (exp_avg, m), (exp_avg_sq, v)))


def _written(results: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy results that were not computed in place."""
    for t, value in results:
        if value is not t:
            t.copy_(value)


def _room(
    p: Tensor,
    dtype: torch.dtype,
    scratch: dict[tuple[str, torch.dtype, torch.device], Tensor],
    name: str,
) -> Tensor:
    """Return a temporary of the shape of ``p``, in memory that is reused."""
    key = name, dtype, p.device
    if key not in scratch or scratch[key].numel() < p.numel():
        scratch[key] = torch.empty(p.numel(), dtype=dtype, device=p.device)
    return scratch[key][: p.numel()].view(p.shape)


def _warmed(born: Sequence[Tensor], ages: Sequence[Tensor], tau: Tensor) -> list[Tensor]:
    """Progress ``min(t / tau, 1)`` of the re-warm-up of rows and columns created after step 0; 2 for all others."""
    return [
        torch.where(b > 0, (t / tau).clamp_(max=1), 2.0) for b, t in zip(born, ages, strict=True)
    ]


def log(beta: float) -> float:
    """Logarithm of a beta, finite for 0. ``-expm1(t * log(beta))`` is ``1 - beta**t`` without cancellation for small t."""
    return math.log(max(beta, 1e-300))
