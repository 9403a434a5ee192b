"""Norms and root mean squares of tensors, and the sizes of the steps in which a CPU and a GPU read them.

On a CPU every tensor is read by one thread (``of_each``): an operator on all cores waits for the slowest core at every tensor.
"""

from collections.abc import Callable, Iterator, Sequence
from math import inf

import torch
from torch import Tensor

from growkern.distributed.gather import Gather
from growkern.distributed.shards import local
from growkern.support.dtypes import arithmetic
from growkern.support.threads import CHUNK, SMALL, read_each

MOST = 1 << 24  # elements of temporaries on a GPU


def chunks(tensor: Tensor, axis: int = 0) -> Iterator[Tensor]:
    """Yield a tensor in its arithmetic's dtype: a low-precision tensor in chunks along an axis, to avoid a copy of the whole tensor."""
    dtype = arithmetic(tensor.dtype)
    if tensor.dtype == dtype or tensor.dim() == 0:
        yield tensor.to(dtype)
        return
    n = tensor.shape[axis]
    step = max(1, CHUNK * n // max(1, tensor.numel()))
    for start in range(0, n, step):
        yield tensor.narrow(axis, start, min(step, n - start)).to(dtype)


def of_each(function: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a function of each tensor, of one device; on a CPU, tensors that are large together are read by several threads."""
    made = [*tensors]

    def one(i: int) -> None:
        made[i] = function(tensors[i])

    read_each(range(len(tensors)), one, tensors.__getitem__)
    return made


def norms_of(tensors: Sequence[Tensor], order: int) -> Tensor:
    """Return each tensor's norm of order 2 or 1 (1: no negative elements). All tensors have one device and one arithmetic dtype."""
    dtype = arithmetic(tensors[0].dtype)
    if tensors[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(list(tensors), order, dtype=dtype))  # pyright: ignore

    def norm(tensor: Tensor) -> Tensor:
        parts = [tensor] if tensor.nbytes < SMALL else [*chunks(tensor)]
        norms: list[Tensor] = [
            part.sum(dtype=dtype) if order == 1 else torch.linalg.vector_norm(part, dtype=dtype)  # pyright: ignore
            for part in parts
        ]
        return norms[0] if len(norms) == 1 else torch.stack(norms).pow(order).sum().pow(1 / order)

    return torch.stack(of_each(norm, tensors))


SumsOf = Callable[[Sequence[Tensor], Tensor], Tensor]
KernelOf = Callable[[torch.device], SumsOf | None]


def roots_of_mean_squares(
    tensors: Sequence[Tensor], kernel: SumsOf | None = None, gather: Gather | None = None
) -> Tensor:
    """Return the root mean square of each tensor, float64 (n,), the same bits on every device and in every order of summation.

    All tensors have one device, one dtype and one placement. Elements are rounded to whole multiples of a power of two, at most 2**10 of
    them: the sum of up to 2**33 squares is exact, also as the sum of the sums of all processes.

    Args:
        tensors: The tensors.
        kernel: ``growkern.kernels.squares.sums_of_squares``, for tensors that it can read; None to sum by torch.
        gather: Gathers the numbers of all processes where the tensors are sharded.
    """

    def of_all(numbers: Tensor) -> Tensor:
        return numbers[None] if gather is None else gather.numbers(numbers, like=whole[0])

    whole, tensors = tensors, [local(tensor) for tensor in tensors]
    largest = of_all(_largest(tensors)).amax(0)
    dtype = arithmetic(tensors[0].dtype)
    least = -1012 if dtype == torch.float64 else -116  # 1 / unit is a number too
    exponents = torch.frexp(largest).exponent.clamp(min=least)
    units = torch.ldexp(torch.ones_like(largest), exponents - 10)
    inverses = units.reciprocal().to(dtype)
    counts = largest.new_tensor([tensor.numel() for tensor in whole])
    readable = all(t.numel() and t.is_contiguous() and t.data_ptr() % 16 == 0 for t in tensors)
    if kernel is not None and readable:
        sums = kernel(tensors, inverses).to(torch.float64).where(largest.isfinite(), largest)
    else:
        sums = _sums_of_squares(tensors, inverses)
    return (of_all(sums).sum(0) / counts).sqrt() * units


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    """Return the largest magnitude in each tensor, float64 (n,); 0 for an empty one."""
    filled = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if filled[0].device.type == "cpu":
        return torch.stack(of_each(_magnitude, filled)).to(torch.float64)
    return torch.stack(torch._foreach_norm(filled, inf)).to(torch.float64)  # pyright: ignore


def _magnitude(tensor: Tensor) -> Tensor:
    """Return the largest magnitude; torch vectorizes ``aminmax`` on a CPU, and the norm of order infinity not."""
    low, high = tensor.aminmax()
    return torch.maximum(-low, high)


def _sums_of_squares(tensors: Sequence[Tensor], inverses: Tensor) -> Tensor:
    """Return the sum of squares of each tensor in whole units, float64 (n,)."""
    sums = torch.empty(len(tensors), dtype=torch.float64, device=inverses.device)
    most_at_once = CHUNK if inverses.device.type == "cpu" else MOST

    def add(job: tuple[Tensor, Tensor, Tensor]) -> None:
        tensor, inverse, total = job
        if tensor.numel() <= most_at_once:
            total.copy_(_squares(tensor, inverse))
            return
        parts: tuple[Tensor, ...] = torch.split(tensor.flatten(), most_at_once)
        total.copy_(torch.stack([_squares(part, inverse) for part in parts]).sum())

    jobs = [*zip(tensors, inverses.unbind(), sums.unbind(), strict=True)]
    read_each(jobs, add, lambda job: job[0])
    return sums


def _squares(part: Tensor, inverse: Tensor) -> Tensor:
    return (part.to(inverse.dtype) * inverse).round_().square_().sum(dtype=torch.float64)
