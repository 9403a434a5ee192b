"""Write staged tensors to the live model and optimizer. Every write can be undone until the last write has succeeded."""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

from growkern.commit.checkpoint_guard import Grown, Guard, guard_of, history_of, records_growths
from growkern.commit.optimizer import OptimTarget, grow_optimizer, grow_state
from growkern.commit.optimizer_guard import OptimGuard, optim_guard_of
from growkern.commit.undo import Undo
from growkern.distributed.shards import local, own_part, without_fsdp
from growkern.errors import CommitError, UnsupportedModelError
from growkern.model import initial
from growkern.planning.decisions import BlockRow
from growkern.planning.growth_plan import GrowthPlan, TensorRow
from growkern.support.compiled import compile_alike, contexts, decorator_of, is_compiled
from growkern.support.interrupts import uninterrupted
from growkern.support.named_tensors import Tensors
from growkern.support.names import (
    canonical,
    entry_of,
    named_buffers,
    named_modules,
    named_parameters,
    same_modules,
    submodule,
    with_entry,
)

if TYPE_CHECKING:
    from growkern.distributed.fsdp import FullySharded


def commit(
    plan: GrowthPlan,
    parts: Iterable[Tensors],
    model: nn.Module,
    targets: Sequence[OptimTarget] = (),
    *,
    record: str,
    followers: Sequence[tuple[nn.Module, Iterable[Tensors]]] = (),
    undo: Undo,
    before_finalize: Callable[[], bool] = lambda: False,
    init: initial.Initialize | None = None,
    shards: "FullySharded | None" = None,
) -> None:
    """Turn the model and its optimizers into the target, or leave them bitwise unchanged.

    Args:
        plan: The growth plan.
        parts: Staged tensors from ``Execution.parts``, in any number of parts; consumed.
        model: The source model, changed in place. Parameter objects keep their identity.
        targets: The targets of the model's optimizers.
        record: The record of the growth for the config.
        followers: Models that grow by the same plan (averages of the model), each with its staged tensors.
        undo: Rollback log of every write; a failure rolls back the whole log.
        before_finalize: Called last, on the grown model. An exception in it rolls the growth back; so does a pending SIGINT, unless it
            returns True.
        init: Function that initializes the modules of new blocks in place of the model's own; None for the model's own.
        shards: The sharded parameters of the model; None if it has none.

    Raises:
        CommitError: The growth failed; every write has been rolled back.
    """
    torch.clear_autocast_cache()  # the cache holds casts of the source's weights
    with uninterrupted() as held:
        try:
            _model(plan, parts, model, targets, undo, held, record, init, shards)
            for follower, own in followers:
                _model(plan, own, follower, (), undo, held, record, init, shards)
            if held:
                raise KeyboardInterrupt
            final = before_finalize()
            if held and not final:
                raise KeyboardInterrupt
        except BaseException as error:
            undo.rollback()
            if isinstance(error, CommitError):
                raise
            if isinstance(error, Exception):
                raise CommitError(f"the growth failed and was rolled back: {error}") from error
            raise


def _model(
    plan: GrowthPlan,
    parts: Iterable[Tensors],
    model: nn.Module,
    targets: Sequence[OptimTarget],
    undo: Undo,
    held: list[int],
    record: str,
    init: initial.Initialize | None,
    shards: "FullySharded | None" = None,
) -> None:
    """Write one model and its optimizers."""
    source = dict(named_parameters(model, remove_duplicate=False))
    rows, fresh = {row.name: row for row in plan.tensors}, Tensors()
    owners = {name: target for target in targets for name in target.described.names}
    for staged in parts:
        _values([rows[name] for name in staged.values], staged, model, source, owners, undo)
        fresh.values |= {k: v for k, v in staged.values.items() if rows[k].new}
        fresh.states |= {k: v for k, v in staged.states.items() if rows[k].new}
        del staged
        if held:
            raise KeyboardInterrupt
    for path, order in plan.stacks.items():
        held_blocks = model.get_submodule(path)._modules  # pyright: ignore[reportPrivateUsage]
        if [*order] != [BlockRow(i) for i in range(len(held_blocks))]:
            blocks = _new_blocks(plan, path, fresh, model, shards)
            undo.set_dict(held_blocks, {str(i): block for i, block in enumerate(blocks)})
    if shards is not None:
        shards.join(undo.set_list)
    with same_modules(model):
        _attributes(plan, model, undo, record)
        _draw(plan, model, init)
        _guard(plan, model, targets, undo, record)
        params = dict(named_parameters(model, remove_duplicate=False))
    named = any("param_names" in group for t in targets for group in t.optim.param_groups)
    raw = model.named_parameters(remove_duplicate=False) if named else ()
    names = {canonical(name): name for name, _ in raw}
    for target in targets:
        grow_optimizer(plan, fresh, target, source, params, undo, names)


