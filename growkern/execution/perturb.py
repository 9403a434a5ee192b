"""Change a grown weight apart from the law's scales: shrink it, add noise of a given standard deviation, shift it by the model's offset."""

from math import prod

import torch
from torch import Tensor

from growkern.distributed.shards import Box
from growkern.execution.tiles import Job
from growkern.execution.torch_backend import BYTES_STD, axis_keys, normal, tensor_id
from growkern.planning.growth_plan import AxisMap, GrowthPlan, TensorRow
from growkern.support.dtypes import arithmetic

MOST = 1 << 22  # elements at once


def finish(job: Job, plan: GrowthPlan) -> None:
    """Shift and perturb the written target of a weight, where its row says so."""
    row = job.row
    if row.offset and row.constant is None and job.rule.is_weight:
        shift(row, plan.axis_maps(row)[0], job.target, job.box)
    if row.is_perturbed and job.rule.is_weight:
        perturb(row, plan.seed, job.target, job.box)


def perturb(row: TensorRow, seed: int, target: Tensor, box: Box | None = None) -> None:
    """Change a target in place to ``shrink * target + noise_std * noise`` from ``noise_from`` on; every device draws the same noise.

    Args:
        row: Row of the tensor in the plan, with ``shrink``, ``noise_std`` and ``noise_from``, a coordinate of the first axis.
        seed: Seed of the plan.
        target: The grown weight, of any floating-point dtype, or the part of it in ``box``.
        box: The box; None for the whole weight.
    """
    box = box or Box(tuple((0, n) for n in target.shape), tuple(target.shape))
    first = max(0, row.noise_from - box.ranges[0][0])
    if not target.is_floating_point() or not target[first:].numel():
        return
    matrix, dtype = target[first:].view(-1, target.shape[-1]), arithmetic(target.dtype)
    n_rows, n_cols = matrix.shape
    keys = axis_keys(seed, tensor_id(row.name))
    # counters of the whole weight from ``noise_from`` on, so that a box draws its part of the whole weight's noise
    *sizes, n_all_cols = box.shape
    *places, of_cols = box.slices
    ids = torch.arange(max(prod(sizes), n_all_cols), dtype=torch.int32, device=target.device)
    row_ids = ids[: prod(sizes)].view(sizes)[tuple(places)][first:].flatten()
    row_ids, col_ids = row_ids - row.noise_from * prod(sizes[1:]), ids[of_cols]
    step = max(1, MOST // n_cols)
    for start in range(0, n_rows, step):
        part = matrix[start : start + step]
        values = part.to(dtype) * row.shrink
        if row.noise_std:
            drawn = normal(keys, row_ids[start : start + len(part)], col_ids)
            values += drawn.to(dtype) * (row.noise_std / BYTES_STD)
        part.copy_(values)


def shift(row: TensorRow, axis: AxisMap, target: Tensor, box: Box | None) -> None:
    """Change ``s w`` to ``s (w + offset) - offset`` in place, for a target of one axis, or the part of it in a box."""
    shifts = [row.offset * (s - 1) for s in axis.weight_scale.expanded()]
    shifts = shifts if box is None else shifts[box.slices[0]]
    if any(shifts):
        target += torch.tensor(shifts, dtype=arithmetic(target.dtype), device=target.device)
