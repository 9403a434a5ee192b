"""What an optimizer's state dict knows of growths: guard what a grown optimizer loads, and settle what an optimizer has loaded."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from hashlib import blake2b
from itertools import takewhile
from operator import itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from growkern.commit.checkpoint_guard import growth_history
from growkern.commit.param_groups import LR_FACTOR, check_rates
from growkern.distributed.zero import is_part
from growkern.errors import CheckpointError, PlanError
from growkern.optimizer.state_rules import Rule
from growkern.optimizer.update_scale import KEY as SCALES
from growkern.optimizer.update_scale import adopt, scale_of
from growkern.planning.growth_record import read
from growkern.support.live_registry import Live
from growkern.support.names import named_parameters

KEY = "growth"  # of a param group in a state dict: its number of parameters, and the growths that the optimizer has seen
WAY_OUT = (
    "Load a checkpoint from before a growth before growing; to load one from after a growth, build model and optimizer as at the "
    "start of the run, and first call growkern.resume(model, optim, history) with the scheduler, if the growth had one."
)


class OptimGuard:
    """Hooks of a grown optimizer: one checks state dicts that are loaded (torch checks no shapes, and ``fused=True`` writes out of
    bounds), one adds the growths to state dicts that are saved.

    Attributes:
        rules: State key -> rule for its shape.
        what: Description of the last growth.
        history: Records of the growths that the optimizer has seen, as JSON.
        model: Function that returns the model that grows, or None when it is gone.
        left: Parameters that were in no optimizer when they grew with learning-rate factors, by ``id``.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule | None],
        what: str,
        history: Sequence[str] = (),
        model: nn.Module | None = None,
    ) -> None:
        self.rules, self.what, self.history = rules, what, [*history]
        self.model: Callable[[], nn.Module | None] = ref(model) if model is not None else _none
        self.left: dict[int, ref[Tensor]] = {}
        self._handles: list[Any] = []

    def register(self, optim: Optimizer) -> None:
        """Register the hooks on an optimizer."""
        self._handles.append(optim.register_load_state_dict_pre_hook(self.check))
        self._handles.append(optim.register_state_dict_post_hook(self.pack))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def check(self, optim: Optimizer, state_dict: Mapping[str, Any]) -> None:
        """Raise CheckpointError for state whose shapes do not fit the optimizer's parameters."""
        saved: list[int] = [i for group in state_dict["param_groups"] for i in group["params"]]
        params: list[Tensor] = [p for group in optim.param_groups for p in group["params"]]
        n_saved, n = len(state_dict["param_groups"]), len(optim.param_groups)
        if (len(saved), n_saved) != (len(params), n):
            since = f" since {self.what}" if self.history else ""
            raise CheckpointError(
                f"this optimizer checkpoint has {len(saved)} parameters in {n_saved} param groups, and the optimizer has "
                f"{len(params)} in {n}{since}. {WAY_OUT}"
            )
        fit = f"is from before {self.what}" if self.history else "does not fit the optimizer"
        for i, p in zip(saved, params, strict=True):
            # a ZeroRedundancyOptimizer has None for parameters of other processes
            entries: dict[str, object] = state_dict["state"].get(i) or {}
            for key, value in entries.items():
                rule = self.rules.get(key)
                if not isinstance(value, Tensor) or rule is None:
                    continue
                if tuple(value.shape) != (shape := rule.shape(tuple(p.shape))):
                    raise CheckpointError(
                        f"this optimizer checkpoint {fit}: {key!r} of parameter {i} has the shape "
                        f"{tuple(value.shape)}, and the optimizer needs {shape}. {WAY_OUT}"
                    )

    def pack(self, optim: Optimizer, state_dict: dict[str, Any]) -> None:
        """Add the growths to the first param group of a state dict, and number and order of the parameters to every group."""
        orders = _orders(optim, self.model())
        for i, group in enumerate(state_dict["param_groups"]):
            if KEY in group:  # loaded, and not settled before the first step
                continue
            n_params, history = len(group["params"]), [] if i else [*self.history]
            group[KEY] = {"n_params": n_params, "order": orders[i], "history": history}


