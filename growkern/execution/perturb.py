"""Change a grown weight apart from the law's scales: shrink it, add noise of a given standard deviation, shift it by the model's offset."""

import torch
from torch import Tensor

from growkern.distributed.shards import Box
from growkern.execution.torch_backend import BYTES_STD, axis_keys, normal, tensor_id
from growkern.planning.growth_plan import AxisMap, TensorRow
from growkern.support.dtypes import arithmetic

MOST = 1 << 22  # elements at once


def perturb(row: TensorRow, seed: int, target: Tensor) -> None:
    """Change a target in place to ``shrink * target + noise_std * noise`` from ``noise_from`` on; every device draws the same noise.

    Args:
        row: Row of the tensor in the plan, with ``shrink``, ``noise_std`` and ``noise_from``, a coordinate of the first axis.
        seed: Seed of the plan.
        target: The grown weight, of any floating-point dtype.
    """
    if not target.is_floating_point() or not target[row.noise_from :].numel():
        return
    matrix, dtype = target[row.noise_from :].view(-1, target.shape[-1]), arithmetic(target.dtype)
    n_rows, n_cols = matrix.shape
    keys = axis_keys(seed, tensor_id(row.name))
    ids = torch.arange(max(n_rows, n_cols), dtype=torch.int32, device=target.device)
    step = max(1, MOST // n_cols)
    for start in range(0, n_rows, step):
        part = matrix[start : start + step]
        values = part.to(dtype) * row.shrink
        if row.noise_std:
            drawn = normal(keys, ids[start : start + len(part)], ids[:n_cols])
            values += drawn.to(dtype) * (row.noise_std / BYTES_STD)
        part.copy_(values)


def shift(row: TensorRow, axis: AxisMap, target: Tensor, box: Box | None) -> None:
    """Change ``s w`` to ``s (w + offset) - offset`` in place, for a target of one axis, or the part of it in a box."""
    shifts = [row.offset * (s - 1) for s in axis.weight_scale.expanded()]
    shifts = shifts if box is None else shifts[box.slices[0]]
    if any(shifts):
        target += torch.tensor(shifts, dtype=arithmetic(target.dtype), device=target.device)
