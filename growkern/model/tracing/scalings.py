"""Products of an activation and a power of its length, such as an embedding times ``hidden ** 0.5``, whose growth writers take back."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any

from torch import Tensor

from growkern.model.size_values import Power, bits_of
from growkern.model.tracing.hollow import Hollow
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.tape import Tape
from growkern.model.tracing.terms import Dim, atoms, find, size_at
from growkern.model.tracing.values import Scaling, Stream, Value

EXPONENTS = 0.5, -0.5, 1.0, -1.0
ROUNDED = 1e-2  # largest relative difference of a power and its value in bfloat16
SMALL = 7  # lengths up to this have powers that are ordinary numbers


def multiplier(base: str, args: Sequence[Any]) -> float | None:
    """Return the number by which an operation multiplies a tensor; None for another operation."""
    if base not in ("mul", "div") or len(args) < 2:
        return None
    own = args[:2] if base == "mul" else args[1:2]
    scalars = [
        x
        for x in own
        if not isinstance(x, Tensor)
        or (x.dim() == 0 and not isinstance(x, Hollow) and not x.is_meta)
    ]
    numbers = [float(x) for x in scalars if isinstance(x, int | float | Tensor)]
    if len(numbers) != 1 or not numbers[0]:
        return None
    return numbers[0] if base == "mul" else 1 / numbers[0]


def power_in(value: Value, factor: float) -> tuple[Dim, float] | None:
    """Return the dimension of a value, and the exponent, of which a factor is the power; None for another factor."""
    for dim in reversed(value.dims):
        for exponent in EXPONENTS:
            if dim.size > SMALL and isclose(factor, dim.size**exponent, rel_tol=ROUNDED):
                return dim, exponent
    return None


def settled(tape: Tape) -> list[Scaling]:
    """Return the scalings that writers can take back: nothing but sums is in front of them, and nothing reads the stream there.

    A stream that has no writers behind a scaling, or whose scaling cannot be taken back, is one stream with the one in front.
    """
    first = {name: own[0] for own in tape.names.values() for name in own}
    every = {a for own in tape.scalings for a in atoms(own.dim)}
    writes = defaultdict[Stream, set[tuple[str, int]]](set)
    for use in tape.uses:
        name = first[use.tensor]
        if use.role != "reader" and every & {*atoms(tape.weights[name].dims[use.axis])}:
            writes[use.stream.find()].add((name, use.axis))
    reads = {u.stream.find() for u in tape.uses if u.role == "reader"} | {n.reads.find() for n in tape.norms}  # fmt: skip
    kept = [
        own
        for own in tape.scalings
        for before in [own.before.find()]
        if before in writes and before not in reads and before is not own.after.find() and not before.nonlinear and len(atoms(own.dim)) == 1
    ]  # fmt: skip
    while True:  # a tensor that writes several streams has one factor
        factors = {own.before.find(): own.factor for own in kept}
        alike = [
            own
            for own in kept
            for axes in [writes[own.before.find()]]
            if all(factors.get(s) == own.factor for s, other in writes.items() if axes & other)
        ]
        if len(alike) == len(kept):
            break
        kept = alike
    joined = [own for own in tape.scalings if own not in kept or own.after.find() not in writes]
    for own in kept:
        for other in kept:
            if writes[own.before.find()] & writes[other.before.find()]:
                other.before.join(own.before)
    for own in joined:
        own.after.join(own.before)
    return kept


def unscaled(own: Scaling, base: str, args: Sequence[Any], out: Tensor, sizes: Mapping[Dim, int]) -> Tensor | None:  # fmt: skip
    """Return the result of a scaling by the source's power, in a copy that scales by the power of its own length; None if it does not."""
    factor = multiplier(base, args)
    ratio = (factor or own.factor) / own.factor
    grown = (size_at(own.dim, sizes) / own.dim.size) ** own.exponent
    if ratio == 1 or not isclose(ratio, grown, rel_tol=ROUNDED):
        return None
    return out.div_(ratio) if any(out is x for x in args) else out / ratio


def powers(scalings: Iterable[Scaling], spaces: Spaces) -> Iterator[tuple[Scaling, Power]]:
    """Yield the power of every scaling whose length is a size with a name."""
    for own in scalings:
        size = spaces.size_of(find(own.dim))
        if size is not None:
            bits = bits_of(own.factor, own.dim.size**own.exponent)
            yield own, Power(size, own.exponent, bits=bits)
