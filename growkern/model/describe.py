"""Describe a live model as a ModelSpec. This module reads names, shapes and module attributes, never values of tensors."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from growkern.distributed.shards import is_sharded, local, plain_class
from growkern.errors import UnsupportedModelError, raise_all
from growkern.model import spec_check
from growkern.model.families import FAMILIES
from growkern.model.hints import Hint
from growkern.model.hints import problems as hint_problems
from growkern.model.leaves import cached_sizes
from growkern.model.spec import SHARE, Blocks, ModelSpec
from growkern.model.tracing.forward import Inputs
from growkern.model.tracing.template import altered, describe_by_hint
from growkern.model.tracing.traced import TracedSpec, describe_by_tracing, known_inputs
from growkern.model.wrappers import wrappers
from growkern.support.names import (
    entry_of,
    named_buffers,
    named_modules,
    named_parameters,
    unique,
)

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
PACKAGES = "transformers", "torch"  # of the classes that families describe


def describe(
    model: nn.Module,
    spec: ModelSpec | None = None,
    *,
    inputs: Inputs | None = None,
    hints: Hint | None = None,
    values: bool = True,
    first: Mapping[str, nn.Module] | None = None,
) -> ModelSpec:
    """Describe a model: which axes of which tensors use which spaces.

    Args:
        model: A model of a known family, a model of transformers, or any module together with a ``spec`` or ``inputs``.
        spec: Description of a model of your own. ``describe`` checks it against the model.
        inputs: A batch (a tensor, a sequence of positional arguments, or a mapping of keyword arguments), or a function from the model to
            its outputs. The forward runs on it once, and the description is what it shows; it has to reach every parameter. Without it, a
            model that no family describes gets the inputs of its last description, or inputs made from its config of transformers.
        hints: Names of the sizes in ``model.config``, for a model that its class builds from that config alone. A small model of the class
            is traced in place of the live one, which may then be on the meta device, sharded, or without blocks; head_dim, vocab,
            positions and experts are sizes where the hints name them.
        values: False to describe a model on the meta device too.
        first: Path of a stack without blocks -> its block 0, as a growth builds it. Without it, block 0 is not held against the spec.

    Returns:
        The spec, with ``cached_sizes`` filled in and every tie ordered reader -> writer.

    Raises:
        UnsupportedModelError: The family is unknown, the model is wrapped, parameters cannot be grown, or the spec does not fit the
            model or does not cover every parameter and persistent buffer. The message lists all problems of the first failing check.

    Example:
        >>> growkern.describe(model).sizes  # a known family
        {'hidden': 24, 'heads': 4, 'kv_heads': 2, 'head_dim': 6, 'ffn': 40, 'layers': 2, 'vocab': 66}
        >>> growkern.describe(phi, inputs=batch).sizes  # any other model, by tracing its forward
        {'hidden': 48, 'ffn': 80, 'heads': 4, 'kv_heads': 2, 'layers': 2, 'head_dim': 12}
    """
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UnsupportedModelError(
            f"model: expected a torch.nn.Module, got {type(model).__name__}."
        )
    if spec is not None and not isinstance(spec, ModelSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise UnsupportedModelError(
            f"spec: expected a growkern.ModelSpec, got {type(spec).__name__}."
        )
    modules = [*named_modules(model, remove_duplicate=False)]
    raise_all(
        UnsupportedModelError, f"cannot grow this {type(model).__name__}:", [*wrappers(modules)]
    )
    if spec is not None:
        title = f"cannot describe {type(model).__name__} by this spec:"
        raise_all(UnsupportedModelError, title, [*spec_check.problems(spec)])
    params = dict(named_parameters(model, remove_duplicate=False))
    described = spec or _without_spec(model, params, inputs, hints)
    problems = [*_unfit(model, params, described, values)]
    live = params | dict(named_buffers(model, remove_duplicate=False))
    for path, block in (first or {}).items():
        modules += [
            (f"{path}.0.{name}".rstrip("."), module) for name, module in named_modules(block)
        ]
        params |= {f"{path}.0.{name}": p for name, p in block.named_parameters()}
        live |= params | {f"{path}.0.{name}": b for name, b in block.named_buffers()}
    checked = described if first else _without_absent(described)
    problems = [*_uncovered(modules, params, checked, live), *problems]
    if not problems:
        problems = [
            *_misshapen(checked, live),
            *_ties(params, described),
            *_absent(dict(modules), checked, first or {}),
        ]
    raise_all(
        UnsupportedModelError,
        f"cannot describe {type(model).__name__} as {described.family!r}:",
        problems,
    )
    described = replace(
        described, ties=dict(_directed(described, *tie) for tie in described.ties.items())
    )
    return replace(described, cached_sizes=_cached_sizes(modules, described))


def _cached_sizes(
    modules: Sequence[tuple[str, nn.Module]], spec: ModelSpec
) -> dict[str, tuple[str, int]]:
    """Return the attributes of leaf modules that cache the size of an axis of the module's weight."""
    return {
        f"{name}.{attribute}": (f"{name}.weight", axis)
        for name, module in modules
        for attribute, axis in cached_sizes(type(module)).items()
        if f"{name}.weight" in spec.tensors
        and hasattr(module, attribute)
        and axis < len(spec.tensors[f"{name}.weight"])
    }


