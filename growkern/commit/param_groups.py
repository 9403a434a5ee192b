"""Split param groups by learning-rate factor, merge them again, and adapt schedulers to the groups."""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from torch import nn
from torch.optim import Optimizer

from growkern.commit.undo import Undo
from growkern.errors import PlanError
from growkern.optimizer.schedulers import schedulers

LR_KEYS = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "swa_lr",
)  # learning rates in a param group: its own, and those of schedulers
LR_FACTOR, ORIGIN = (
    "lr_factor",
    "lr_origin",
)  # keys of a param group: its factor, and, if it was split, the index of the group it was split from
SCHEDULER_LISTS = ("base_lrs", "min_lrs", "max_lrs")  # one learning rate per group
SCHEDULER_ENTRIES = (
    "lr_lambdas",
    "_last_lr",
    "base_momentums",
    "max_momentums",
)  # one entry per group, copied to split groups


def split_groups(
    optim: Optimizer,
    target: dict[str, nn.Parameter],
    factors: Mapping[str, float],
    scheduler: object | None,
    decays: Sequence[str],
    rates: Sequence[str],
    undo: Undo,
) -> None:
    """Split param groups by the learning-rate factor of their parameters; append the split-off groups after all others.

    Args:
        optim: The optimizer, changed in place.
        target: The optimizer's parameters by name.
        factors: Parameter name -> learning-rate factor.
        scheduler: Scheduler or schedulers of the optimizer, adapted to the groups.
        decays: Param group keys that are divided by the factor.
        rates: State keys that are multiplied by the factor.
        undo: Rollback log of the writes.
    """
    for name, factor in factors.items():
        state = optim.state.get(target[name], {})
        followed = {key: state[key] * factor for key in rates if key in state}
        if followed:
            undo.set_dict(state, state | followed)
    names = {id(p): name for name, p in target.items() if name in factors}
    for index, group in enumerate(list(optim.param_groups)):
        parts: dict[float, list[int]] = {}
        for i, p in enumerate(group["params"]):
            parts.setdefault(factors[names[id(p)]] if id(p) in names else 1.0, []).append(i)
        if set(parts) <= {1.0}:
            continue
        stays = 1.0 if 1.0 in parts else next(iter(parts))
        groups = {
            factor: _scaled(group, factor, decays)
            | {
                key: [group[key][i] for i in part]
                for key in ("params", "param_names")
                if key in group
            }
            for factor, part in parts.items()
        }
        at = group.get(ORIGIN, index)
        groups = {factor: part | {ORIGIN: at} for factor, part in groups.items()}
        kept = groups.pop(stays)
        for key in ("params", "param_names"):
            if key in group:
                undo.set_list(group[key], kept[key])
                kept[key] = group[key]
        undo.set_dict(group, kept)
        undo.set_list(optim.param_groups, [*optim.param_groups, *groups.values()])
        for s in schedulers(scheduler):
            _follow(s, index, stays, list(groups), undo)
    for group in optim.param_groups:
        if LR_FACTOR not in group:
            undo.set_dict(group, {**group, LR_FACTOR: 1.0})


def join_groups(
    optim: Optimizer, places: Mapping[int, int], scheduler: object | None, undo: Undo
) -> None:
    """Merge param groups that a growth split and a shrink gave one factor again, and drop groups without parameters.

    Args:
        optim: The optimizer, changed in place.
        places: ``id`` of a parameter -> its position in model order, which merged groups keep.
        scheduler: Scheduler or schedulers of the optimizer, adapted to the groups.
        undo: Rollback log of the writes.
    """
    groups, gone = [*optim.param_groups], set[int]()
    into: dict[int, list[dict[str, Any]]] = {}
    for index, group in enumerate(groups):
        if not group["params"] and len(gone) < len(groups) - 1:
            gone.add(index)
            continue
        matches = [i for i in into if _are_one(groups[i], group)]
        into.setdefault(matches[0] if matches else index, []).append(group)
        gone |= {index} if matches else set()
    origins = [g.get(ORIGIN) for i, g in enumerate(groups) if i not in gone]
    firsts = {origin: i for i, origin in reversed([*enumerate(origins)]) if origin is not None}
    for index, parts in into.items():
        group = groups[index]
        joined = _joined(parts, places)
        if ORIGIN in group and origins.count(group[ORIGIN]) > 1:
            joined |= {ORIGIN: firsts[group[ORIGIN]]}
        elif isclose(group.get(LR_FACTOR, 1.0), 1, rel_tol=1e-9):
            joined = {key: value for key, value in joined.items() if key != ORIGIN}
        for key in ("params", "param_names"):
            if key in group:
                undo.set_list(group[key], joined[key])
                joined[key] = group[key]
        undo.set_dict(group, joined)
    undo.set_list(optim.param_groups, [g for i, g in enumerate(groups) if i not in gone])
    for s in schedulers(scheduler) if gone else ():
        for values in _lists(s, (*SCHEDULER_LISTS, *SCHEDULER_ENTRIES)):
            undo.set_list(values, [value for i, value in enumerate(values) if i not in gone])


