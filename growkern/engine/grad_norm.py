"""The law's factor of a growth on the global gradient norm: from gradients in flight, else from second moments. No target is read."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import inf, prod, sqrt

import torch
from torch import Tensor

from growkern.distributed.shards import box_of, is_sharded, local, n_parts
from growkern.execution.measures import CHUNK, MOST, norms_of
from growkern.optimizer.update_scale import UpdateScale
from growkern.planning.axis_scales import squares_of
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.planning.vector import Vector
from growkern.support.dtypes import arithmetic
from growkern.support.named_tensors import Tensors

# per axis of a source: the sum of squared gradient scales over the copies of each coordinate
Shares = tuple[Vector, ...]


def grad_norm_factor(
    plan: GrowthPlan,
    tensors: Tensors,
    held: Mapping[str, Tensor],
    update_scales: Sequence[UpdateScale] = (),
    n_ranks: int = 1,
    total_of: Callable[[Tensor], Tensor] = lambda own: own,
) -> float | None:
    """Return the factor on the global gradient norm, pads and new blocks left out.

    Args:
        plan: The plan.
        tensors: Source tensors by name.
        held: Parameter name -> the tensor that the optimizer holds for it.
        update_scales: The ``UpdateScale`` of the optimizers, which convert their second moments to the units of gradients.
        n_ranks: Number of processes that have a part of the tensors.
        total_of: Adds numbers of all these processes.

    Returns:
        The factor; None without gradients and second moments, where they are all 0 or not finite, or where weights are perturbed.
    """
    if any(row.is_perturbed for row in plan.tensors):
        return None
    order, before, after = 2 if tensors.grads else 1, 0.0, 0.0
    plain: dict[object, list[tuple[Tensor, float, float]]] = defaultdict(list)
    for name, (own, shares) in _shares_of(plan).items():
        square: object = tensors.states.get(name, {}).get("exp_avg_sq")
        kept = t = tensors.grads.get(name) if tensors.grads else square
        if not isinstance(t, Tensor) or not t.numel():
            continue
        for scale in () if tensors.grads else update_scales:
            t = scale.second_moment(held[name], t)
        factors = [_uniform(each) for each in shares]
        known = [factor for factor in factors if factor is not None]
        once = n_parts(t) / n_ranks  # replicas count once, together
        if t is kept and len(known) == len(factors) and own:
            plain[t.device, t.dtype].append((local(t), once, once * sum(known)))
            continue
        # summed now: a converted moment is a copy, and is not kept
        total = once * float(norms_of([local(t)], order).double().pow(order))
        before += own * total
        after += sum(known) * total
        after += once * sum(_weighted(t, each, order) for each in shares if _uniform(each) is None)
    for group in plain.values():
        totals = norms_of([t for t, *_ in group], order).double().pow(order)
        factors = [factors for _, *factors in group]
        sums = totals @ torch.tensor(factors, dtype=torch.float64, device=totals.device)
        before, after = (a + float(b) for a, b in zip((before, after), sums.cpu(), strict=True))
    both = total_of(torch.tensor([before, after], dtype=torch.float64))
    before, after = float(both[0]), float(both[1])
    return sqrt(after / before) if 0 < before < inf and 0 < after < inf else None


def _shares_of(plan: GrowthPlan) -> dict[str, tuple[bool, list[Shares]]]:
    """Return, per source tensor, whether the target has it, and the shares of its copies in each tensor that copies it."""
    found: dict[str, tuple[bool, list[Shares]]] = {}
    squares: dict[tuple[object, ...], Shares] = {}  # of rows with these axes and factors

    def shares_of(row: TensorRow) -> Shares:
        key = row.axes, row.factor, row.grad_factor
        if key not in squares:
            axes = plan.axis_maps(row)
            squares[key] = tuple(squares_of(axis.index_map, axis.grad_scale) for axis in axes)
        return squares[key]

    def add(name: str, own: bool, shares: Shares) -> None:
        known, several = found.get(name, (False, []))
        found[name] = known or own, [*several, shares]

    for row in plan.tensors:
        if row.new or row.constant is not None:
            continue
        shares, at = shares_of(row), row.next_layer_axis
        if row.next_layer_source is not None:
            axis = plan.axis_maps(row)[at]
            first = squares_of(axis.index_map.first_copies(), axis.grad_scale)
            later = shares[at].zip(first, lambda every, one: every - one)
            add(row.next_layer_source, False, (*shares[:at], later, *shares[at + 1 :]))
            shares = *shares[:at], first, *shares[at + 1 :]
        add(row.source, True, shares)
    return found


def _uniform(shares: Shares) -> float | None:
    """Return the factor on the sum of squares of a source, the same for all its elements; None if it differs between elements."""
    factors = [vector.uniform for vector in shares]
    known = [factor for factor in factors if factor is not None]
    return prod(known) if len(known) == len(factors) else None


def _weighted(t: Tensor, shares: Shares, order: int) -> float:
    """Return the sum of the elements (``order`` 1) or of their squares, times the shares of their coordinates."""
    at = box_of(t, t.shape).slices if is_sharded(t) else [slice(None)] * t.dim()
    t, dtype = local(t), arithmetic(t.dtype)
    rows, *others = (
        torch.tensor(v.expanded()[part], dtype=dtype, device=t.device)
        for v, part in zip(shares, at, strict=True)
    )
    columns = torch.ones(1, dtype=dtype, device=t.device)
    for other in others:
        columns = torch.outer(columns, other).flatten()
    matrix = t.reshape(len(rows), len(columns))
    step = max(1, (CHUNK if t.device.type == "cpu" else MOST) // max(1, len(columns)))
    parts: list[Tensor] = []
    for start in range(0, len(rows), step):
        chunk = matrix[start : start + step].to(dtype)
        parts.append(
            rows[start : start + step] @ ((chunk.square() if order == 2 else chunk) @ columns)
        )
    return float(torch.stack(parts).double().sum()) if parts else 0.0
