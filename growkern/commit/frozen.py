"""Parameters that do not train, out of the backward: autograd stores nothing, and builds no graph, below the lowest block that trains.

The forward computes the same values, and no forward is replaced. A parameter that does not train has ``requires_grad=False`` and no
gradient: with a gradient of 0, Adam would go on moving it by its moments. A tied parameter that trains at one of its places only (a head
that is tied to a frozen embedding) keeps its gradient there, and the output of the module at the other place is detached. So are the
outputs of embeddings, where the activation checkpointing of transformers asks for gradients.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from growkern.errors import PlanError, UnsupportedModelError
from growkern.planning.growth_plan import GrowthPlan
from growkern.support.interrupts import uninterrupted
from growkern.support.names import named_modules, named_parameters


class Frozen:
    """What ``freeze`` has changed in a model. As a hook that does nothing, it stays on copies and pickles of the model.

    Attributes:
        names: Names at which parameters do not train.
        stacks: Names of the modules that hold blocks.
        n_blocks: Number of blocks that run in training; None for all.
        below: Those of ``names`` that act before the lowest block, and nowhere else.
        opened: Names at which parameters train although the blocks that they are copies of did not.
        params: Parameters that had ``requires_grad=True``.
        handles: Handles of the hooks.
    """

    def __init__(
        self, names: Collection[str] = (), stacks: Sequence[str] = (), n_blocks: int | None = None, below: Sequence[str] = (),
        opened: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.names, self.stacks, self.n_blocks = frozenset(names), tuple(stacks), n_blocks
        self.below, self.opened = tuple(below), frozenset(opened)
        self.params = list[nn.Parameter]()
        self.handles = list[RemovableHandle]()

    def __call__(self, *_: object) -> None:
        """Do nothing when a state dict is loaded."""

    def again(self) -> "Frozen":
        """Return what freezes the same."""
        return Frozen(self.names, self.stacks, self.n_blocks, self.below)

    def after(self, plan: GrowthPlan) -> "Frozen":
        """Return what freezes the same in the target of a growth, and none of its new blocks.

        Raises:
            PlanError: A shrinking drops all blocks that train.
        """
        paths = tuple(f"{path}." for path in self.stacks)
        kept_blocks = [row for row in plan.tensors if row.source.startswith(paths)]
        if plan.shrinks and kept_blocks and all(row.source in self.names for row in kept_blocks):
            raise PlanError(
                "the blocks that train would be dropped, and those that stay are frozen: let everything train by "
                "trains.All().apply(model), shrink, and choose again."
            )
        moved: dict[str, set[str]] = {}
        for row in plan.tensors:
            kept = moved.setdefault(row.source, set())
            kept |= set() if row.new else {row.name}
        names = {name for source in self.names for name in moved.get(source, {source})}
        return Frozen(names, self.stacks, self.n_blocks, self.below)


class Boundary:
    """Hook of the lowest block that trains: nothing below it may need a gradient.

    Attributes:
        name: Name of the block.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(
        self, module: nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]
    ) -> None:
        """Raise UnsupportedModelError if the input of the block has a gradient, or if the block is checkpointed so that it has none."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        refuse_reentrant(self.name, module)
        if any(isinstance(t, Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
            raise UnsupportedModelError(
                f"{self.name} is the lowest block that trains, and its input needs a gradient: something below it trains, or a hook asks "
                "for gradients there since (activation_checkpointing_enable registers one). Choose who trains afterwards, or trains.All()."
            )


class Prefix:
    """Hooks of a model in training, of which only the first blocks of a stack run; outside of the forward, the stack is whole.

    Attributes:
        path: Name of the module that holds the blocks.
        n: Number of blocks that run.
        whole: The modules of the stack during a forward; None outside.
    """

    def __init__(self, path: str, n: int) -> None:
        self.path, self.n, self.whole = path, n, None

    def enter(self, module: nn.Module, args: object) -> None:
        """Leave the upper blocks out."""
        if module.training:
            stack: Any = module.get_submodule(self.path)
            self.whole = stack._modules
            stack._modules = dict(islice(stack._modules.items(), self.n))

    def leave(self, module: nn.Module, args: object, output: object) -> None:
        """Put all blocks back, also when the forward has raised an exception."""
        if self.whole is not None:
            stack: Any = module.get_submodule(self.path)
            stack._modules, self.whole = self.whole, None


def refuse_reentrant(name: str, block: nn.Module) -> None:
    """Raise UnsupportedModelError for a block under reentrant checkpointing, which trains nothing where no input needs a gradient."""
    on = getattr(block, "gradient_checkpointing", False)
    how: Any = getattr(block, "_gradient_checkpointing_func" if on else "checkpoint_fn", None)
    if getattr(how, "keywords", {}).get("use_reentrant", False):
        raise UnsupportedModelError(
            f"{name} is under reentrant gradient checkpointing, which would train none of its parameters, as its input needs no gradient: "
            'pass gradient_checkpointing_kwargs={"use_reentrant": False}.'
        )


def refuse_reentrant_blocks(model: nn.Module) -> None:
    """Raise UnsupportedModelError if a block of a model is under reentrant checkpointing; see ``refuse_reentrant``."""
    for path, stack in named_modules(model):
        for name, block in (
            stack.named_children() if isinstance(stack, nn.ModuleList | nn.ModuleDict) else ()
        ):
            refuse_reentrant(f"{path}.{name}", block)


def detached(module: nn.Module, args: object, output: Any) -> Any:
    """Hook that detaches the output of a module from the graph."""
    return tree_map_only(Tensor, Tensor.detach, output)


def frozen_of(model: nn.Module) -> Frozen | None:
    """Return what is frozen in a model, or None."""
    by_id: Any = getattr(model, "_load_state_dict_pre_hooks")  # noqa: B009  (typed as private)
    hooks: list[Any] = [getattr(hook, "hook", hook) for hook in by_id.values()]  # torch wraps hooks
    return next((hook for hook in hooks if isinstance(hook, Frozen)), None)


def freeze(
    model: nn.Module, frozen: Frozen, masters: Mapping[Any, Tensor] | None = None
) -> None:  # fmt: skip
    """Let parameters train at no place of ``frozen.names``; what was frozen before trains again first.

    Args:
        model: The model.
        frozen: What to freeze; of a tied parameter, each of its names counts for itself. Parameters and handles are noted in it.
        masters: Parameter -> the tensor that the optimizer updates in its place, which loses its gradient too.

    Raises:
        PlanError: No parameter would train.
        UnsupportedModelError: The model cannot be frozen there. It is unchanged.
    """
    names, stacks = frozen.names, frozen.stacks
    places = list(named_parameters(model, remove_duplicate=False))
    opened = {p for name, p in places if name in frozen.opened and not p.requires_grad}
    trained = trained_under(model, frozen)
    ties = {name.rpartition(".")[0]: name for name, p in places if name in names and p in trained}
    below = {
        name.rpartition(".")[0] for name in frozen.below
    }  # where hooks of others ask for gradients
    above = {owner for owner in {*ties, *below} if not owner or any(f"{path}.".startswith(f"{owner}.") for path in stacks)}  # fmt: skip
    for owner, name in ties.items():
        if owner in above:
            raise UnsupportedModelError(
                f"cannot freeze {name} where it is not in the head: it is a parameter of {owner or 'the model itself'}, which contains the "
                "blocks. Put it into a module of its own (nn.Embedding)."
            )
    blocks = lowest(
        model, stacks, {name for name, p in places if name not in names and p in trained}
    )
    for name, block in blocks.items():
        refuse_reentrant(name, block)
    with uninterrupted():
        lift(model)
        if not names:
            return
        frozen.handles.append(model.register_load_state_dict_pre_hook(frozen))
        for p in opened:
            p.requires_grad_(True)
        for p in dict.fromkeys(p for _, p in places if p not in trained and p.requires_grad):
            frozen.params.append(p)
            p.requires_grad_(False)
            p.grad = None
            if masters is not None and p in masters:
                masters[p].grad = None
        for owner in {*ties, *below} - above:
            frozen.handles.append(model.get_submodule(owner).register_forward_hook(detached))
        for name, block in blocks.items():
            frozen.handles.append(block.register_forward_pre_hook(Boundary(name), with_kwargs=True))
        if frozen.n_blocks is not None:
            prefix = Prefix(stacks[0], frozen.n_blocks)
            frozen.handles.append(model.register_forward_pre_hook(prefix.enter))
            frozen.handles.append(model.register_forward_hook(prefix.leave, always_call=True))


def trained_under(model: nn.Module, frozen: Frozen) -> set[nn.Parameter]:
    """Return the parameters that would train after ``freeze``, at one of their places at least.

    Raises:
        PlanError: There is none.
    """
    before = frozen_of(model)
    places = list(named_parameters(model, remove_duplicate=False))
    able = {p for name, p in places if p.requires_grad or name in frozen.opened}
    able |= {*before.params} if before else set[nn.Parameter]()
    trained = {p for name, p in places if name not in frozen.names and p in able}
    if not trained:
        raise PlanError(
            "no parameter of the model would train, because those that are chosen have requires_grad=False: choose who trains by "
            "trains.All(), Top() or New()."
        )
    return trained


def refuse_lbfgs(optims: Iterable[Optimizer]) -> None:
    """Raise PlanError if an optimizer moves parameters that have no gradient: LBFGS steps along the differences of earlier steps."""
    if any(isinstance(optim, LBFGS) for optim in optims):
        raise PlanError(
            "LBFGS moves all of its parameters along the history of its steps, also those without a gradient: train everything, or use "
            "another optimizer."
        )


def lowest(model: nn.Module, stacks: Sequence[str], trained: Iterable[str]) -> dict[str, nn.Module]:
    """Return the lowest block that trains in a model of one stack; nothing if no block trains, or if stacks read each other."""
    if len(stacks) != 1:
        return {}
    own = [
        name.removeprefix(f"{stacks[0]}.") for name in trained if name.startswith(f"{stacks[0]}.")
    ]
    if not own:
        return {}
    name = f"{stacks[0]}.{min(int(inner.partition('.')[0]) for inner in own)}"
    return {name: model.get_submodule(name)}


def lift(model: nn.Module) -> Frozen | None:
    """Let everything train that trained before ``freeze``; return what was frozen, or None."""
    frozen = frozen_of(model)
    if frozen is not None:
        for handle in reversed(frozen.handles):
            handle.remove()
        for p in frozen.params:
            p.requires_grad_(True)
    return frozen