def _without_absent(spec: ModelSpec) -> ModelSpec:
    """Return a spec without the tensors and attributes of stacks that have no blocks."""
    if all(spec.sizes.get(stack.size) for stack in spec.stacks):
        return spec
    tensors = {name: axes for name, axes in spec.tensors.items() if not spec.absent(name)}
    attributes = {name: size for name, size in spec.attributes.items() if not spec.absent(name)}
    return replace(spec, tensors=tensors, attributes=attributes)


def _without_spec(
    model: nn.Module, params: Mapping[str, Tensor], inputs: Inputs | None, hints: Hint | None
) -> ModelSpec:
    """Describe a model by hints, by its family, or by tracing."""
    if hints is not None:
        return _hinted(model, params, hints, inputs)
    if inputs is None and known(type(model)):
        return _family(model, params)
    traced = describe_by_tracing(model, inputs)
    if traced is None:
        raise _unknown(plain_class(type(model)))
    return traced


def known(kind: type) -> bool:
    """True for a class of models that a family describes."""
    own = plain_class(kind)
    return own.__name__ in FAMILIES and own.__module__.partition(".")[0] in PACKAGES


def traced_example(model: nn.Module, spec: ModelSpec, *, custom: bool) -> Any:
    """Return the inputs on which a growth is checked that nobody asked to check; None where it is not.

    These are those of the traced forward, for a model that was described by tracing; and inputs made from the config, for a model of a
    family in which modules, hooks, or attributes are not those that its class builds.

    Args:
        model: The model.
        spec: Its spec, from ``describe``.
        custom: True for a spec of the user's.
    """
    if isinstance(spec, TracedSpec):
        return spec.example
    kind = plain_class(type(model))
    hint = None if custom else FAMILIES.get(kind.__name__)
    return known_inputs(model) if isinstance(hint, Hint) and altered(model, kind, hint, spec) else None  # fmt: skip


def lacks_inputs(model: nn.Module) -> bool:
    """True for a model that no family describes, and for which neither its config nor an earlier description has inputs to trace."""
    return not known(type(model)) and known_inputs(model) is None


def refuse_unknown(kind: type) -> None:
    """Raise UnsupportedModelError for a class of models that no family describes."""
    if not known(kind):
        raise _unknown(kind)


def _unknown(kind: type) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"no family describes {kind.__module__}.{kind.__name__}, and no inputs can be made from its config (`growkern families` prints the "
        f"{len(FAMILIES)} known classes). Pass spec=growkern.describe(model, inputs=batch) to trace its forward on a batch, "
        "spec=growkern.describe(model, hints=growkern.Hint(...)) for a class that is built from a config alone, or spec=ModelSpec(...) to "
        "describe it yourself."
    )


def _hinted(model: nn.Module, params: Mapping[str, Tensor], hints: Hint, inputs: Inputs | None) -> ModelSpec:  # fmt: skip
    """Describe a model by the hints of its owner."""
    own, config = plain_class(type(model)), getattr(model, "config", None)
    title = f"cannot describe {own.__name__} by these hints:"
    if config is None or not isinstance(hints, Hint):  # pyright: ignore[reportUnnecessaryIsInstance]
        why = f"hints: expected a growkern.Hint, got {type(hints).__name__}."
        if isinstance(hints, Hint):  # pyright: ignore[reportUnnecessaryIsInstance]
            why = "the model has no config; pass inputs= in place of hints."
        raise UnsupportedModelError(f"{title} {why}")
    raise_all(UnsupportedModelError, title, [*hint_problems(hints, config)])
    return _with_live_ties(describe_by_hint(model, own, hints, inputs), params)


def _family(model: nn.Module, params: Mapping[str, Tensor]) -> ModelSpec:
    return _with_live_ties(_declared(model), params)


