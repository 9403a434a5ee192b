"""Axis maps: the index map of an axis of tensors, with its scales and pads."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Literal

from growkern.errors import PlanError
from growkern.planning.index_map import IndexMap
from growkern.planning.plan_fields import PADS
from growkern.planning.vector import Vector

# weight of an element that copies no source element: 0; the mean along the axis; random, for a reader or a writer of the new coordinate;
# or the value that the method gives
Pad = Literal["zero", "mean", "random_reader", "random_writer", "from_method"]


@dataclass(frozen=True)
class AxisMap:
    """How one axis grows. All tensor axes with the same use share one axis map.

    Attributes:
        index_map: Source coordinate of each target coordinate.
        weight_scale: Factor on the weight, per target coordinate.
        grad_scale: Factor on the gradient and on first-order state (squared on second-order state).
        pad: Weight at coordinates that copy no source coordinate.
        noise: Strength of the twin noise along the axis, in standard deviations of the weight.
        drawn: Strength of the noise at coordinates that copy no source coordinate, in standard deviations of the weight.
        centered: True when the weight is first centered: its mean along the axis is subtracted.
    """

    index_map: IndexMap
    weight_scale: Vector
    grad_scale: Vector
    pad: Pad = "zero"
    noise: float = 0.0
    centered: bool = False
    drawn: float = 1.0

    def __post_init__(self) -> None:
        lengths = len(self.weight_scale), len(self.grad_scale)
        values = [
            v for vector in (self.weight_scale, self.grad_scale) for v, n in vector.repeats if n > 0
        ]
        if not all(map(isfinite, [*values, self.noise, self.drawn])) or self.pad not in PADS:
            raise PlanError(
                f"an axis has scales or noise that are not numbers, or the unknown pad {self.pad!r}."
            )
        if lengths != (self.index_map.n_target,) * 2 or any(
            n < 1 for vector in (self.weight_scale, self.grad_scale) for _, n in vector.repeats
        ):
            raise PlanError(
                f"an axis of {self.index_map.n_target} coordinates has {lengths[0]} weight scales and {lengths[1]} gradient scales."
            )

    def times(self, factor: float, grad_factor: float) -> "AxisMap":
        """Return this axis map with one more factor on the weight, and one on the gradient."""
        weight = self.weight_scale.map(lambda x: x * factor)
        return replace(
            self,
            weight_scale=weight,
            grad_scale=self.grad_scale.map(lambda x: x * grad_factor),
        )

    @cached_property
    def is_identity(self) -> bool:
        """True when the axis does not change."""
        return (
            self.index_map.is_identity
            and self.weight_scale.uniform == 1
            and self.grad_scale.uniform == 1
        )
