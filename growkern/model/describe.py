"""Describe a live model as a ModelSpec. This module reads names, shapes and module attributes, never values of tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from growkern.distributed.shards import is_sharded, local
from growkern.errors import UnsupportedModelError, raise_all
from growkern.model import spec_check
from growkern.model.families import FAMILIES
from growkern.model.spec import SHARE, Blocks, ModelSpec
from growkern.support.names import named_buffers, named_modules, named_parameters

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
WRAPPERS = {
    "DataParallel": "pass model.module",
    "FullyShardedDataParallel": (
        fsdp1
        := "FSDP1 keeps flat parameters: use fully_shard, or save the gathered model, grow it (growkern grow), and wrap it anew"
    ),
    "DeepSpeedEngine": (
        deepspeed
        := "grow before deepspeed.initialize, or save, grow the checkpoint (growkern grow), and initialize anew"
    ),
    "PeftModel": (
        adapters := "merge the adapters first, or grow the base model before adding them"
    ),
    "BaseTuner": adapters,
    "BaseTunerLayer": adapters,
}
MANAGED = {  # attribute that an engine gives a parameter, also seen on the model inside its wrapper -> the engine, and the way out
    "_fsdp_flattened": ("FullyShardedDataParallel", fsdp1),
    "ds_id": ("DeepSpeedEngine (ZeRO stage 3)", deepspeed),
    "_hp_mapping": ("DeepSpeedEngine (ZeRO stage 1 or 2)", deepspeed),
}
# class name of a leaf module, or of its base -> attribute that caches a size -> axis of the module's weight
LEAVES: dict[str, dict[str, int]] = {
    "Linear": {"out_features": 0, "in_features": 1},
    "Conv1D": {"nx": 0, "nf": 1},
    "Embedding": {"num_embeddings": 0, "embedding_dim": 1},
    "LayerNorm": {"normalized_shape": 0},
    "RMSNorm": {"normalized_shape": 0},
    "Conv2d": {"out_channels": 0, "in_channels": 1},
}

PARAMETRIZED = {
    "weight_orig",
    "weight_g",
    "weight_v",
    "weight_mask",
}  # of torch.nn.utils: prune, weight_norm, spectral_norm

# package -> function that returns the object with the sizes of a model
CONFIGS: dict[str, Callable[[nn.Module], object]] = {
    "transformers": lambda model: model.config,
    "torch": lambda model: model,
}


def describe(
    model: nn.Module,
    spec: ModelSpec | None = None,
    *,
    values: bool = True,
    first: Mapping[str, nn.Module] | None = None,
) -> ModelSpec:
    """Describe a model: which axes of which tensors use which spaces.

    Args:
        model: A model of a known family, or any module together with a ``spec``.
        spec: Description of a model of your own. ``describe`` checks it against the model.
        values: False to describe a model on the meta device too.
        first: Path of a stack without blocks -> its block 0, as a growth builds it. Without it, block 0 is not held against the spec.

    Returns:
        The spec, with ``cached_sizes`` filled in and every tie ordered reader -> writer.

    Raises:
        UnsupportedModelError: The family is unknown, the model is wrapped, parameters cannot be grown, or the spec does not fit the
            model or does not cover every parameter and persistent buffer. The message lists all problems of the first failing check.
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
        UnsupportedModelError, f"cannot grow this {type(model).__name__}:", [*_wrappers(modules)]
    )
    if spec is not None:
        title = f"cannot describe {type(model).__name__} by this spec:"
        raise_all(UnsupportedModelError, title, [*spec_check.problems(spec)])
    params = dict(named_parameters(model, remove_duplicate=False))
    described = spec or _family(model, params)
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
    sizes = {
        f"{name}.{attribute}": (f"{name}.weight", axis)
        for name, module in modules
        for attribute, axis in cached_sizes(type(module)).items()
        if f"{name}.weight" in described.tensors
        and hasattr(module, attribute)
        and axis < len(described.tensors[f"{name}.weight"])
    }
    return replace(described, cached_sizes=sizes)


def _without_absent(spec: ModelSpec) -> ModelSpec:
    """Return a spec without the tensors and attributes of stacks that have no blocks."""
    if all(spec.sizes.get(stack.size) for stack in spec.stacks):
        return spec
    tensors = {name: axes for name, axes in spec.tensors.items() if not spec.absent(name)}
    attributes = {name: size for name, size in spec.attributes.items() if not spec.absent(name)}
    return replace(spec, tensors=tensors, attributes=attributes)


