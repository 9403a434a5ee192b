"""Attributes of modules that may hold sizes: found by their values, and for numbers by those of a model built from the grown config."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from growkern.model.leaves import cached_sizes
from growkern.model.size_values import Power, bits_of, rounded, size_value
from growkern.model.tracing.expressions import Expression, expressions, fit
from growkern.model.tracing.naming import Spaces
from growkern.model.tracing.scalings import ROUNDED, SMALL
from growkern.model.tracing.tape import Tape
from growkern.model.tracing.trial import CONFIG, configs_of
from growkern.support.names import named_modules

# names of attributes that are no widths, whatever their value
OTHER = re.compile(
    r"layer_idx|layers?$|vocab|position|_id$|max_seq|block_size|kernel|stride|padding|dilation|window|chunk|top_k|per_tok"
)
Key = tuple[str, str]  # (module, attribute)
Option = Expression | Power | float


@dataclass(frozen=True)
class Numbers:
    """Numbers that modules of a model hold that was built from a grown config, as far as known; and its sizes."""

    values: Mapping[Key, float]
    sizes: Mapping[str, int]


def candidates(
    model: nn.Module, tape: Tape, spaces: Spaces, numbers: Numbers
) -> dict[Key, list[Option]]:
    """Return the attributes that hold the size of a dimension that grows -> what they may be, the likeliest first.

    Args:
        model: The model.
        tape: Its trace.
        spaces: Its spaces.
        numbers: Numbers of a model that is built from the grown config.
    """
    around = expressions(tape, spaces)
    everywhere: dict[int, Counter[Expression]] = defaultdict(Counter)
    for own in around.values():
        for n, count in own.items():
            everywhere[n] += count
    result: dict[Key, list[Option]] = {}
    places = [(path, module, around[path]) for path, module in named_modules(model)]
    places += [(CONFIG, config, everywhere) for config in configs_of(model) if not hasattr(config, "to_dict")]  # fmt: skip
    for path, holder, own in places:
        known = cached_sizes(type(holder)) if hasattr(holder, "weight") else dict[str, int]()
        kept: Any = vars(holder).get("_non_persistent_buffers_set", ())
        own_fields: dict[str, Any] = vars(holder) | {name: vars(holder)["_buffers"][name] for name in kept}  # fmt: skip
        for name, held, value in _entries(own_fields, path != CONFIG):
            near = (
                1e-9
                if held is value
                else max(1e-6, torch.finfo(held.dtype).eps)
                if isinstance(held, Tensor)
                else 0
            )
            if type(value) is float and (powers := [*_powers(value, spaces.sizes, near)]):
                built = numbers.values.get((path, name))
                if built is None:
                    result[path, name] = [*powers, value]
                elif fitting := [p for p in powers if isclose(size_value(p, numbers.sizes), built, rel_tol=ROUNDED)]:  # fmt: skip
                    result[path, name] = [*fitting]
            if type(value) is not int or value < 2 or name.startswith("_") or name in known or OTHER.search(name):  # fmt: skip
                continue
            count = own.get(value, Counter())
            order = sorted(count, key=lambda e: (-fit(name, e), len(e), -count[e]))
            if any(isinstance(x, str) for e in order for x in e):
                grows = [e for e in order if any(isinstance(x, str) for x in e)]
                named = fit(name, grows[0]) > 0 or any(value == s.dim.size for s in tape.scalings)
                result[path, name] = [*grows, (value,)] if named else [(value,), *grows]
    return result


def _entries(own: Mapping[str, Any], every: bool) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, attribute and value: the number in a tensor without axes, and the last entry of a tuple or list, or every one."""
    for name, held in own.items():
        value = held
        if isinstance(held, Tensor) and held.dim() == 0 and held.is_floating_point() and not held.is_meta:  # fmt: skip
            value = float(held)
        elif isinstance(held, tuple | list) and held:
            *others, value = held  # pyright: ignore[reportUnknownVariableType]
            yield from ((f"{name}[{i}]", held, x) for i, x in enumerate(others) if every)  # pyright: ignore
        yield name, held, value


def _powers(value: float, sizes: Mapping[str, int], near: float) -> Iterator[Power]:
    """Yield the powers of sizes that a number is; small sizes have too many."""
    for size, n in sizes.items():
        yield from (
            Power(size, p, bits=bits)
            for p in (0.5, -0.5, -1.0)
            for bits in (bits_of(value, n**p),)
            if n > SMALL and isclose(value, rounded(n**p, bits), rel_tol=near)
        )