def _new_blocks(
    plan: GrowthPlan, path: str, staged: Tensors, model: nn.Module, shards: "FullySharded | None"
) -> list[nn.Module]:  # fmt: skip
    """All blocks of a target stack: live blocks, and for new blocks copies of the modules (not of their tensors)."""
    live = [m for m in model.get_submodule(path)._modules.values() if m is not None]  # pyright: ignore[reportPrivateUsage]
    blocks, shared = list[nn.Module](), shared_by(model)
    by_block: dict[str, dict[str, torch.Tensor]] = {}
    for name, value in staged.values.items():
        if name.startswith(f"{path}."):
            index, _, inner = name.removeprefix(f"{path}.").partition(".")
            by_block.setdefault(index, {})[inner] = value
    for index, block in enumerate(plan.stacks[path]):
        source = live[block.source]
        if block.new:
            values = by_block.get(str(index), {})
            copy = partial(copied, source, f"{path}.{block.source}", shared=shared)
            blocks.append(copy(values) if shards is None else shards.copied(source, values, copy))
        else:
            blocks.append(source)
    return blocks


class _Memo(dict[int, object]):
    """A memo of ``deepcopy`` in which all objects of a model but those of one block are their own copies.

    The copies of all blocks read one mapping of the model's objects, so that their time does not grow with the square of the depth.
    """

    def __init__(self, shared: Mapping[int, object], own: Iterable[object]) -> None:
        self.shared, self.own = shared, {*map(id, own)}

    def __missing__(self, key: int) -> object:
        if key in self.own:
            raise KeyError(key)
        return self.shared[key]

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or (key in self.shared and key not in self.own)

    def get(self, key: int, default: Any = None) -> Any:
        try:
            return self[key]
        except KeyError:
            return default


def shared_by(model: nn.Module) -> dict[int, object]:
    """Return the objects of a model that a copied block may share, by id: its configs and its modules."""
    return {id(thing): thing for thing in (*_configs(model), *(m for _, m in named_modules(model)))}


def copied(
    block: nn.Module, name: str, values: dict[str, torch.Tensor], shared: Mapping[int, object]
) -> nn.Module:
    """Copy the modules of a block, with ``values`` as tensors. The objects in ``shared`` that are not the block's stay shared."""
    own = set(block.modules())
    memo = _Memo(shared, own)
    memo |= {id(o): o for m in own for o in _hook_owners(m) if o not in own}
    for inner, p in named_parameters(block):
        memo[id(p)] = nn.Parameter(values[inner], requires_grad=p.requires_grad)
    memo |= contexts(block)
    memo |= {id(b): values[inner] for inner, b in named_buffers(block) if inner in values}
    try:
        return compile_alike(copy.deepcopy(block, memo), block, memo)
    except Exception as error:
        raise CommitError(
            f"cannot copy block {name} ({error}); remove the attribute that cannot be copied from the modules of the block, grow, "
            "and set the attribute again. Nothing was changed."
        ) from error


def _draw(plan: GrowthPlan, model: nn.Module, init: initial.Initialize | None) -> None:
    """Initialize the drawn parameters of new blocks with ``init``, or with the grown model's own code."""
    drawn = plan.drawn
    for block in plan.new_blocks if drawn else ():
        values = _initialized(model, block, plan.seed, init)
        for name, p in named_parameters(model.get_submodule(block)):
            if f"{block}.{name}" in drawn:
                local(p.detach()).copy_(own_part(values.pop(name), p))


