"""Factors on the elements of a parameter, as one vector or number per axis, and their arithmetic in place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from growkern.distributed.shards import box_of, is_sharded, local

Factor = float | Tensor  # along one axis: one number, or one per coordinate, (n,)


@dataclass(frozen=True, eq=False)
class Scale:
    """Factors of one parameter, one entry per axis. The factor of an element is the product of its factors along all axes.

    Attributes:
        update: ``s``, the factor on the optimizer's update.
        units: Divisor of the parameter while the optimizer sees it; None for ``s``.
        grad: ``a``, the divisor of the gradient.
        gain: Factor on the update without its decoupled weight decay, for steps of a matrix as a whole (Muon).
        offset: Constant that the model adds to the parameter; their sum is converted.

    Example:
        >>> rows = torch.ones(len(model.lm_head.weight))
        >>> rows[:10] = 0.5
        >>> growkern.UpdateScale(optim, {model.lm_head.weight: growkern.Scale((rows, 1.0))})
        UpdateScale(AdamW, 1 parameters)
    """

    update: tuple[Factor, ...]
    grad: tuple[Factor, ...] = ()
    gain: float = 1.0
    units: tuple[Factor, ...] | None = None
    offset: float = 0.0

    @property
    def seen(self) -> tuple[Factor, ...]:
        """Divisor of the parameter while the optimizer sees it, one entry per axis; ``units``, or else ``update``."""
        return self.update if self.units is None else self.units


def times(one: Scale | None, other: Scale | None) -> Scale:
    """Return the scale that applies two scales of one parameter, one after the other; None scales nothing."""
    if one is None or other is None:
        return one or other or Scale(())
    ones = (1.0,) * len(one.update)

    def product(left: tuple[Factor, ...], right: tuple[Factor, ...]) -> tuple[Factor, ...]:
        return tuple(x * y for x, y in zip(left or ones, right or ones, strict=True))

    own = one.units is None and other.units is None
    units = None if own else product(one.seen, other.seen)
    update, grad = product(one.update, other.update), product(one.grad, other.grad)
    return Scale(update, grad, one.gain * other.gain, units, one.offset or other.offset)


def _vectors(t: Tensor, factors: tuple[Factor, ...]) -> list[Factor]:
    """Factors in shapes that broadcast over a tensor, without scalar factors 1."""
    vectors: list[Factor] = []
    for axis, factor in enumerate(factors):
        if isinstance(factor, Tensor):
            shape = [1] * t.dim()
            shape[axis] = len(factor)
            vectors.append(factor.view(shape))
        elif factor != 1.0:
            vectors.append(factor)
    return vectors


def _held(t: Tensor, factors: tuple[Factor, ...]) -> tuple[Tensor, tuple[Factor, ...]]:
    """Return the part of a tensor that this process holds, and its factors."""
    if not is_sharded(t):
        return t, factors
    at = box_of(t, t.shape).slices
    cut = (f[at[i]] if isinstance(f, Tensor) else f for i, f in enumerate(factors))
    return local(t), tuple(cut)


def raised(factor: Factor, power: float, n: int) -> Factor:
    """Power of a factor along a state axis of size ``n``; its mean where the state is an average over the axis (``n`` is 1)."""
    factor = factor**power
    return float(factor.mean()) if isinstance(factor, Tensor) and n == 1 else factor


def divide_(t: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """Divide a tensor in place by one factor per axis."""
    own, factors = _held(t, factors)
    for factor in _vectors(own, factors):
        own.div_(factor)
    return t


def multiply_(t: Tensor, factors: tuple[Factor, ...]) -> Tensor:
    """Multiply a tensor in place by one factor per axis."""
    own, factors = _held(t, factors)
    for factor in _vectors(own, factors):
        own.mul_(factor)
    return t


def rescale_(
    t: Tensor,
    factors: tuple[Factor, ...],
    offset: float,
    scaled: Callable[[Tensor, tuple[Factor, ...]], Tensor],
) -> Tensor:
    """Scale the sum of a weight and the model's offset in place."""
    if not offset or not _vectors(t, factors):
        return scaled(t, factors)
    return scaled(t.add_(offset), factors).sub_(offset)


def scale_grad_(
    grad: Tensor,
    factors: tuple[Factor, ...],
    scaled: Callable[[Tensor, tuple[Factor, ...]], Tensor],
) -> None:
    """Scale a gradient in place; for a sparse gradient (rows of an embedding), scale its values."""
    if grad.layout == torch.strided:
        scaled(grad, factors)
        return
    rows, values = grad._indices()[0], grad._values()  # pyright: ignore[reportPrivateUsage]
    scaled(values, tuple(f[rows] if i == 0 and isinstance(f, Tensor) else f for i, f in enumerate(factors)))  # fmt: skip
