"""The spec of a small model at the sizes, the number of blocks and the config of a live model of its class."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from growkern.model.hints import Hint
from growkern.model.layers import rope_fixed
from growkern.model.size_values import Power, Size
from growkern.model.spec import AxisUse, ModelSpec, TensorSpec
from growkern.model.tracing.small import coupled, pattern, rotary
from growkern.support.names import named_buffers, named_modules, named_parameters


@dataclass(frozen=True, eq=False)
class Template:
    """The spec of a small model.

    Attributes:
        spec: The spec, at the small sizes.
        kinds: Path of each stack -> for every block, the names of its parameters.
        modules: Path of every module -> its class.
    """

    spec: ModelSpec
    kinds: Mapping[str, Sequence[frozenset[str]]]
    modules: Mapping[str, type[nn.Module]]


def stretched(template: Template, model: nn.Module, hint: Hint, sizes: Mapping[str, int]) -> ModelSpec:  # fmt: skip
    """Return the spec of a live model.

    Args:
        template: Spec of a small model of its class.
        model: The live model.
        hint: What the trace does not show.
        sizes: Sizes of the live model.
    """
    spec, config = template.spec, model.config
    live: dict[str, Tensor] = dict(named_parameters(model, remove_duplicate=False))
    live |= dict(named_buffers(model, remove_duplicate=False))
    like = dict(blocks_like(template, model, sizes))
    tensors = {
        name: _live_lengths(_renumbered(spec.tensors[own], *numbers), live.get(name))
        for name, own, *numbers in _copies([*spec.tensors], spec, like)
    }
    attributes = {name: spec.attributes[own] for name, own, *_ in _copies([*spec.attributes], spec, like)}  # fmt: skip
    # nothing grows the types of tokens
    held = {name: size for name, size in hint.fields.items() if size != "token_types"}
    fields = dict[str, Size](held) | _following(config, hint, sizes)
    for name, size in hint.divided.items():
        fields[name] = power = Power(size, -1.0, getattr(config, name), sizes[size])
        holders = [path for path, module in named_modules(model) if name in vars(module)]
        attributes |= {f"{path}.{name}".lstrip("."): power for path in holders}
    turned = rotary(config) if spec.rebuilt_from_config else 0.0
    fixed = dict(spec.fixed) | (rope_fixed(config) if turned else {})
    for name, (plain, own, why) in hint.fixed_by.items():
        fixed |= dict.fromkeys(own if getattr(config, name, plain) not in (plain, None) else (), why)  # fmt: skip
    return replace(
        spec,
        sizes=dict(sizes),
        tensors=tensors,
        attributes=attributes,
        config={**fields, **hint.config},
        config_lists=hint.lists,
        config_eps=hint.eps,
        hidden_is_heads=coupled(hint),
        save_requires_multiple=hint.saves,
        rotary=turned,
        fixed=fixed | {size: why for size, why in hint.apart.values() if size in sizes},
    )


def _following(config: Any, hint: Hint, sizes: Mapping[str, int]) -> dict[str, Size]:
    """Return the fields that may equal a size -> that size, or the size that they have apart from it."""
    result: dict[str, Size] = {}
    for name, size in hint.follows.items():
        if getattr(config, name) == sizes[size]:
            result[name] = size
        elif name in hint.apart:
            result[name] = hint.apart[name][0]
    return result


def blocks_like(template: Template, model: nn.Module, sizes: Mapping[str, int]) -> Iterator[tuple[str, list[int]]]:  # fmt: skip
    """Yield the path of each stack, and for every live block the block of the template with the same parameters."""
    live = pattern(model, [*template.kinds])
    for stack in template.spec.stacks:
        own, known = live[stack.path], template.kinds[stack.path]
        last = len(known) - 1
        n = max(1, sizes[stack.size])  # block 0 also if there is none
        # a block unlike all others is described like the last, and compared with that description
        yield stack.path, [known.index(own[i]) if i < len(own) and own[i] in known else min(i, last) for i in range(n)]  # fmt: skip


def _copies(names: Sequence[str], spec: ModelSpec, like: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, str, int, int]]:  # fmt: skip
    """Yield every name of a tensor or attribute in the live model, its name in the template, and the numbers of both blocks."""
    inside: dict[tuple[str, int], list[str]] = {}
    for name in names:
        if place := spec.block_of(name):
            inside.setdefault((place[0].path, place[1]), []).append(place[2])
    done = set[str]()
    for name in names:
        place = spec.block_of(name)
        if place is None:
            yield name, name, 0, 0
        elif place[0].path not in done:
            path = place[0].path
            done.add(path)
            for i, source in enumerate(like[path]):
                for rest in inside.get((path, source), ()):
                    yield f"{path}.{i}.{rest}", f"{path}.{source}.{rest}", source, i


def _renumbered(axes: TensorSpec, source: int, i: int) -> TensorSpec:
    """Return the axes of a block's tensor as another block has them: the spaces of a block end with its number."""
    if source == i:
        return axes

    def renamed(component: Any) -> Any:
        if isinstance(component, str) and component.endswith(f".{source}"):
            return f"{component.removesuffix(f'.{source}')}.{i}"
        return component

    def own(axis: AxisUse) -> AxisUse:
        segments = tuple(tuple(map(renamed, s)) for s in axis.segments)
        return axis if segments == axis.segments else replace(axis, segments=segments)

    return tuple(map(own, axes))


def _live_lengths(axes: TensorSpec, live: Tensor | None) -> TensorSpec:
    """Return the axes of a tensor with the live lengths of fixed axes."""
    if live is None or live.dim() != len(axes) or not any(_is_fixed(axis) for axis in axes):
        return axes
    pairs = zip(axes, live.shape, strict=True)
    return tuple(replace(a, segments=((n,),)) if _is_fixed(a) else a for a, n in pairs)


def _is_fixed(axis: AxisUse) -> bool:
    return len(axis.segments) == 1 and all(isinstance(c, int) for c in axis.segments[0])