def _initialized(
    model: nn.Module, name: str, seed: int, init: initial.Initialize | None
) -> dict[str, nn.Parameter]:
    """Return newly initialized parameters of a block, made on the CPU in a copy of its modules; whole ones where the block is sharded."""
    block = model.get_submodule(name)
    blank = {n: initial.blank(p) for n, p in named_parameters(block)}
    buffers = {n: b.to("cpu", copy=True) for n, b in named_buffers(block)}
    with without_fsdp(block):
        twin = copied(block, name, blank | buffers, shared_by(model))
    initial.initialize(twin, init or initial.initializer(model, name), initial.seed_of(seed, name))
    return dict(named_parameters(twin))


def _hook_owners(module: nn.Module) -> list[object]:
    """Objects whose bound methods are hooks of a module. They belong to the user and are not copied."""
    tables: list[Any] = [v for k, v in vars(module).items() if k.endswith("_hooks")]
    hooks: list[Any] = [hook for t in tables if isinstance(t, dict) for hook in t.values()]  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]
    owners: list[Any] = [getattr(hook, "__self__", None) for hook in hooks]
    return [owner for owner in owners if owner is not None]


def check_blocks(
    plan: GrowthPlan, model: nn.Module, init: initial.Initialize | None = None
) -> None:
    """Check that all new blocks can be built, and initialized by ``init`` (None: by the model's own code).

    Raises:
        UnsupportedModelError: A block to be copied has a patched ``forward``, so that the copy would run the original's weights;
            or a parameter of a block that is drawn is not initialized.
    """
    copied = {f"{at}.{b.source}": None for at, bs in plan.stacks.items() for b in bs if b.new}
    modules = {
        f"{block}.{name}".rstrip("."): module
        for block in copied
        for name, module in named_modules(model.get_submodule(block))
    }
    patched = [n for n, m in modules.items() if isinstance(vars(m).get("forward"), FunctionType) and not is_compiled(m)]  # fmt: skip
    if patched:
        raise UnsupportedModelError(
            f"cannot copy blocks whose forward is patched by a function ({', '.join(patched[:3])}): the copy would run the "
            "original's weights. Remove the patch, grow, and patch again."
        )
    if unknown := [n for n, m in modules.items() if is_compiled(m) and decorator_of(m) is None]:
        raise UnsupportedModelError(
            f"cannot compile new blocks as {unknown[0]} is: its _compiled_call_impl does not tell the arguments of torch.compile. Set it "
            "to None, grow, and call compile() of every block again."
        )
    # source blocks: target blocks differ only in size; a model without blocks has the target's config only when it is grown
    own = {f"{at}.{b.source}" for at, bs in plan.stacks.items() for b in bs if not b.new}
    for block in (name for name in copied if name in own) if plan.drawn else ():
        _initialized(model, block, plan.seed, init)


def _configs(model: nn.Module) -> list[object]:
    """All config objects of the model and its submodules."""
    configs = {
        id(c): c for _, m in named_modules(model) if (c := vars(m).get("config")) is not None
    }
    return list(configs.values())


def _values(
    rows: list[TensorRow],
    staged: Tensors,
    model: nn.Module,
    source: dict[str, nn.Parameter],
    owners: Mapping[str, OptimTarget],
    undo: Undo,
) -> None:
    """Write storage, gradients and optimizer state of existing parameters, and write buffers."""
    for row in rows:
        if row.new:
            continue
        value, p = staged.values[row.name], source.get(row.source)
        if p is None:
            owner, _, name = row.source.rpartition(".")
            buffers = submodule(model, owner)._buffers  # pyright: ignore[reportPrivateUsage]
            undo.set_dict(buffers, buffers | {name: value})
            continue
        undo.storage(p, value, staged.grads.get(row.name))
        if row.name in staged.states:
            grow_state(owners[row.source], p, staged.states[row.name], undo)