def _with_live_ties(spec: ModelSpec, params: Mapping[str, Tensor]) -> ModelSpec:
    # transformers unties two parameters if the checkpoint has different values for them
    same = {a: b for a, b in spec.ties.items() if params.get(a) is params.get(b)}
    return replace(spec, ties=same)


def _declared(model: nn.Module) -> ModelSpec:
    kind = plain_class(type(model))
    known = FAMILIES[kind.__name__]
    return describe_by_hint(model, kind, known) if isinstance(known, Hint) else known(model)


def untied(model: nn.Module) -> dict[str, str]:
    """Return the ties that the config of a model of a known family has, and its sharded parameters have not."""
    params: dict[str, Any] = dict(named_parameters(model, remove_duplicate=False))
    shards = known(type(model)) and any(map(is_sharded, params.values()))
    ties: Mapping[str, str] = _declared(model).ties if shards else {}
    pairs = {a: b for a, b in ties.items() if a in params and b in params}
    return {a: b for a, b in pairs.items() if params[a] is not params[b] and is_sharded(params[a])}


def _unfit(
    model: nn.Module, params: Mapping[str, Tensor], spec: ModelSpec, values: bool
) -> Iterator[str]:
    devices: dict[torch.device, str] = {}
    for name, p in unique(params.items()):
        plain = type(p.data) is Tensor and type(p) is nn.Parameter
        if not plain and not is_sharded(p):
            kind = type(p if type(p) is not nn.Parameter else p.data).__name__
            yield f"{name}: is a {kind}; growkern grows plain parameters only: convert it to an nn.Parameter."
        elif p.grad is not None and p.grad.layout is not torch.strided:
            yield f"{name}: has a sparse gradient; step and zero_grad(set_to_none=True) before growing."
        elif p.layout is torch.strided and overlaps(p):
            yield f"{name}: its elements overlap in memory (strides {p.stride()}); give it storage of its own."
        elif p.is_meta and values:
            yield f"{name}: is on the meta device; load the weights first."
        elif (
            p.is_quantized or p.is_sparse or p.layout is not torch.strided or p.dtype not in DTYPES
        ):
            kind = (
                "quantized"
                if p.is_quantized
                else str(p.layout if p.layout is not torch.strided else p.dtype)
            )
            dtypes = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            yield f"{name}: is {kind}; growkern grows dense {dtypes}: convert the tensor first."
        devices.setdefault(p.device, name)
    for name, b in named_buffers(model):
        if name in spec.tensors:
            devices.setdefault(b.device, name)
    if len(devices) > 1:
        places = ", ".join(f"{name} on {d}" for d, name in devices.items())
        yield f"the tensors are on several devices ({places}); move the model to one device."


def overlaps(tensor: Tensor) -> bool:
    """True when two elements may share a memory location."""
    if tensor.is_contiguous():
        return False
    span = 1
    for stride, n in sorted(
        (s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
    ):
        if stride < span:
            return tensor.numel() > 0
        span += stride * (n - 1)
    return False


def _uncovered(
    modules: Sequence[tuple[str, nn.Module]], params: Mapping[str, Tensor], spec: ModelSpec, live: Mapping[str, Tensor]
) -> Iterator[str]:  # fmt: skip
    must = set(params)
    for prefix, module in modules:
        must |= {
            f"{prefix}.{name}" if prefix else name
            for name in module._buffers  # pyright: ignore[reportPrivateUsage]
            if module._buffers[name] is not None and name not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]
        }
    yield from (
        f"{name}: the spec does not cover this tensor; name every parameter and persistent buffer in ModelSpec.tensors, or "
        "pass spec=growkern.describe(model, inputs=batch) to trace the forward."
        for name in sorted(must - set(spec.tensors))
    )
    yield from (
        f"{name}: the spec names this tensor, but the model does not have it; correct the name or leave it out."
        for name in sorted(set(spec.tensors) - set(live))
    )


def _misshapen(spec: ModelSpec, live: Mapping[str, Tensor]) -> Iterator[str]:
    for name in spec.tensors:
        try:
            shape = spec.shape(name)
        except (KeyError, ZeroDivisionError) as error:
            yield f"{name}: an axis names a space whose size {error} is not in sizes ({', '.join(spec.sizes)}); add it."
            continue
        if shape != tuple(live[name].shape):
            axes = ", ".join(map(str, spec.tensors[name]))
            yield f"{name}: has shape {tuple(live[name].shape)}, the spec says {shape} ({axes}); correct its sizes or axes."


