"""The steps of AdamW in which no tensor has moved since the step before: the host compares numbers instead of looking at every tensor.

The comparisons run over lists, in C. Whatever differs leads back to the full step.
"""

from collections.abc import Callable, Sequence
from ctypes import c_double, c_float
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from growkern.optimizer.adamw_torch import Update

GRAD, DTYPE, LAYOUT, SHAPE = map(attrgetter, ("grad", "dtype", "layout", "shape"))
ADDRESS: Callable[[Tensor], int] = Tensor.data_ptr
NUMBERS: dict[torch.dtype, type[c_float] | type[c_double]] = {torch.float32: c_float, torch.float64: c_double}  # fmt: skip
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
OPTIONS = (
    "amsgrad",
    "capturable",
    "differentiable",
)  # of a param group; all others are read in every step


class Steady:
    """What a full step has found of an optimizer whose tensors the kernel updates, in numbers: no tensor is kept alive.

    Attributes:
        device: Device of the parameters.
        seen: All that the kernel's table was built from.
        counts: The numbers in the memory of the step counts, which is there as long as ``holds``.
        grads: Addresses of the gradients when ``holds`` was asked last.
    """

    def __init__(self, device: torch.device, seen: tuple[Any, ...], steps: Sequence[Tensor]) -> None:  # fmt: skip
        self.device, self.seen = device, seen
        self.counts = [NUMBERS[step.dtype].from_address(step.data_ptr()) for step in steps]
        self.grads: list[int] = []

    @staticmethod
    def of(optim: Optimizer, updates: Sequence[tuple[Update, bool]]) -> "Steady | None":
        """Return what a full step has found; None where the kernel did not update every parameter of the optimizer, on one device.

        All tensors are contiguous, so that one whose strides change is seen to be contiguous no more.
        """
        params = [p for group in optim.param_groups for p in group["params"]]
        if [id(u.p) for u, _ in updates] != [*map(id, params)] or not params:
            return None
        steps = [u.step for u, _ in updates]
        fit = all(fits and not u.slices for u, fits in updates) and all(map(_is_number, steps))
        if not fit or len({u.p.device for u, _ in updates}) > 1:
            return None
        _, seen = _seen(optim)
        return Steady(params[0].device, seen, steps) if seen and all(seen[0]) else None

    def holds(self, optim: Optimizer) -> bool:
        """True if the optimizer is as it was after its last step, but for values, new gradients and hyperparameters."""
        self.grads, seen = _seen(optim)
        return seen == self.seen

    def count(self) -> list[float]:
        """Count the step in memory, and return the counts, which anybody may have written; torch takes a microsecond for each."""
        for count in self.counts:
            count.value += 1
        return [count.value for count in self.counts]


def _is_number(step: Tensor) -> bool:
    """True for a step count in the memory of the host."""
    return type(step) is Tensor and step.device.type == "cpu" and step.dtype in NUMBERS and step.numel() == 1  # fmt: skip


def _seen(optim: Optimizer) -> tuple[list[int], tuple[Any, ...]]:
    """Return the addresses of the gradients, and what the table of a step depends on; contiguity of all tensors is first.

    The latter is empty where a gradient or a state is missing.
    """
    groups = optim.param_groups
    params: list[Tensor] = [p for group in groups for p in group["params"]]
    grads: list[Any] = [*map(GRAD, params)]
    states: list[Any] = [*map(optim.state.get, params)]
    if (
        {*map(type, grads)} != {Tensor}
        or {*map(LAYOUT, grads)} != {torch.strided}
        or not all(states)
    ):
        return [], ()
    held = [[state.get(key) for state in states] for key in ("step", *MOMENTS)]
    steps, *moments = held
    tensors = [t for row in moments for t in row if t is not None]
    options = [[len(group["params"]), *(group[key] for key in OPTIONS)] for group in groups]
    options += [[isinstance(x, Tensor) for x in (group["lr"], *group["betas"])] for group in groups]
    addresses = [*map(ADDRESS, grads)]
    return addresses, (
        [*map(Tensor.is_contiguous, chain(grads, params, tensors))], [at % 16 for at in addresses], [*map(DTYPE, grads)],
        options, [*map(id, params)], [*map(ADDRESS, params)], [*map(SHAPE, params)], [*map(DTYPE, params)],
        [*map(len, states)], [*map(id, tensors)], [*map(ADDRESS, tensors)], [*map(DTYPE, tensors)],
        [*map(id, steps)], [*map(ADDRESS, steps)], [*map(DTYPE, steps)],
    )  # fmt: skip
