"""Where a live model differs from what its class builds: the description by a small model of the class does not see that."""

from collections.abc import Iterator, Mapping
from math import isclose
from typing import Any

from torch import nn

from growkern.distributed.shards import plain_class
from growkern.model.size_values import size_value
from growkern.model.spec import ModelSpec
from growkern.model.tracing.stretch import Template, blocks_like
from growkern.support.names import named_modules


def alterations(template: Template, model: nn.Module, spec: ModelSpec) -> Iterator[str]:
    """Yield the modules of other classes or with a forward of their own, and the attributes of other values than the spec's.

    Wrappers of the whole model are those of training loops and engines. Hooks are not looked at: most of them watch.

    Args:
        template: The spec of the small model.
        model: The live model.
        spec: Its spec.
    """
    like = dict(blocks_like(template, model, spec.sizes))
    for path, module in dict(
        named_modules(model)
    ).items():  # the module behind a wrapper comes last
        place = spec.block_of(path) if path else None
        own = path
        if place is not None:
            own = f"{place[0].path}.{like[place[0].path][place[1]]}.{place[2]}".rstrip(".")
        if plain_class(type(module)) is not template.modules.get(own):
            yield f"{path} is a {type(module).__name__}"
        if path and "forward" in vars(module):
            yield f"{path} has a forward of its own"
    yield from _attributes(model, spec)


def _attributes(model: nn.Module, spec: ModelSpec) -> Iterator[str]:
    modules: Mapping[str, nn.Module] = dict(
        named_modules(model)
    )  # the module behind a wrapper comes last
    for name, size in spec.attributes.items():
        path, _, attribute = name.rpartition(".")
        if size == "block" or path not in modules:
            continue
        live: Any = getattr(modules[path], attribute, None)
        if isinstance(live, int | float) and not isclose(
            live, size_value(size, spec.sizes), rel_tol=1e-6
        ):
            yield f"{name} is {live}"
