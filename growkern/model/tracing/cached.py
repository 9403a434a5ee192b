"""Attributes and buffers of two models of a class that differ in all sizes: what holds a size, or a number that follows from one."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Any

import torch
from torch import Tensor, nn

from growkern.model.leaves import cached_sizes
from growkern.model.size_values import Power, Size
from growkern.model.tracing.small import with_group
from growkern.support.names import named_buffers, named_modules

POWERS = 0.5, -0.5, -1.0
Options = Sequence[tuple[float, float, Size]]  # value in either model, and what has these values


@dataclass
class Cached:
    """What modules cache.

    Attributes:
        sizes: ``"module.attribute"`` -> size.
        unexplained: Attributes that follow from sizes in another way, or differ between blocks in another way.
    """

    sizes: dict[str, Size] = field(default_factory=dict[str, Size])
    unexplained: list[str] = field(default_factory=list[str])


def cached_values(
    one: nn.Module,
    two: nn.Module,
    sizes: Mapping[str, int],
    other_sizes: Mapping[str, int],
    paths: Sequence[str],
) -> Cached:
    """Find the attributes that are sizes, products, multiples or powers of sizes, or the number of a block.

    Args:
        one: A model.
        two: A model of the same class with other sizes.
        sizes: Sizes of the first.
        other_sizes: Sizes of the second.
        paths: Paths of their stacks.
    """
    options, modules = [*_options(sizes, other_sizes)], dict(named_modules(two))
    found: dict[tuple[str, str], dict[str, Size | None]] = defaultdict(dict)
    result = Cached()
    for path, module in named_modules(one):
        known = cached_sizes(type(module)) if hasattr(module, "weight") else dict[str, int]()
        stack = next((p for p in paths if path.startswith(f"{p}.")), None)
        index, _, rest = path.removeprefix(f"{stack}.").partition(".") if stack else ("", "", path)
        for name, value in _numbers(module):
            if name in known:
                continue
            after = float(getattr(modules[path], name))
            own = next((size for a, b, size in options if _near(value, a) and _near(after, b)), None)  # fmt: skip
            if stack and own is None and type(value) is int and value == int(index):
                own = "block"
            if own is None and not _near(value, after):
                own = _multiple(value, after, options)
                result.unexplained += [] if own else [f"{path}.{name}".lstrip(".")]
            found[stack or "", f"{rest}.{name}".lstrip(".")][index] = own
    for (path, name), own in found.items():
        alike = len({*map(str, own.values())}) == 1
        for index, size in own.items():
            key = ".".join(filter(None, (path, index, name)))
            if size is not None and alike:
                result.sizes[key] = size
            elif size not in (None, "block"):
                result.unexplained.append(key)
    return result


def _multiple(value: float, after: float, options: Options) -> Size | None:
    """Return the size of which a number is a multiple in both models; None where there are none or several."""
    own = [(size, value / a) for a, b, size in options if isinstance(size, str) and _near(value * b, after * a)]  # fmt: skip
    if len(own) != 1:
        return None
    size, factor = own[0]
    return (size, int(factor)) if factor == int(factor) else Power(size, 1.0, factor)


def _near(value: float, expected: float) -> bool:
    return isclose(value, expected, rel_tol=1e-6)  # a buffer may round to float32


def _numbers(module: nn.Module) -> Iterator[tuple[str, int | float]]:
    """Yield the public attributes of a module that are numbers, and its buffers of one number."""
    own: dict[str, Any] = {**vars(module), **module._buffers}  # pyright: ignore[reportPrivateUsage]
    for name, value in own.items():
        if type(value) in (int, float) and not name.startswith("_"):
            yield name, value
        elif isinstance(value, Tensor) and not value.dim() and value.is_floating_point():
            yield name, float(value)


def _options(sizes: Mapping[str, int], other: Mapping[str, int]) -> Iterator[tuple[float, float, Size]]:  # fmt: skip
    """Yield products, powers and sizes with their values in both models."""
    one, two = with_group(sizes), with_group(other)
    names = [name for name in one if not name.endswith("layers")]
    if one["heads"] * one["head_dim"] != one["hidden"]:
        yield one["heads"] * one["head_dim"], two["heads"] * two["head_dim"], ("heads", "head_dim")
    yield from ((one[size] ** p, two[size] ** p, Power(size, p)) for size in names for p in POWERS)
    yield from ((one[size], two[size], size) for size in names)


def rebuilt(one: nn.Module, two: nn.Module) -> Iterator[str]:
    """Yield the modules without parameters whose buffers have other lengths in a model of other sizes."""
    modules = dict(named_modules(two))
    for path, module in named_modules(one):
        own, after = (dict(m.named_buffers(recurse=False)) for m in (module, modules[path]))
        bare = not any(True for _ in module.parameters())
        if bare and any(b.shape != after[name].shape for name, b in own.items()):
            yield path


def counters(model: nn.Module) -> Iterator[str]:
    """Yield the buffers that hold 0, 1, ... along their last axis."""
    for name, b in named_buffers(model):
        numbers = torch.arange(b.shape[-1] if b.dim() else 0)
        if len(numbers) > 1 and not b.is_floating_point() and bool((b == numbers).all()):
            yield name