@cache
def cached_sizes(kind: type) -> Mapping[str, int]:
    """Return the attributes that cache sizes of the weight in modules of a class: attribute -> axis of the weight."""
    return next(
        (LEAVES[base.__name__] for base in kind.__mro__ if base.__name__ in LEAVES),
        dict[str, int](),
    )


def refuse_unknown(kind: type) -> None:
    """Raise UnsupportedModelError for a class of models that no family describes."""
    if kind.__name__ not in FAMILIES or kind.__module__.partition(".")[0] not in CONFIGS:
        raise UnsupportedModelError(
            f"no family describes {kind.__module__}.{kind.__name__}. Known: {', '.join(FAMILIES)} (of transformers and torch.nn). "
            "Pass spec=ModelSpec(...) to describe it yourself."
        )


def _family(model: nn.Module, params: Mapping[str, Tensor]) -> ModelSpec:
    spec = _declared(model)
    # transformers unties two parameters if the checkpoint has different values for them
    same = {a: b for a, b in spec.ties.items() if params.get(a) is params.get(b)}
    return replace(spec, ties=same)


def _declared(model: nn.Module) -> ModelSpec:
    # fully_shard makes a class of its own of the model's
    kind = next(k for k in type(model).__mro__ if not k.__module__.startswith("torch.distributed"))
    refuse_unknown(kind)
    return FAMILIES[kind.__name__](CONFIGS[kind.__module__.partition(".")[0]](model))


def untied(model: nn.Module) -> dict[str, str]:
    """Return the ties that the config of a model of a known family has, and its sharded parameters have not."""
    params: dict[str, Any] = dict(named_parameters(model, remove_duplicate=False))
    pairs = {a: b for a, b in _declared(model).ties.items() if a in params and b in params}
    return {a: b for a, b in pairs.items() if params[a] is not params[b] and is_sharded(params[a])}


def _wrappers(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    by_remedy: dict[str, str] = {}  # keyed by remedy: the outermost wrapper is enough
    first_of = {type(module): name or "the model" for name, module in reversed(modules)}
    for own, name in reversed(first_of.items()):
        for kind in own.__mro__:
            if kind.__name__ in WRAPPERS:
                by_remedy.setdefault(WRAPPERS[kind.__name__], f"{name} is a {kind.__name__}")
    params = {name: p for path, m in modules for name, p in m.named_parameters(path, recurse=False)}
    for name, p in params.items():
        for engine, way_out in (MANAGED[a] for a in MANAGED.keys() & vars(p).keys()):
            by_remedy.setdefault(way_out, f"{name}: a {engine} owns the parameter")
    for way_out, what in by_remedy.items():
        yield f"{what}, which is not supported yet: {way_out}."
    for name, module in modules:
        own = vars(module)
        if parametrize.is_parametrized(module) or any(
            PARAMETRIZED & own[kept].keys() for kept in ("_parameters", "_buffers")
        ):
            yield f"{name}: is parametrized or pruned; remove the parametrization first."
        if getattr(own.get("forward"), "__module__", None) == "torch.cuda.graphs":
            yield (
                f"{name or 'the model'}: make_graphed_callables has captured its forward, whose graphs would go on with the memory of the "
                "source's weights: delete the module's attribute forward, grow, and make the graphs again."
            )
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        yield "a CUDA graph is being captured; grow before, and capture the graph again."


def _unfit(
    model: nn.Module, params: Mapping[str, Tensor], spec: ModelSpec, values: bool
) -> Iterator[str]:
    devices: dict[torch.device, str] = {}
    for name, p in _first_names(params):
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


def _first_names(params: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter once, under its first name."""
    seen = set[int]()
    for name, p in params.items():
        if id(p) not in seen:
            seen.add(id(p))
            yield name, p


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
        f"{name}: the spec does not cover this tensor; name every parameter and persistent buffer in ModelSpec.tensors."
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
        if where in spec.attributes and not hasattr(modules.get(owner), name):
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
    if not isinstance(container, nn.ModuleList | nn.ModuleDict):
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
            if f"{stack.path}.0.{name}" not in spec.tensors:
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
    first = {id(p): name for name, p in _first_names(params)}
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