def _absent(
    modules: Mapping[str, nn.Module], spec: ModelSpec, first: Mapping[str, nn.Module]
) -> Iterator[str]:
    """Yield attributes, modules, sizes, stream writers and blocks that the spec names and the model does not have."""
    for where in (*spec.attributes, *(f"config.{name}" for name in spec.config)):
        owner, _, name = where.rpartition(".")
        if where in spec.attributes and not hasattr(modules.get(owner), entry_of(name)[0]):
            yield f"{where}: the spec names this attribute, but the model does not have it; leave it out."
        module = owner.removeprefix("config").removeprefix(".")
        if where not in spec.attributes and module not in modules:
            yield f"{where}: the spec names {module!r}, but the model has no such module; correct the name."
    for name in spec.rebuilt_from_config:
        if name not in modules:
            yield f"{name}: rebuilt_from_config names this module, but the model does not have it; correct the name."
    axes = [axis for tensor in spec.tensors.values() for axis in tensor]
    written = {stream for axis in axes if axis.role != "reader" for stream in axis.streams}
    for name, tensor in spec.tensors.items():
        read = [stream for axis in tensor if axis.role == "reader" for stream in axis.streams]
        read += [axis.norm.reads for axis in tensor if axis.norm]
        yield from (
            f"{name}: reads the stream {c!r}, which no tensor of the spec writes; name a writer."
            for c in read
            if c not in written and c != SHARE
        )
    for stack in spec.stacks:
        yield from _misplaced(stack, spec, modules.get(stack.path), first.get(stack.path))


def _misplaced(
    stack: Blocks, spec: ModelSpec, container: nn.Module | None, first: nn.Module | None
) -> Iterator[str]:
    """Yield the differences between the model's container of blocks and the spec's stack of blocks; ``first`` stands in for none."""
    if not isinstance(container, nn.ModuleList | nn.ModuleDict | nn.Sequential):
        yield (
            f"{stack.path}: the spec says that the blocks are here, but the model has no ModuleList or ModuleDict here; correct "
            "Blocks(path)."
        )
        return
    blocks, said = container._modules, spec.sizes.get(stack.size)  # pyright: ignore[reportPrivateUsage]
    n, numbers = len(blocks), [*map(str, range(len(blocks)))]
    if said == 0:
        if any(block is not first for block in blocks.values()):
            yield f"{stack.path}: has {n} blocks, the spec says 0; set {stack.size} to {n}."
    elif n != said:
        yield f"{stack.path}: has {n} blocks, the spec says {stack.size}={said}; set it to {n}."
    elif [*blocks] != numbers:
        yield f"{stack.path}: has the keys {', '.join(blocks)}; name the blocks by their numbers, in order: {', '.join(numbers)}."
    elif len({id(block) for block in blocks.values()}) < n:
        yield f"{stack.path}: layers share one module, so it cannot gain layers; leave blocks out of the spec to grow in width."
    else:
        for name in (*stack.identity, *stack.carries, *stack.outputs):
            if not any(f"{stack.path}.{i}.{name}" in spec.tensors for i in {*stack.kinds, 0}):
                yield f"{stack.path}.0.{name}: Blocks names this tensor, but the spec does not have it; correct the name."


def _directed(spec: ModelSpec, tied: str, first: str) -> tuple[str, str]:
    """Order the names of a tie as (reader, writer): the axes of the writer decide how the tensor grows."""
    roles = zip(spec.tensors[tied], spec.tensors[first], strict=True)
    return (
        (first, tied)
        if any((a.role, b.role) == ("writer", "reader") for a, b in roles)
        else (tied, first)
    )


def _ties(params: Mapping[str, Tensor], spec: ModelSpec) -> Iterator[str]:
    first = {id(p): name for name, p in unique(params.items())}
    storages: dict[int, str] = {}
    for name, p in params.items():
        twin = first[id(p)]
        if twin != name and twin not in (spec.ties.get(name), name) and spec.ties.get(twin) != name:
            yield f"{name}: is the same parameter as {twin}, and the spec declares no tie; add ties={{{name!r}: {twin!r}}}."
        if name in spec.ties and params.get(spec.ties[name]) is not p:
            yield f"{name}: the spec ties it to {spec.ties[name]}, but they are different parameters; leave the tie out."
        if p.numel() and not p.is_meta:
            place = local(p)
            other = (
                storages.setdefault(place.untyped_storage().data_ptr(), name)
                if place.numel()
                else name
            )
            if params[other] is not p:
                yield f"{name}: shares storage with {other} without being the same parameter; give it storage of its own."
