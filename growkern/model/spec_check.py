"""Check a spec that a user wrote: the types of its fields, and that its fields agree. The model is not looked at."""

from collections.abc import Iterator
from math import isfinite

from growkern.model.size_values import Power, Size, space_of, space_size
from growkern.model.spec import ModelSpec
from growkern.support.argument_types import wrong_fields
from growkern.support.text import short


def problems(spec: ModelSpec) -> Iterator[str]:
    """Yield a problem for every field that has a wrong type; if there is none, for every field that names what the spec lacks."""
    wrong = [*wrong_fields(spec, deep=True)]
    yield from wrong
    if wrong:
        return
    counts = {stack.size for stack in spec.stacks}
    for name, n in spec.sizes.items():
        if type(n) is not int or n < (name not in counts):
            yield f"sizes: {name} is {short(n)}, and sizes are whole numbers from 1 (numbers of blocks from 0)."
    for name, axes in spec.tensors.items():
        try:
            hash(tuple(axes))
        except TypeError:
            yield f"tensors[{name!r}]: an axis contains a list; write its segments as tuples."
            return
    sizes = {
        **{f"attributes[{name!r}]": size for name, size in spec.attributes.items()},
        **{f"config[{name!r}]": size for name, size in spec.config.items()},
        **{f"activation_scales[{name!r}]": power for name, power in spec.activation_scales.items()},
        "save_requires_multiple": spec.save_requires_multiple or (),
    }
    for where, size in sizes.items():
        yield from _unknown(where, size, spec)
    for field in ("activation_scales", "non_affine_norms"):
        for stream in getattr(spec, field) or ():
            if stream not in spec.streams:
                yield f"{field}: no tensor has the stream {stream!r}; name one of {short(spec.streams)}."
    for name, axis, norm in spec.norms():
        if {space_of(stream) for stream in axis.streams} != {space_of(norm.reads)}:
            yield f"{name}: its gain is along {axis}, and its norm reads {norm.reads!r}: both have to be of one space."
    for name in sorted({*spec.counters} - spec.tensors.keys()):
        yield f"counters: {name!r} is not in tensors; add it, or leave it out."
    for tie in spec.ties.items():
        if missing := [name for name in tie if name not in spec.tensors]:
            yield f"ties: {missing[0]!r} is not in tensors; both names of a tie have to be."
    if not 0 <= spec.rotary <= 1:
        yield f"rotary={spec.rotary} is not the fraction of head_dim that RoPE rotates; pass a number from 0 to 1."


def _unknown(where: str, size: Size, spec: ModelSpec) -> Iterator[str]:
    """Yield a problem for a name that is no size, and for a power that is no finite number."""
    if isinstance(size, Power):
        numbers = (size.exponent, size.factor, float(size.base))
        if not all(map(isfinite, numbers)) or size.base < 1 or size.factor == 0:
            yield f"{where}: {size} is no power of a size; pass finite numbers, a factor other than 0, and a base from 1."
    names = (size.size,) if isinstance(size, Power) else (size,) if isinstance(size, str) else size
    for name in names:
        if name == "block" and spec.stacks:
            continue
        try:
            space_size("layers" if name == "block" else name, spec.sizes)
        except (KeyError, ZeroDivisionError) as error:
            yield f"{where}: the size {error} is not in sizes ({', '.join(spec.sizes)}); add it."