def optim_guard_of(optim: Optimizer) -> OptimGuard | None:
    """Return the ``OptimGuard`` of an optimizer, or None."""
    hooks: list[Any] = [*optim._optimizer_load_state_dict_pre_hooks.values()]  # pyright: ignore[reportPrivateUsage]
    owners = [getattr(hook, "__self__", None) for hook in hooks]
    return next((owner for owner in owners if isinstance(owner, OptimGuard)), None)


def _none() -> None:
    return None


def _orders(optim: Optimizer, model: nn.Module | None) -> list[str]:
    """Return a digest of the names of the parameters of each param group, in their order; empty texts without a model.

    A prefix that all names share is left out: it depends on the wrappers of the model.
    """
    if model is None:
        return [""] * len(optim.param_groups)
    names = {id(p): name for name, p in named_parameters(model)}
    groups = [[names.get(id(p), "") for p in group["params"]] for group in optim.param_groups]
    paths = [name.split(".")[:-1] for group in groups for name in group if name]
    shared = takewhile(lambda parts: len({*parts}) == 1, zip(*paths, strict=False))
    n = sum(len(parts[0]) + 1 for parts in shared)
    texts = ("\n".join(name[n:] for name in group) for group in groups)
    return [blake2b(text.encode(), digest_size=8).hexdigest() for text in texts]


def history_in(state_dict: Mapping[str, Any]) -> list[str] | None:
    """Return the growths that the optimizer of a state dict has seen, as JSON; None for a mapping that is no state dict.

    Example:
        >>> report = growkern.expand_inplace(model, optim)
        >>> history_in(optim.state_dict()) == [*report.history]
        True
    """
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list | tuple):
        return None
    entries: list[Any] = [group.get(KEY) or {} for group in groups if isinstance(group, Mapping)]  # pyright: ignore
    return [record for entry in entries for record in entry.get("history", ())]


def settle(optim: Optimizer) -> None:
    """Put into effect what a loaded state dict says of growths: factors of the updates, and the growths that the optimizer has seen.

    Raises:
        PlanError: The state dict's param groups were split by a growth, and have been loaded into one group; or see ``adopt``.
    """
    loaded: list[tuple[Any, Any]] = [(g, g[KEY]) for g in optim.param_groups if KEY in g]
    own = optim_guard_of(optim)
    if any(isinstance(group.get(SCALES), Mapping) for group, _ in loaded):
        _refuse_other_order(optim, loaded, own)
    adopt(optim)
    scale = scale_of(optim)
    if loaded and scale is not None and not any(SCALES in group for group, _ in loaded):
        scale.scales = {}  # the optimizer that was saved had none
    for group, entry in loaded:
        if entry["n_params"] != len(group["params"]):
            raise PlanError(
                f"a param group of this {type(optim).__name__} has {len(group['params'])} parameters, and had {entry['n_params']} "
                "when it was saved: a growth had split the groups by learning rate. Build model and optimizer as at the start of "
                "the run, call growkern.resume with the scheduler, then load."
            )
    history = [record for _, entry in loaded for record in entry.get("history", ())]
    if loaded and own is not None:
        own.history = history
    elif loaded:
        OptimGuard({}, f"growth {len(history)}", history).register(optim)
    for group, _ in loaded:
        del group[KEY]


def _refuse_other_order(
    optim: Optimizer, loaded: Sequence[tuple[Any, Any]], own: OptimGuard | None
) -> None:
    """Raise PlanError where factors that are stored by position would meet other parameters, as after a load by names."""
    orders = _orders(optim, (own.model() if own is not None else None) or _grown_model(optim))
    now = {id(group): order for group, order in zip(optim.param_groups, orders, strict=True)}
    if any(now[id(g)] and entry.get("order") not in (None, "", now[id(g)]) for g, entry in loaded):
        raise PlanError(
            f"the param groups of this {type(optim).__name__} list the parameters in another order than those of the optimizer that was "
            "saved, and learning-rate factors of a growth are stored in this order: build the groups in the same order, then load."
        )


