"""Values of sizes: a size that a user names, the size of a space, and what follows from sizes, such as a cached attribute."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import chain
from math import frexp, isclose, ldexp, prod

Component = str | int | tuple[str | int, ...]
DOUBLE, BFLOAT16 = 53, 8  # significant bits
SIZE_OF_SPACE = {"residual": "hidden"}  # every other space is named after its size


@dataclass(frozen=True)
class Power:
    """A size to a power, such as the ``head_dim ** -0.5`` of attention: ``factor * (size / base) ** exponent``.

    An attribute that is an int stays an int: ``Power("heads", 1.0, base=2)`` is the number of heads of one of two processes.

    Attributes:
        size: Name of the size.
        exponent: Exponent of the size.
        factor: Factor on the power.
        base: Divisor of the size.
        bits: Significant bits of the value: 8 where the model computes it in bfloat16.

    Example:
        >>> growkern.describe(model).attributes["model.layers.0.self_attn.scaling"] == growkern.Power("head_dim", -0.5)
        True
    """

    size: str
    exponent: float
    factor: float = 1.0
    base: int = 1
    bits: int = DOUBLE


ROOT = Power("head_dim", -0.5)  # scale of attention scores


@dataclass(frozen=True)
class Sum:
    """A sum of sizes and products of sizes, such as the width of a convolution over several streams that lie side by side.

    Attributes:
        parts: Products of size names and numbers.
    """

    parts: tuple[tuple[str | int, ...], ...]

    def __iter__(self) -> Iterator[str | int]:
        return chain.from_iterable(self.parts)

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def __str__(self) -> str:
        return " + ".join(" x ".join(map(str, part)) for part in self.parts)


@dataclass(frozen=True)
class Ratio:
    """A size divided by another size, such as a config's ratio of FFN units to hidden.

    Attributes:
        size: Name of the size.
        to: Name of the size that divides it.
    """

    size: str
    to: str

    def __iter__(self) -> Iterator[str]:
        return iter((self.size, self.to))

    def __len__(self) -> int:
        return 2

    def __str__(self) -> str:
        return f"{self.size} / {self.to}"


# a size name, or a product of names and numbers; "block" is the index of the block
Size = str | tuple[str | int, ...] | Power | Sum | Ratio


def space_of(stream: str) -> str:
    """Return the space of a stream."""
    return stream.partition(":")[0]


def space_size(component: Component, sizes: Mapping[str, int]) -> int:
    """Return the size of a space, a fixed size, or concatenated spaces under the given named sizes."""
    if isinstance(component, int):
        return component
    if isinstance(component, tuple):
        return sum(space_size(part, sizes) for part in component)
    name = size_name(component)
    return sizes["heads"] // sizes["kv_heads"] if name == "group" else sizes[name]


@cache
def size_name(component: str) -> str:
    """Return the size of the space of a stream."""
    return size_of_space(space_of(component))


def size_of_space(space: str) -> str:
    """Return the size of a space: ``hidden`` for ``residual``, ``hidden2`` for ``residual2``, ``ffn`` for ``ffn.3``."""
    name = space.partition(".")[0]
    kind = name.rstrip("0123456789")
    return f"{SIZE_OF_SPACE.get(kind, kind)}{name[len(kind) :]}"


def size_value(size: Size, sizes: Mapping[str, int]) -> float:
    """Return the value of an attribute or config field: a size, a product, sum or ratio of sizes, or a power of a size (a float)."""
    if isinstance(size, Ratio):
        return space_size(size.size, sizes) / space_size(size.to, sizes)
    if isinstance(size, Sum):
        return sum(size_value(part, sizes) for part in size.parts)
    if isinstance(size, Power):
        value = size.factor * (space_size(size.size, sizes) / size.base) ** size.exponent
        return rounded(value, size.bits)
    return prod(space_size(name, sizes) for name in ([size] if isinstance(size, str) else size))


def rounded(value: float, bits: int) -> float:
    """Return a number with the given significant bits, rounded as floating-point numbers are.

    Example:
        >>> rounded(48**0.5, bits=8)
        6.9375
    """
    if bits == DOUBLE:
        return value
    mantissa, exponent = frexp(value)
    return ldexp(round(ldexp(mantissa, bits)), exponent - bits)


def bits_of(value: float, exact: float) -> int:
    """Return the significant bits of a number that is another one, as it is or in bfloat16."""
    low = not isclose(value, exact, rel_tol=1e-6) and value == rounded(exact, BFLOAT16)
    return BFLOAT16 if low else DOUBLE