def _attributes(plan: GrowthPlan, model: nn.Module, undo: Undo, record: str) -> None:
    modules: dict[str, Any] = dict(named_modules(model, remove_duplicate=False))
    for path, value in plan.attributes.items():
        owner, _, name = path.rpartition(".")
        module, (name, index) = modules[owner], entry_of(name)
        before: Any = getattr(module, name)
        after: Any = with_entry(before, index, value)
        if isinstance(before, torch.Tensor) or after != before:
            undo.attribute(module, name, after)
    for path, factor in plan.eps.items():
        owner, _, name = path.rpartition(".")
        undo.attribute(modules[owner], name, getattr(modules[owner], name) * factor)
    own: Any = vars(model).get("config")
    copies = {id(config): _grown_config(plan, model, config) for config in _configs(model)}
    if records_growths(own):
        copies[id(own)] = grown_config(plan, model, own, record)
    for config in _configs(model):  # a config of two towers holds the configs of both
        parts = {
            name: copies[id(part)]
            for name, part in getattr(config, "__dict__", {}).items()
            if id(part) in copies
        }
        if parts and copies[id(config)] is not config:
            vars(copies[id(config)]).update(parts)
    for _, module in named_modules(model):
        if (config := vars(module).get("config")) is not None and copies[id(config)] is not config:
            undo.attribute(module, "config", copies[id(config)])
    for path in plan.rebuilt_modules:
        old = modules[path]
        for name, b in type(old)(old.config).named_buffers(recurse=False):
            undo.attribute(old, name, b.to(getattr(old, name)))


def grown_config(plan: GrowthPlan, model: nn.Module, config: Any, record: str) -> Any:
    """Copy a config of transformers, with the target's sizes and the record of this growth."""
    grown = _grown_config(plan, model, config)
    grown = copy.deepcopy(config) if grown is config else grown
    grown.growkern_history = [*history_of(config), record]
    return grown


def _grown_config(plan: GrowthPlan, model: nn.Module, config: Any) -> Any:
    """Copy a config with the target's sizes, so that other models with the same config object stay valid."""
    order = [block.source for block in plan.blocks]
    fields: dict[str, float] = {}
    for key, value in sorted(plan.config.items(), key=lambda item: "." in item[0]):
        owner, _, name = key.rpartition(".")
        if not owner or vars(submodule(model, owner)).get("config") is config:
            fields[name] = value
    changed: dict[str, Any] = {}
    for key, value in fields.items():
        name, index = entry_of(key)
        before: Any = changed.get(name, getattr(config, name, None))
        if (after := with_entry(before, index, value)) != before:
            changed[name] = after
    for name in plan.config_lists:
        entries: Any = changed.get(name, getattr(config, name, None))
        if isinstance(entries, list) and order and order != list(range(len(entries))):  # pyright: ignore[reportUnknownArgumentType]
            changed[name] = [entries[i] for i in order]  # pyright: ignore[reportUnknownVariableType]
    if plan.config_eps and hasattr(config, plan.config_eps[0]):
        changed[plan.config_eps[0]] = getattr(config, plan.config_eps[0]) * plan.config_eps[1]
    if not changed:
        return config
    grown = copy.deepcopy(config)
    for name, value in changed.items():
        setattr(grown, name, value)
    return grown


def _guard(
    plan: GrowthPlan, model: nn.Module, targets: Sequence[OptimTarget], undo: Undo, record: str
) -> None:
    """Register or update the hooks that refuse checkpoints from before the growth."""
    guard = guard_of(model)
    if guard is None:
        guard = Guard()
        undo.rollbacks.append(model.register_load_state_dict_pre_hook(guard).remove)
    grown = Grown.by(plan, len(guard.growths) + 1, record)
    undo.attribute(guard, "growths", [*guard.growths, grown])
    left = _left(plan, model, targets)
    for target in targets:
        own, rules = optim_guard_of(target.optim), target.described.rules
        if own is None:
            own = OptimGuard(rules, grown.what, model=model)
            undo.rollbacks.append(own.remove)
            own.register(target.optim)
        undo.attribute(own, "rules", rules)
        undo.attribute(own, "what", grown.what)
        undo.attribute(own, "model", ref(model))
        undo.attribute(own, "history", [*own.history, record])
        undo.attribute(own, "left", own.left | left)


def _left(
    plan: GrowthPlan, model: nn.Module, targets: Sequence[OptimTarget]
) -> dict[int, "ref[Tensor]"]:
    """Return the parameters, by ``id``, that take learning-rate factors by this growth and are in no optimizer, such as frozen ones."""
    if plan.dynamics is None:
        return {}
    held = {id(p) for t in targets for group in t.optim.param_groups for p in group["params"]}
    held |= {id(p) for target in targets for p in target.master_weights}
    params = dict(named_parameters(model))
    grown = (params.get(row.name) for row in plan.tensors if plan.changes(row))
    return {id(p): ref(p) for p in grown if p is not None and id(p) not in held}