def _are_one(group: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """True when two groups were split from one group and now differ only by rounding."""
    own = ("params", "param_names")
    keys = group.keys() - own
    if ORIGIN not in group or group[ORIGIN] != other.get(ORIGIN) or keys != other.keys() - own:
        return False
    pairs = [(group[key], other[key]) for key in keys]
    return all(a == b or (isinstance(a, float) and isclose(a, b, rel_tol=1e-9)) for a, b in pairs)


def _joined(parts: Sequence[dict[str, Any]], places: Mapping[int, int]) -> dict[str, Any]:
    """Merge groups: in model order if every group is in model order, else one after the other."""
    joined, joint = dict(parts[0]), [key for key in ("params", "param_names") if key in parts[0]]
    lists = {key: [entry for part in parts for entry in part[key]] for key in joint}
    positions = [[places.get(id(p), -1) for p in part["params"]] for part in parts]
    at = [place for own in positions for place in own]
    if len(parts) > 1 and all(own == sorted(own) for own in positions) and -1 not in at:
        order = sorted(range(len(at)), key=at.__getitem__)
        lists = {key: [entries[i] for i in order] for key, entries in lists.items()}
    return joined | lists


def check_rates(optim: Optimizer) -> None:
    """Refuse one learning rate set by hand for all split groups, which would undo the split and rescale the decay.

    Raises:
        PlanError: Split groups with different factors have one learning rate.
    """
    rates: dict[object, list[tuple[float, float]]] = {}
    for group in optim.param_groups:
        if ORIGIN in group:
            rates.setdefault(group[ORIGIN], []).append((group[LR_FACTOR], float(group["lr"])))
    for pairs in rates.values():
        factors, values = {factor for factor, _ in pairs}, {rate for _, rate in pairs}
        if len(factors) > 1 and len(values) == 1 and values != {0.0}:
            raise PlanError(
                f"the learning rate of groups that a growth has split was set to {values.pop():g} for all groups, which "
                f"undoes the factors {sorted(factors)}. Set lr * group[{LR_FACTOR!r}], or grow without scheduler= or with "
                "dynamics=None."
            )


def _scaled(group: Mapping[str, Any], factor: float, decays: Sequence[str]) -> dict[str, Any]:
    scaled = {key: value * factor if key in LR_KEYS else value for key, value in group.items()}
    if group.get("decoupled_weight_decay"):
        decays = (*decays, "weight_decay")
    if factor != 1:
        scaled |= {key: group[key] / factor for key in decays if key in group}
    return scaled | {LR_FACTOR: group.get(LR_FACTOR, 1.0) * factor}


def _follow(scheduler: object, index: int, stays: float, factors: list[float], undo: Undo) -> None:
    for values in _lists(scheduler, SCHEDULER_LISTS):
        kept = [*values[:index], values[index] * stays, *values[index + 1 :]]
        undo.set_list(values, [*kept, *(values[index] * factor for factor in factors)])
    for values in _lists(scheduler, SCHEDULER_ENTRIES):
        undo.set_list(values, [*values, *(values[index] for _ in factors)])


def _lists(scheduler: object, names: tuple[str, ...]) -> list[list[Any]]:
    attributes: list[Any] = [getattr(scheduler, name, None) for name in names]
    return [values for values in attributes if isinstance(values, list)]
