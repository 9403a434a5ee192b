"""What a tape knows of tensors: dimensions, the activation that a tensor holds, and the axes of parameters that a weight is."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from growkern.model.tracing.terms import Dim

Role = Literal["writer", "reader", "gain"]
Axes = frozenset[tuple[str, int]]  # (tensor, axis)
NONE: Axes = frozenset()


def union(several: Sequence[Axes]) -> Axes:
    """Return the axes that are in any of several sets."""
    return NONE.union(*several)


class Stream:
    """An activation, on whatever space; activations that are added are one stream."""

    def __init__(self) -> None:
        self.parent: Stream | None = None
        self.nonlinear: str | None = None  # the operation that makes it more than a sum

    def find(self) -> "Stream":
        """Return the stream that this one has become."""
        return self if self.parent is None else self.parent.find()

    def join(self, other: "Stream") -> "Stream":
        """Make two streams one."""
        own, other = self.find(), other.find()
        if own is not other:
            other.parent = own
            own.nonlinear = own.nonlinear or other.nonlinear
        return own

    def bend(self, operation: str) -> None:
        """Note an operation that is not linear in the stream."""
        own = self.find()
        own.nonlinear = own.nonlinear or operation


@dataclass(eq=False)
class Norm:
    """A division of a stream by a statistic of the stream."""

    kind: Literal["rms", "layer", "l2"]
    reads: Stream
    writes: Stream
    over: list[Dim]
    module: str
    eps: object
    gained: bool = False


@dataclass(eq=False)
class Statistic:
    """A mean, variance or norm of a stream over dimensions, on its way to divide the stream."""

    stream: Stream
    over: list[Dim]
    op: str
    eps: object = None
    origin: "Statistic | None" = None  # the reduction, for what follows from it
    of_norm: bool = (
        False  # of the reduction: True once the stream is divided by it or has it subtracted
    )

    def becomes(self, eps: object) -> "Statistic":
        """Return the statistic after a step, such as the addition of an epsilon."""
        return Statistic(self.stream, self.over, self.op, eps, self.origin or self)


@dataclass(eq=False)
class Scaling:
    """A product of an activation and a power of one of its lengths.

    Attributes:
        before: Stream in front of the product.
        after: Stream behind it.
        dim: Dimension of that length.
        exponent: Exponent of the power.
        factor: The power.
        step: Number of the operation in the trace.
    """

    before: Stream
    after: Stream
    dim: Dim
    exponent: float
    factor: float
    step: int


@dataclass
class Value:
    """What is known of one tensor.

    Attributes:
        dims: Its dimensions.
        stream: The activation that it holds.
        learned: True when it depends on a parameter.
        weight: True when it depends on parameters and constants only.
        given: True when it depends on the inputs.
        axes: For a weight: the axes of parameters that each dimension is.
        statistic: What it is a statistic of.
        norm: Norm that it is the output of; ``gained`` behind its gain.
        centered: Stream whose mean was subtracted.
        squared: Stream that it is the square of.
        offset: Constant that was added to a weight.
    """

    dims: list[Dim]
    stream: Stream = field(default_factory=Stream)
    learned: bool = False
    weight: bool = False
    given: bool = False
    axes: list[Axes] = field(default_factory=list[Axes])
    statistic: Statistic | None = None
    norm: Norm | None = None
    gained: bool = False
    centered: Stream | None = None
    squared: Stream | None = None
    offset: float = 0.0

    def __post_init__(self) -> None:
        if len(self.axes) != len(self.dims):
            self.axes = [frozenset()] * len(self.dims)

    @property
    def activation(self) -> bool:
        """True when it depends on parameters, and is no weight."""
        return self.learned and not self.weight

    def carry(self, dims: Sequence[Dim], axes: Sequence[Axes] = ()) -> "Value":
        """Return the same activation or weight on other dimensions."""
        own = Value([*dims], self.stream, self.learned, self.weight, self.given, [*axes])
        own.statistic, own.norm, own.gained = self.statistic, self.norm, self.gained
        own.centered, own.squared, own.offset = self.centered, self.squared, self.offset
        return own


@dataclass
class Use:
    """One use of an axis of a parameter."""

    tensor: str
    axis: int
    role: Role
    stream: Stream
    module: str
    norm: Norm | None
    offset: float
