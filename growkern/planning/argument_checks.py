"""Check the numbers and flags that users pass to methods: of the right type, finite, and in range."""

from collections.abc import Iterator
from math import nan
from numbers import Integral, Real
from typing import Any

from growkern.support.text import short

STRONGEST = 1e3  # standard deviations of a weight: stronger noise leaves nothing of the weight
SEEDS = -(1 << 63), (1 << 64) - 1  # of torch's generators


def wrong_number(
    name: str, value: Any, low: float, high: float, *, above: bool = False
) -> Iterator[str]:
    """Yield an error unless a value is a real number from ``low`` (``above``: more than ``low``) to ``high``."""
    number = float(value) if _is(value, Real) and abs(value) <= max(abs(low), abs(high)) else nan
    if not low <= number <= high or (above and number == low):
        start = f"above {low:g}, at most" if above else f"from {low:g} to"
        yield f"{name}={short(value)} is not valid; pass a finite number {start} {high:g}."


def wrong_int(name: str, value: Any, low: int, high: int) -> Iterator[str]:
    """Yield an error unless a value is an integer from ``low`` to ``high``."""
    if not _is(value, Integral) or not low <= int(value) <= high:
        yield f"{name}={short(value)} is not valid; pass an int from {low} to {high}."


def wrong_layer(value: Any) -> bool:
    """Return True unless a value is the index of a layer, as far as its type tells."""
    return not _is(value, Integral)


def wrong_seed(value: object) -> Iterator[str]:
    """Yield an error unless a value is a seed."""
    yield from wrong_int("seed", value, *SEEDS)


def wrong_flag(name: str, value: object) -> Iterator[str]:
    """Yield an error unless a value is True or False."""
    if type(value) is not bool:
        yield f"{name}={short(value)} is not valid; pass True or False."


def _is(value: Any, kind: type) -> bool:
    """Return True for a number of a kind; a bool is none."""
    return isinstance(value, kind) and not isinstance(value, bool)
