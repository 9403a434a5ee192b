"""Fields of configs of transformers that hold sizes: proved by building the model on the meta device from a changed config."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from growkern.model.size_values import Ratio, Size, size_value
from growkern.model.spec import Blocks, ModelSpec
from growkern.model.tracing.expressions import Expression, fit
from growkern.model.tracing.forward import persistent_buffers
from growkern.model.tracing.stacks import turn_of
from growkern.support.names import entry_of, named_modules, named_parameters, with_entry

MORE = 8  # blocks that are added to see whether a config builds other kinds of blocks behind the source's
# fields that are no widths
OTHER_FIELDS = re.compile("vocab|position|_id$|layers?$|num_labels|theta|eps|image")
NO_FORWARD = re.compile("drop|init|std")  # numbers for training and for new weights


@dataclass
class Fields:
    """What a config says of a model.

    Attributes:
        sizes: Field, with the path of the module that has the config -> size.
        lists: Fields that hold one entry per block.
        eps: Field that holds the epsilon of the norms.
        next_kinds: Stack of blocks of several kinds -> kinds of the places behind its blocks, in turn; nothing if they are of other kinds.
        coupled: True when hidden grows with heads only.
        problem: Why the config of a grown model does not build it; None if it does.
        together: Size -> why the config does not build a model in which the size alone grows.
    """

    sizes: dict[str, Size] = field(default_factory=dict[str, Size])
    lists: tuple[str, ...] = ()
    eps: str | None = None
    next_kinds: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    coupled: bool = False
    problem: str | None = None
    together: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class _Field:
    config: tuple[str, ...]  # attributes that lead from the model's config to the config
    name: str
    key: str  # in ModelSpec.config


def has_config(model: nn.Module) -> bool:
    """True for a model that transformers builds from its config."""
    return any(k.__module__.startswith("transformers.") for k in type(model).__mro__) and hasattr(
        getattr(model, "config", None), "to_dict"
    )


def find_fields(
    model: nn.Module,
    spec: ModelSpec,
    found: Mapping[int, list[Expression]],
    to: Mapping[str, int],
    eps: object,
) -> Fields:
    """Find the fields of the config that hold sizes.

    Args:
        model: A model of transformers.
        spec: Its spec, with sizes and tensors.
        found: Length -> the sizes and products of sizes that the model has at this length.
        to: Target sizes for trials.
        eps: Epsilon of the norms.
    """
    result = Fields()
    options = {**dict(_options(model, found, spec.sizes)), **dict(_unset(model, spec))}
    chosen = {f: 0 for f in options}

    def build(sizes: Mapping[str, int], ranks: Mapping[_Field, int]) -> int:
        all_sizes = {**spec.sizes, **sizes}
        values = {f: _whole(size_value(options[f][r], all_sizes)) for f, r in ranks.items()}
        return _differences(model, values, spec, all_sizes)

    if _differences(model, {}, spec, spec.sizes):
        result.problem = "the model built from its config has other tensors"
        return result
    best, improved = build(to, chosen), True
    while best and improved:
        improved = False
        changes = [(f, r) for f in options for r in range(len(options[f])) if r != chosen[f]]
        # a field that grows is likelier than one that stays
        for f, rank in sorted(
            changes, key=lambda change: _is_number(options[change[0]][change[1]])
        ):
            tried = {**chosen, f: rank}
            if rank != chosen[f] and (n := build(to, tried)) < best:
                chosen, best, improved = tried, n, True
    if best:
        result.problem = f"{best} tensors of a model built from the grown config have other shapes"
    for f, rank in chosen.items():
        e = options[f][rank]
        if any(isinstance(x, str) for x in e):
            result.sizes[f.key] = e[0] if len(e) == 1 and isinstance(e[0], str) else e  # pyright: ignore
    heads = {k: n for k, n in to.items() if k in ("heads", "kv_heads")}
    units = {k: {k: n} for k, n in to.items() if k not in heads} | (
        {"heads": heads} if heads else {}
    )
    failed = {k: n for k, unit in units.items() if (n := build(unit, chosen))} if not best else {}
    result.coupled = {"hidden", "heads"} <= failed.keys()
    for size, n in failed.items():
        if not result.coupled or not size.startswith(("hidden", "heads")):
            why = f"{n} tensors of a model built from a config where {size} alone grows have other shapes"
            result.together |= dict.fromkeys(units[size], why)
    result.eps = None if eps is None else _eps_field(model, eps)
    return replace(result, **_depth(model, spec, result))


def _fields(config: Any) -> dict[str, Any]:
    return vars(config)  # pyright: ignore


def _entries(config: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a config, and in place of a list its entries: ``"intermediate_size[0]"``."""
    for name, value in _fields(config).items():
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", x) for i, x in enumerate(value))  # pyright: ignore
        else:
            yield name, value


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, list) else None  # pyright: ignore