# attributes of an optimizer: its list of param groups, which every load replaces, and their number at its last step; and the list since it
# began without state
STEPPED, BEGAN = "_growkern_stepped", "_growkern_began"


def check_loaded(optim: Optimizer) -> None:
    """Settle what an optimizer has loaded since its last step, and refuse state of a grown model without learning-rate factors.

    An optimizer that begins on a grown model gets factors 1.

    Raises:
        PlanError: See ``settle``; or the optimizer has state, no growth is on its record, and its model has grown; or a new param group
            has parameters that were in no optimizer during a growth.
    """
    groups = optim.param_groups
    seen_groups, n_groups = vars(optim).get(STEPPED) or (None, 0)
    if seen_groups is groups and n_groups == len(groups):
        return
    settle(optim)
    _refuse_late(optim)
    if not all(LR_FACTOR in group for group in groups) and (grown := _grown_model(optim)):
        own = optim_guard_of(optim)
        seen = own is not None and own.history
        if _has_stepped(optim) and not seen and vars(optim).get(BEGAN) is not groups:
            raise PlanError(
                f"this {type(grown).__name__} has grown, and the state that its {type(optim).__name__} has loaded contains no "
                "learning-rate factors of a growth: call growkern.resume(model, optim, history) before load_state_dict. If this optimizer "
                f"began with the grown model, set group[{LR_FACTOR!r}] = 1.0 in each of its param groups."
            )
        vars(optim)[BEGAN] = groups
        if not any(
            group.get("lr", 1.0) for group in groups
        ):  # torch.distributed.checkpoint steps at a learning rate of 0 to make state
            return
        for group in groups:
            group.setdefault(LR_FACTOR, 1.0)
    vars(optim)[STEPPED] = groups, len(groups)


def _refuse_late(optim: Optimizer) -> None:
    """Raise PlanError for a new param group of parameters that were in no optimizer when they grew."""
    own = optim_guard_of(optim)
    if own is None or not own.left:
        return
    for i, group in enumerate(optim.param_groups):
        late = [p for p in group["params"] if (known := own.left.get(id(p))) and known() is p]
        if late and LR_FACTOR not in group:
            model = own.model()
            named = named_parameters(model) if model is not None else ()
            first = next((name for name, p in named if p is late[0]), "a parameter")
            raise PlanError(
                f"param group {i} of this {type(optim).__name__} has {len(late)} parameters (such as {first}) that were in no optimizer "
                f"during {own.what}, so their learning rates did not follow it. Put frozen parameters into a param group before a growth; "
                f"or add this group with learning rates of your own and {LR_FACTOR}=1.0."
            )


def _has_stepped(optim: Optimizer) -> bool:
    """True for an optimizer with state, unless its constructor made it (Adagrad)."""
    return any(state and float(state.get("step", 1)) > 0 for state in optim.state.values())


def _grown_model(optim: Optimizer) -> nn.Module | None:
    """Return the live model that holds the optimizer's parameters, if it grew by learning-rate factors; or None."""
    own = {id(p) for group in optim.param_groups for p in group["params"]}
    found = list[tuple[int, nn.Module]]()
    for module in Live.now().modules:
        if not getattr(vars(module).get("config"), "growkern_history", None):
            continue
        params = [id(p) for p in module.parameters()]
        with suppress(PlanError):
            if not own.isdisjoint(params) and any(read(g).dynamics for g in growth_history(module)):
                found.append((len(params), module))
    return max(found, key=itemgetter(0))[1] if found else None


def _before_step(optim: Optimizer, *_: object) -> None:
    if not torch.compiler.is_dynamo_compiling() and not is_part(optim):
        check_rates(optim)
        check_loaded(optim)


register_optimizer_step_pre_hook(_before_step)