def _is_number(e: Expression) -> bool:
    return not any(isinstance(x, str) for x in e)


def _configs(model: nn.Module) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield every config inside the model's: how the model's config leads to it, the path of a module that has it, and the config."""
    paths = {id(m.config): path for path, m in reversed([*named_modules(model)]) if hasattr(m, "config")}  # fmt: skip
    top: Any = model.config
    yield (), "", top
    for name, value in _fields(top).items():
        if hasattr(value, "to_dict") and id(value) in paths:
            yield (name,), f"{paths[id(value)]}.", value


def _whole(value: float) -> float:
    return int(value) if value == int(value) else value


def _options(
    model: nn.Module, found: Mapping[int, list[Expression]], sizes: Mapping[str, int]
) -> Iterator[tuple[_Field, list[Expression]]]:
    for lead, path, config in _configs(model):
        for name, value in _entries(config):
            if type(value) in (int, float) and re.search("mlp_ratio|expand", name):
                ffn = [s for s, n in sizes.items() if s.startswith("ffn") and n == value * sizes.get("hidden", 0)]  # fmt: skip
                if ffn:
                    yield _Field(lead, name, f"{path}{name}"), [Ratio(ffn[0], "hidden")]
                    continue
            if type(value) is not int or value < 2 or OTHER_FIELDS.search(entry_of(name)[0]):
                continue
            half = [(*e, 2) for e in found.get(value // 2, ()) if isinstance(e, tuple)] if value % 2 == 0 else []  # fmt: skip
            own = sorted(found.get(value, half), key=lambda e: (-fit(name, e), len(e)))
            if not own:
                continue
            grown = [(value,), *own] if fit(name, own[0]) <= 0 else [*own, (value,)]
            yield _Field(lead, name, f"{path}{name}"), grown


def _unset(model: nn.Module, spec: ModelSpec) -> Iterator[tuple[_Field, list[Expression]]]:
    """Yield the fields that are None, in place of which the model computes the size of its FFN from hidden."""
    for lead, path, config in _configs(model) if "ffn" in spec.sizes else ():
        for name, value in _fields(config).items():
            if value is None and fit(name, ("ffn",)) > 0:
                f, n = _Field(lead, name, f"{path}{name}"), 2 * spec.sizes["ffn"]
                sizes = {**spec.sizes, "ffn": n}
                if _differences(model, {f: n}, spec, sizes) < _differences(model, {}, spec, sizes):
                    yield f, [("ffn",)]


def _built(model: nn.Module, values: Mapping[_Field, object]) -> nn.Module:
    """Build a model on the meta device from the config with changed fields."""
    config: Any = copy.deepcopy(model.config)
    for f, value in values.items():
        own = config
        for name in f.config:
            own = getattr(own, name)
        leaf, index = entry_of(f.name)
        whole = leaf == f.name
        setattr(own, leaf, value if whole else with_entry(getattr(own, leaf), index, value))  # pyright: ignore  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return type(model)(config)


def _differences(model: nn.Module, values: Mapping[_Field, object], spec: ModelSpec, sizes: Mapping[str, int]) -> int:  # fmt: skip
    """Return how many tensors of a built model do not have the shapes of the spec."""
    try:
        built = _built(model, values)
    except Exception:  # a wrong config may raise anything
        return len(spec.tensors) + 1
    shapes = {name: tuple(p.shape) for name, p in named_parameters(built, remove_duplicate=False)}
    wanted = {n for n, _ in named_parameters(model, remove_duplicate=False)}
    return sum(shapes.get(name) != spec.shape(name, sizes) for name in wanted)


def _depth(model: nn.Module, spec: ModelSpec, known: Fields) -> dict[str, Any]:
    """Find the field that counts the blocks of each stack, and the lists with an entry per block."""
    sizes, lists, kinds = dict(known.sizes), list[str](), dict[str, tuple[int, ...]]()
    for stack in spec.stacks:
        n = spec.sizes[stack.size]
        for lead, path, config in _configs(model):
            every = [k for k, v in _fields(config).items() if _length(v) == n]
            named = [k for k in every if "layer" in k]  # others may be as long by chance
            for name, value in [*_fields(config).items()]:
                if type(value) is not int or value != n or not re.search("layer|depth|block", name):
                    continue
                tries = (named, every) if named != every else (named,)
                long = next((own for own in tries if _deeper(model, lead, name, n, own, stack)), None)  # fmt: skip
                if long is None:
                    continue
                sizes[f"{path}{name}"] = stack.size
                lists += [k for k in long if k not in lists and not lead]
                if stack.kinds:
                    twice: dict[_Field, object] = {_Field(lead, k, k): 2 * _fields(config)[k] for k in long}  # fmt: skip
                    kinds[stack.path] = _next_kinds(model, twice | {_Field(lead, name, name): 2 * n}, stack)  # fmt: skip
    return {"sizes": sizes, "lists": tuple(lists), "next_kinds": kinds}


def _deeper(model: nn.Module, lead: tuple[str, ...], name: str, n: int, lists: Sequence[str], stack: Blocks) -> bool:  # fmt: skip
    """True when a field counts the blocks of a stack: of a longer model, the first are those of the source and the others copies.

    A list of the numbers of some blocks, such as ``mlp_only_layers``, may be as long as the stack; its longer model has other blocks.
    """
    config: Any = model.config
    for attribute in lead:
        config = getattr(config, attribute)
    extra = 1 if stack.kinds else min(n, MORE)
    more: dict[_Field, object] = {_Field(lead, k, k): [*getattr(config, k), *getattr(config, k)[-1:] * extra] for k in lists}  # fmt: skip
    try:
        source, longer = (
            _built(model, values) for values in ({}, {**more, _Field(lead, name, name): n + extra})
        )
        base, built = (_looks(m.get_submodule(stack.path)) for m in (source, longer))
    except Exception:  # a field that is not the depth may raise anything
        return False
    known = base if stack.kinds else base[-1:]
    # one field may count two stacks, and numbers such as a scale of residuals may follow from the depth
    others = _outside(longer, stack) != _outside(source, stack)
    numbers = not _floats(source).items() <= _floats(longer).items()
    same = built[:n] == base and len(built) == n + extra and all(b in known for b in built[n:])
    return same and not others and not numbers


def _outside(model: nn.Module, stack: Blocks) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that are not in a stack."""
    return {k: shape for k, shape in _shapes(model).items() if not k.startswith(f"{stack.path}.")}


def _floats(model: nn.Module) -> dict[tuple[str, str], float]:
    """Return the numbers that modules hold for their forward in evaluation mode."""
    held = ((path, name, v) for path, m in named_modules(model) for name, v in vars(m).items())
    return {(path, name): v for path, name, v in held if type(v) is float and not NO_FORWARD.search(name)}  # fmt: skip


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a state dict holds."""
    own = dict(named_parameters(model, remove_duplicate=False)) | persistent_buffers(model)
    return {name: tuple(t.shape) for name, t in own.items()}


def _eps_field(model: nn.Module, eps: object) -> str | None:
    """Return the field that holds the epsilons of all norms that have this one; None if some have it from elsewhere."""
    base = _epsilons(_built(model, {}), eps)
    for name, value in _fields(model.config).items():
        if "eps" in name and value == eps:
            try:
                built = _built(model, {_Field((), name, name): 2 * value})
            except Exception:  # a config may refuse any value
                continue
            if base <= _epsilons(built, 2 * value):
                return name
    return None


def _epsilons(model: nn.Module, eps: object) -> set[tuple[str, str]]:
    """Return the attributes of modules that hold an epsilon."""
    return {(path, name) for path, m in named_modules(model) for name, v in vars(m).items() if "eps" in name and v == eps}  # fmt: skip


def _next_kinds(model: nn.Module, twice: Mapping[_Field, object], stack: Blocks) -> tuple[int, ...]:
    """Return the kinds of the places behind those of the source in a model of twice as many blocks; nothing if the source has others."""
    blocks = _looks(model.get_submodule(stack.path))
    try:
        built = _looks(_built(model, twice).get_submodule(stack.path))
    except Exception:  # a config that builds no such model may raise anything
        return ()
    kinds = [blocks.index(look) if look in blocks else -1 for look in built]
    alike = [kinds[i] == kinds[first] for i, first in enumerate(stack.kinds)]
    return turn_of(kinds[len(blocks) :]) if all(alike) and -1 not in kinds else ()


def _looks(container: nn.Module) -> list[object]:
    """Return class, names and shapes of every block."""
    return [
        (type(block), {name: tuple(p.shape) for name, p in named_parameters(block)})
        for block in container.children()
    ]
